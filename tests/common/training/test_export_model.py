"""Merged adapters, ties and names: the plain model has the live one's weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from common.artifacts import read_manifest
from common.config import Dtype, LoraConfig, ModelConfig
from common.model.loading import load_model
from common.training.export_check import largest_difference
from tests.common.training.exporting import (
    BF16_LORA,
    CPU,
    KINDS,
    MIXTURES,
    PROBE,
    SEVEN,
    SHAPE,
    TIED,
    exported,
    reloaded_logits,
    trained,
)
from tests.packed import packed_lm
from tests.tiny import CHATML, tiny_tokenizer


def adapter_around_its_base(folder: Path, fields: Mapping[str, Any]) -> torch.Tensor:
    """Logits of the untrained base with the artifact's adapter/ around it, as peft loads it."""
    config = ModelConfig(config={**SHAPE, **fields}, dtype=Dtype.fp32)
    base = load_model(config, tiny_tokenizer(CHATML), seed=0, device=CPU)
    adapted = peft.PeftModel.from_pretrained(base, folder / "adapter")
    return packed_lm(adapted.eval()).logits(PROBE)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_merged_adapters_give_the_live_models_logits_and_leave_it_untouched(
    dora: bool, tied: bool, tmp_path: Path
) -> None:
    lora = LoraConfig(enabled=True, r=4, alpha=8, dora=dora)
    packed = trained({"model_type": "llama", "tie_word_embeddings": tied}, lora=lora)
    untrained = load_model(
        ModelConfig(config={**SHAPE, "model_type": "llama", "tie_word_embeddings": tied}, dtype=Dtype.fp32),
        tiny_tokenizer(CHATML),
        seed=0,
        device=CPU,
    )
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    live = packed.logits(PROBE)
    assert largest_difference(live, packed_lm(untrained.eval()).logits(PROBE)) > 1e-2
    folder = exported(packed, tmp_path / "export")
    assert largest_difference(live, reloaded_logits(folder)) <= 1e-6
    assert torch.equal(packed.logits(PROBE), live)
    after = packed.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    adapters = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(adapters) == 2 * 7 * (3 if dora else 2)
    assert not any("lora" in name for name in load_file(folder / "model.safetensors"))


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("qwen3_moe", ["all-linear"]),
        ("qwen3_moe", SEVEN),
        ("mixtral", ["all-linear"]),
        ("mixtral", SEVEN),
        ("mixtral", ["q_proj", "w1", "w2", "w3"]),
        ("granitemoe", ["q_proj", "experts.down_proj"]),
    ],
)
def test_adapters_of_experts_are_merged_into_the_tensor_that_holds_them(
    kind: str, targets: list[str], tmp_path: Path
) -> None:
    lora = LoraConfig(enabled=True, r=4, alpha=8, targets=targets)
    packed = trained(MIXTURES[kind], lora=lora)
    folder = exported(packed, tmp_path / "export")
    assert largest_difference(packed.logits(PROBE), reloaded_logits(folder)) <= 1e-6
    assert torch.equal(adapter_around_its_base(folder, MIXTURES[kind]), packed.logits(PROBE))
    experts = [name for name, _ in packed.named_parameters() if "experts" in name and "lora_B" in name]
    assert len(experts) == 2 * (1 if targets[-1] == "experts.down_proj" else 2)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_a_tied_head_with_an_adapter_on_either_side_is_two_tensors_in_the_artifact(
    targets: list[str], dora: bool, tmp_path: Path
) -> None:
    packed = trained(TIED, lora=LoraConfig(enabled=True, r=4, alpha=8, targets=targets, dora=dora))
    folder = exported(packed, tmp_path / "export")
    assert largest_difference(packed.logits(PROBE), reloaded_logits(folder)) <= 1e-6
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    written = load_file(folder / "model.safetensors")
    assert not torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])
    assert torch.equal(adapter_around_its_base(folder, TIED), packed.logits(PROBE))


def test_adapters_elsewhere_leave_a_tied_head_tied(tmp_path: Path) -> None:
    folder = exported(trained(TIED, lora=LoraConfig(enabled=True, r=4, alpha=8)), tmp_path / "export")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")


def test_merged_weights_are_rounded_once(tmp_path: Path) -> None:
    packed = trained(KINDS["llama"], **BF16_LORA)
    folder = exported(packed, tmp_path / "export")
    layer = packed.base().model.layers[1].mlp.up_proj
    a, b = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
    exact = layer.base_layer.weight.float() + 2.0 * (b @ a)
    written = load_file(folder / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(written, exact.to(torch.bfloat16))
    twice = layer.base_layer.weight + (2.0 * (b @ a)).to(torch.bfloat16)
    assert not torch.equal(written, twice)


def test_bf16_weights_are_written_bit_for_bit(tmp_path: Path) -> None:
    packed = trained(KINDS["llama"], Dtype.bf16)
    folder = exported(packed, tmp_path / "export")
    written = load_file(folder / "model.safetensors")
    live = packed.model.state_dict()
    assert set(written) == set(live)
    assert all(
        tensor.dtype is torch.bfloat16 and torch.equal(tensor, live[n]) for n, tensor in written.items()
    )
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_names_may_be_the_wrappers_or_the_models_own_or_taken_from_the_module(tmp_path: Path) -> None:
    packed = trained(KINDS["llama"])
    files = []
    for name, state in (("a", packed.state_dict()), ("b", packed.model.state_dict()), ("c", None)):
        folder = exported(packed, tmp_path / name, state_dict=state)
        files.append(read_manifest(folder).files)
    assert files[0] == files[1] == files[2]


def test_an_incomplete_state_dict_is_named(tmp_path: Path) -> None:
    packed = trained(KINDS["llama"])
    state = packed.state_dict()
    del state["model.model.norm.weight"]
    with pytest.raises(ValueError, match="lacks 1 of the module's tensors.*model.norm.weight"):
        exported(packed, tmp_path / "export", state_dict=state)
