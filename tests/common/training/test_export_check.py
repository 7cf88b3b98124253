"""An export is compared with the live model: what is right passes in bf16, a fault is found in any dtype."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from common.artifacts import Artifact, read_manifest, verify
from common.config import Dtype, LoraConfig
from common.errors import UserError
from common.model import adapters
from common.stage import Role
from common.training import export_check, export_model
from common.training.export import ExportMismatch, ask_live
from common.training.export_check import largest_difference
from tests.common.training.exporting import (
    BF16_LORA,
    KINDS,
    MIXTURES,
    PROBE,
    SEVEN,
    exported,
    reloaded_logits,
    trained,
)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_transformers_gives_the_live_models_logits(kind: str, tmp_path: Path) -> None:
    packed = trained(KINDS[kind])
    folder = exported(packed, tmp_path / "export")
    assert largest_difference(packed.logits(PROBE), reloaded_logits(folder)) <= 1e-6


def test_logits_that_differ_keep_the_artifact_from_being_committed(tmp_path: Path) -> None:
    packed = trained(KINDS["llama"])
    right = ask_live(packed, PROBE)
    with pytest.raises(ExportMismatch, match="differ from the live model's by 0.000999"):
        exported(packed, tmp_path / "export", probe=replace(right, answer=right.answer * 1.001))
    assert not (tmp_path / "export").exists()
    assert not (tmp_path / "export.tmp" / "manifest.json").exists()


def test_weights_that_are_not_the_live_ones_keep_the_artifact_from_being_committed(tmp_path: Path) -> None:
    packed = trained(KINDS["llama"])
    state = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    state["model.model.layers.0.mlp.up_proj.weight"].zero_()
    with pytest.raises(ExportMismatch):
        exported(packed, tmp_path / "export", state_dict=state)
    assert not (tmp_path / "export").exists()


def test_rounding_that_sends_a_token_to_another_expert_is_no_wrong_export(tmp_path: Path) -> None:
    lora = LoraConfig(enabled=True, r=4, alpha=8, targets=SEVEN)
    packed = trained(MIXTURES["qwen3_moe"], Dtype.bf16, lora)
    details = read_manifest(exported(packed, tmp_path / "export")).details
    assert details["largest_logit_difference"] > 0.05  # one position, and the limit that there once was
    assert details["typical_logit_difference"] < 0.01 and details["mean_kl"] < 1e-4
    assert details["largest_merge_difference"] < 1e-6 and details["largest_logit_difference_fp32"] < 1e-5


@pytest.mark.parametrize("dtype", [Dtype.fp32, Dtype.bf16])
def test_a_merge_with_a_slightly_wrong_scale_is_found_and_kept_under_another_name(
    dtype: Dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = trained(KINDS["llama"], dtype, BF16_LORA["lora"])
    merged = adapters._merged

    def wrong(layer: Any) -> torch.Tensor:
        base = layer.base_layer.weight
        return base + 1.01 * (merged(layer) - base)

    monkeypatch.setattr(adapters, "_merged", wrong)
    with pytest.raises(ExportMismatch, match=r"q_proj.weight is not the merge of its adapter") as error:
        exported(packed, tmp_path / "export")
    kept = tmp_path / "export.unverified"
    assert error.value.EXIT_CODE == 2 and str(kept) in error.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["export.unverified"]
    assert "not the merge" in verify(kept).details["unverified"]
    with pytest.raises(UserError, match="not the merge"):
        Artifact.load(kept, Role.policy)


@pytest.mark.parametrize("lora", [LoraConfig(), BF16_LORA["lora"]])
def test_weights_that_changed_places_are_found_in_bf16(lora: LoraConfig, tmp_path: Path) -> None:
    packed = trained(KINDS["llama"], Dtype.bf16, lora)
    state = dict(packed.state_dict())
    (one,) = [n for n in state if "layers.0.mlp.gate_proj" in n and ("lora_B" in n or not lora.enabled)]
    other = one.replace("gate_proj", "up_proj")
    state[one], state[other] = state[other], state[one]
    with pytest.raises(ExportMismatch, match="differ from the live model's typically"):
        exported(packed, tmp_path / "export", state_dict=state)


@pytest.mark.parametrize("lora", [LoraConfig(), BF16_LORA["lora"]])
@pytest.mark.parametrize("memory", [1000, 1e12])
def test_a_config_that_is_slightly_wrong_is_found_in_bf16(
    lora: LoraConfig, memory: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_check, "_free_memory", lambda: memory)
    packed = trained(KINDS["llama"], Dtype.bf16, lora)
    right = export_model.plain_config

    def wrong(model: PreTrainedModel) -> Any:
        config = right(model)
        config.rms_norm_eps *= 1.5
        return config

    monkeypatch.setattr(export_model, "plain_config", wrong)
    with pytest.raises(ExportMismatch, match="in fp32"):
        exported(packed, tmp_path / "export")


def _refuse(model: nn.Module) -> Any:
    """As where a module computes with the weights of another."""
    raise RuntimeError("expected m1 and m2 to have the same dtype")


@pytest.mark.parametrize("kind", sorted(KINDS | MIXTURES))
def test_with_little_memory_an_export_is_compared_in_fp32_module_by_module(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, found = trained({**KINDS, **MIXTURES}[kind], Dtype.bf16), []
    for memory in (1000, 1e12):
        monkeypatch.setattr(export_check, "_free_memory", lambda memory=memory: memory)
        folder = exported(packed, tmp_path / f"export {memory}")
        found.append(read_manifest(folder).details["largest_logit_difference_fp32"])
    assert found[0] is not None and found[0] < 1e-5
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_an_export_that_there_is_no_memory_to_compare_in_fp32_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_check, "_free_memory", lambda: 1000)
    monkeypatch.setattr(export_check, "module_by_module", _refuse)
    said: list[str] = []
    folder = exported(trained(KINDS["llama"], Dtype.bf16), tmp_path / "export", say=said.append)
    assert said == ["note: the export was not compared in fp32, which takes more memory than there is"]
    assert read_manifest(folder).details["largest_logit_difference_fp32"] is None


def test_noise_is_that_of_the_live_models_two_kernels_and_none_is_needed_in_fp32() -> None:
    packed = trained({**KINDS["llama"], "hidden_size": 64, "head_dim": 32}, Dtype.bf16)
    asked = ask_live(packed, PROBE)
    assert 1e-5 < asked.noise < 1e-1
    assert torch.equal(packed.answers(PROBE), asked.answer)
    assert ask_live(trained(KINDS["llama"]), PROBE).noise == 0.0
