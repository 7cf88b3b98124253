from __future__ import annotations

import pytest
from transformers import BloomConfig, BloomForCausalLM, Gemma2Config, Lfm2Config, Lfm2ForCausalLM

from common import notices
from common.config import ModelConfig
from common.errors import UserError
from common.model.architecture import build_config, why_not_packed
from common.model.loading import load_model
from tests.common.model.test_attention import CONFIGS, tiny
from tests.common.model.test_loading import CPU, config
from tests.tiny import CHATML, SHAPE, tiny_tokenizer


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "lama"}, "model.config.model_type=lama is unknown\n.*did you mean llama"),
        ({"model_type": "llama", "hiden_size": 8}, "model.config.hiden_size.*\n.*did you mean hidden_size"),
        ({"model_type": "llama", "hidden_size": "wide"}, "model.config of llama is not valid.*hidden_size"),
        (
            {"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4},
            "not valid.*not a multiple",
        ),
        ({}, "model.config.model_type=None is unknown"),
    ],
)
def test_a_wrong_config_names_the_field(fields: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        build_config(fields)


def test_a_config_that_is_no_decoder_is_refused() -> None:
    model = config(config={"model_type": "vit"})
    with pytest.raises(UserError, match=r"model.config.\w+ is not a field|does not make a causal LM"):
        load_model(model, tiny_tokenizer(CHATML), seed=0, device=CPU)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("bert", "attention to later tokens"),
        ("bart", "an encoder and a decoder"),
        ("whisper", "an encoder and a decoder"),
        ("gemma4_unified_assistant", "the keys and values of another model"),
    ],
)
def test_what_is_no_decoder_is_refused_by_its_name_before_it_is_made(kind: str, what: str) -> None:
    with pytest.raises(UserError, match=f"model_type={kind} has {what}.*\n.*Llama"):
        load_model(config(config={"model_type": kind}), tiny_tokenizer(CHATML), seed=0, device=CPU)


def test_a_type_whose_own_defaults_are_not_valid_is_an_error_that_names_it() -> None:
    with pytest.raises(UserError, match="model.config of gemma4_assistant is not valid: .*per_layer_input"):
        build_config({"model_type": "gemma4_assistant"})
    with pytest.raises(UserError, match="model.config.hidden_sise is not a field.*\n.*hidden_size"):
        build_config({"model_type": "gemma4_assistant", "hidden_sise": 8})


def test_a_mixture_says_that_its_router_loss_is_not_computed() -> None:
    mixture = {"model_type": "mixtral", **SHAPE, "num_local_experts": 2, "router_aux_loss_coef": 0.02}
    said: list[str] = []
    notices.listen(said.append)
    for fields in (mixture, mixture, config().config):
        load_model(config(config=fields), tiny_tokenizer(CHATML), seed=0, device=CPU)
    (line,) = [line for line in said if "routers" in line]
    assert "router_aux_loss_coef=0.02) is not computed" in line and "model_type=mixtral" in line


def test_a_config_that_asks_for_the_router_loss_is_refused() -> None:
    with pytest.raises(
        UserError, match="model.config.output_router_logits=true.*\n.*model.router_aux_loss_coef=0.001"
    ):
        build_config({"model_type": "mixtral", "output_router_logits": True})


def test_naming_no_model_is_an_error_with_both_ways_out() -> None:
    with pytest.raises(UserError, match="no model is named\n.*model.path.*model.config.model_type"):
        load_model(ModelConfig(), tiny_tokenizer(CHATML), seed=0, device=CPU)


def test_what_packing_does_not_reach_is_named_by_class_and_config() -> None:
    for packed in CONFIGS.values():
        assert why_not_packed(type(tiny(packed)), packed) is None
    capped = Gemma2Config(**SHAPE, head_dim=8, attn_logit_softcapping=50.0)
    assert why_not_packed(type(tiny(capped)), capped) is None
    convolutions = Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"])
    assert why_not_packed(Lfm2ForCausalLM, convolutions) == "layers of type conv"
    assert why_not_packed(BloomForCausalLM, BloomConfig()) == "an attention of its own"
