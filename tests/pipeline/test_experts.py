"""What mixtures of experts are asked for is checked before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.config import DataConfig, LoraConfig, ModelConfig
from common.errors import UserError
from common.stage import Step
from pipeline import checks
from pipeline.compose import prepare
from pipeline.config import PipelineConfig
from pipeline.experts import COEFFICIENT, check_balanced
from pipeline.planning.network import from_fields
from tests.pipeline.checking import LLAMA, config_in, error_of

QWEN3_30B_A3B: dict[str, Any] = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151_936,
    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PipelineConfig:
    return config_in(tmp_path, monkeypatch)


def folder_of(path: Path, **fields: Any) -> str:
    """What checks read of a model that is named."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**LLAMA, **fields}))
    (path / "model.safetensors").write_bytes(b"x" * 100)
    return str(path)


def test_a_loss_of_routers_is_not_asked_of_a_network_without_any(tmp_path: Path) -> None:
    dense, mixture = folder_of(tmp_path / "dense"), folder_of(tmp_path / "mixture", num_local_experts=8)
    check_balanced(ModelConfig(path=dense))
    check_balanced(ModelConfig(path=mixture, router_aux_loss_coef=0.01))
    check_balanced(ModelConfig(path="of/the-hub", router_aux_loss_coef=0.01))  # whose config is not here
    with pytest.raises(UserError, match=rf"{COEFFICIENT}=0.01 balances experts, and .*dense has none"):
        check_balanced(ModelConfig(path=dense, router_aux_loss_coef=0.01))


def test_routers_in_compiled_layers_are_not_looked_at() -> None:
    with pytest.raises(UserError, match="does not go with model.compile=true") as caught:
        ModelConfig(router_aux_loss_coef=0.01, compile=True).check("model.")
    assert caught.value.hint == "model.compile=null, or model.router_aux_loss_coef=0"
    ModelConfig(router_aux_loss_coef=0.01, compile=False).check("model.")


def test_ppo_says_that_its_updates_do_not_balance_experts(config: PipelineConfig) -> None:
    config.steps = [Step.sft, Step.reward, Step.ppo]
    config.reward.data = DataConfig(path="rows.jsonl", max_length=256)
    config.ppo.data = DataConfig(path="rows.jsonl", max_length=256)
    config.ppo.rollout.max_new_tokens = 32
    checks.check(config, ranks=1)
    config.model.router_aux_loss_coef = 0.01
    assert "is for sft, reward and dpo, not for ppo" in error_of(config).message
    config.steps = [Step.sft, Step.reward]
    checks.check(config, ranks=1)


@pytest.mark.parametrize(
    "key",
    [
        "launch.expert_parallel",
        "+deepspeed.expert_parallel.autoep_size",
        "launch.tensor_parallel",
        "+deepspeed.tensor_parallel.autotp_size",
        "deepspeed.tensor_parallel.partition_config",
    ],
)
def test_parallelism_that_is_not_offered_is_refused_with_what_does_it_here(key: str) -> None:
    with pytest.raises(UserError, match=r"is not offered, docs/scale.md says why; deepspeed=zero3"):
        prepare([f"{key}=2"])


def test_the_weights_of_a_mixture_are_those_of_all_its_experts() -> None:
    """Qwen3-30B-A3B: 30,532,122,624 parameters, of which 3.3 billion are taken by a token."""
    network = from_fields(QWEN3_30B_A3B)
    assert network is not None and network.parameters == 30_532_122_624
    assert (network.experts, network.intermediate, network.largest) == (128, 8 * 768, 2 * 128 * 768 * 2048)
    # of a rank: q, k, v and o, of each expert one for both halves and one for what they give, and the router
    attention = (2048 + 4096) + 2 * (2048 + 512) + (4096 + 2048)
    experts = 128 * ((2048 + 1536) + (768 + 2048)) + (2048 + 128)
    assert network.adapter_parameters(LoraConfig(enabled=True, r=1)) == 48 * (attention + experts)


def test_experts_that_every_token_takes_are_counted_too() -> None:
    shared = from_fields({**QWEN3_30B_A3B, "shared_expert_intermediate_size": 1000})
    plain = from_fields(QWEN3_30B_A3B)
    assert shared is not None and plain is not None
    assert shared.parameters - plain.parameters == 48 * 3 * 2048 * 1000
    assert shared.intermediate == 8 * 768 + 1000
