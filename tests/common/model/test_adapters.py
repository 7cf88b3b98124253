"""Around which modules adapters go, and what is said of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from common.config import Dtype, LoraConfig, ModelConfig
from common.errors import UserError
from common.model.adapters import base_name, merged_weights, reach
from common.model.loading import load_model
from tests.tiny import CHATML, tiny_tokenizer

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MIXTURE = {
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
}


def adapted(fields: dict[str, Any], **lora: Any) -> torch.nn.Module:
    config = ModelConfig(
        config={**SHAPE, **fields}, dtype=Dtype.fp32, lora=LoraConfig(enabled=True, r=4, **lora)
    )
    return load_model(config, tiny_tokenizer(CHATML), seed=0, device=torch.device("cpu"))


def test_modules_with_and_without_adapters_are_counted_by_name() -> None:
    network = adapted({"model_type": "llama"}, targets=["q_proj", "down_proj"])
    assert reach(network) == (
        "adapters on 2 down_proj, 2 q_proj (1,152 weights are trained); none on 1 embed_tokens, 2 gate_proj, "
        "2 k_proj, 1 lm_head, 2 o_proj, 2 up_proj, 2 v_proj"
    )


def test_experts_that_adapters_do_not_reach_are_named() -> None:
    text = reach(adapted(MIXTURE, targets=["q_proj", "v_proj"])) or ""
    assert text.startswith("adapters on 2 q_proj, 2 v_proj (")
    assert "2 experts.down_proj, 2 experts.gate_up_proj" in text.split("; none on ")[1]
    all_linear = reach(adapted(MIXTURE)) or ""
    assert "2 experts.down_proj, 2 experts.gate_up_proj, 2 gate" in all_linear.split(";")[0]


def test_a_network_without_adapters_has_nothing_to_say() -> None:
    assert reach(torch.nn.Linear(2, 2)) is None


def test_each_of_two_matrices_in_one_tensor_keeps_its_rank_and_scale() -> None:
    seven = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    network = adapted(MIXTURE, targets=seven)
    (wrapper,) = [m for n, m in network.named_modules() if n.endswith("layers.0.mlp.experts.base_layer")]
    assert (wrapper.parameter_name, wrapper.r["default"], wrapper.scaling["default"]) == (
        "gate_up_proj",
        8,
        32 / 4,
    )


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"targets": ["q_proj", "wq"]}, r"nothing has the name wq.*\n.*q_proj"),
        ({"targets": ["q_proj", "up_proj"]}, "nothing has the name up_proj"),
        ({"dropout": 0.1}, r"model.lora.dropout=0.1 cannot be had on experts.*\n.*model.lora.dropout=0"),
        ({"dora": True}, r"model.lora.dora=True cannot be had on experts.*\n.*model.lora.dora=false"),
    ],
)
def test_targets_of_a_mixture_that_cannot_be_had_are_refused(lora: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        adapted(MIXTURE, **lora)


def test_names_under_nested_wrappers_are_those_of_the_model_without_adapters() -> None:
    layer = "base_model.model.model.layers.0.mlp.experts"
    assert (
        base_name(f"{layer}.base_layer.base_layer.gate_up_proj") == "model.layers.0.mlp.experts.gate_up_proj"
    )
    assert base_name("base_model.model.score.modules_to_save.default.weight") == "score.weight"
    assert base_name("base_model.model.lm_head.base_layer.weight") == "lm_head.weight"


def test_a_merge_is_the_weight_plus_scale_times_b_times_a_in_fp32() -> None:
    network = adapted({"model_type": "llama"}, targets=["q_proj"]).to(torch.bfloat16)
    layer = network.base_model.model.model.layers[1].self_attn.q_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight, generator=torch.Generator().manual_seed(0))
    merged = {name: (tensor, off) for name, tensor, off in merged_weights(network)}
    tensor, off = merged["model.layers.1.self_attn.q_proj.weight"]
    weight, a, b = (
        part.weight.float() for part in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"])
    )
    assert tensor.dtype is torch.float32 and off < 1e-5
    assert torch.allclose(tensor, weight + 8.0 * b @ a, rtol=1e-6, atol=1e-6)
