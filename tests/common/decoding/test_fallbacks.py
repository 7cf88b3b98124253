"""What a step's network falls back to is known from the config alone, in the step's own words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from common import notices
from common.config import Dtype, ModelConfig
from common.decoding.fallbacks import notice_fallbacks
from common.errors import UserError
from common.launch_config import LaunchConfig
from common.model.architecture import CAUSAL_LM
from common.model.loading import load_model
from common.model.scalar_head import NEW_REWARD_MODEL
from tests.packed import packed_lm
from tests.tiny import CHATML, SHAPE, tiny_tokenizer


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    before = notices.log.handlers[:]
    yield
    notices.log.handlers[:] = before


def model_of(kind: str, *, checkpointing: bool = False, **fields: Any) -> ModelConfig:
    return ModelConfig(
        config={"model_type": kind, **fields}, dtype=Dtype.fp32, gradient_checkpointing=checkpointing
    )


def foreseen(model: ModelConfig) -> list[str]:
    said: list[str] = []
    notices.listen(said.append)
    notice_fallbacks(model, CAUSAL_LM, LaunchConfig())
    return said


KINDS = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "mixtral": {**SHAPE, "num_local_experts": 2, "router_aux_loss_coef": 0.5},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "cohere": {**SHAPE, "logit_scale": 0.5},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_foreseen_is_what_the_step_says(kind: str) -> None:
    model = model_of(kind, checkpointing=kind == "llama", **(KINDS[kind] or SHAPE))
    said: list[str] = []
    notices.listen(said.append)
    packed_lm(load_model(model, tiny_tokenizer(CHATML), seed=0, device=torch.device("cpu")))
    assert foreseen(model) == said != []


def test_a_model_that_does_everything_has_nothing_to_say() -> None:
    assert foreseen(model_of("llama", **SHAPE)) == []


def test_what_the_step_would_refuse_is_refused() -> None:
    with pytest.raises(UserError, match="model_type=bert has attention to later tokens"):
        notice_fallbacks(model_of("bert"), CAUSAL_LM, LaunchConfig())
    with pytest.raises(UserError, match="lfm2 does not make a reward model: transformers has no Sequence"):
        notice_fallbacks(model_of("lfm2"), NEW_REWARD_MODEL, LaunchConfig())


def test_a_network_that_cannot_share_rows_is_refused_where_ranks_do() -> None:
    shared = LaunchConfig(sequence_parallel=2)
    notice_fallbacks(model_of("llama", **SHAPE), CAUSAL_LM, shared)
    with pytest.raises(UserError, match="model_type=falcon cannot share rows"):
        notice_fallbacks(model_of("falcon", **KINDS["falcon"]), CAUSAL_LM, shared)


def test_a_package_that_is_lacking_is_an_error_that_names_the_type(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_config(*_: object, **__: object) -> None:
        raise ImportError("it requires the PIL library")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_config", from_config)
    with pytest.raises(UserError, match="model_type=llama does not make a causal LM: ImportError: .*PIL"):
        notice_fallbacks(model_of("llama", **SHAPE), CAUSAL_LM, LaunchConfig())


def test_where_nothing_can_be_asked_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.decoding.fallbacks.small_network", lambda *_: None)
    (line,) = foreseen(model_of("llama", **SHAPE))
    assert line.startswith("what the architecture falls back to is not known before the run, since a small")


def test_a_loss_of_routers_is_foreseen_and_refused_where_there_are_none() -> None:
    mixture = model_of("mixtral", **KINDS["mixtral"])
    mixture.router_aux_loss_coef = 0.01
    said = foreseen(mixture)
    assert any("each step runs its micro-batches once more" in line for line in said)
    assert any("model.router_aux_loss_coef=0.01 (up to two thirds of a layer" in line for line in said)
    assert not any("is not computed" in line for line in said)
    dense = model_of("llama", **SHAPE)
    dense.router_aux_loss_coef = 0.01
    with pytest.raises(UserError, match="model_type=llama has no experts"):
        foreseen(dense)
