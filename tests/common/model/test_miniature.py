"""A small model of the same class says what a large one's code does."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma3TextConfig, Gemma4TextConfig, LlamaConfig, MistralConfig, PreTrainedModel

from common.errors import UserError
from common.model.miniature import miniature_of, reduced
from common.model.probes import isolate_documents
from tests.common.model.test_attention import CONFIGS, SHAPE, tiny


def test_heads_keep_their_width_and_share_keys_as_before() -> None:
    """The sizes of SmolLM2-135M, whose three query heads to a key head become two."""
    large = LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, pad_token_id=2,
    )  # fmt: skip
    small = reduced(large)
    assert (small.num_attention_heads, small.num_key_value_heads, small.hidden_size) == (4, 2, 256)
    assert (small.num_hidden_layers, small.intermediate_size, small.vocab_size) == (2, 64, 128)
    assert (large.num_hidden_layers, small.pad_token_id) == (30, 2)


def test_a_window_becomes_short_enough_to_be_filled_and_every_kind_of_layer_stays() -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    small = reduced(Gemma3TextConfig(num_hidden_layers=12, layer_types=kinds * 2, sliding_window=512))
    assert small.layer_types == ["sliding_attention", "full_attention"]
    assert (small.num_hidden_layers, small.sliding_window) == (2, 4)
    assert reduced(MistralConfig(sliding_window=4096)).sliding_window == 4


def test_layers_that_read_the_keys_of_earlier_ones_still_do() -> None:
    small = reduced(Gemma4TextConfig(num_hidden_layers=30, num_kv_shared_layers=20))
    assert small.layer_types == ["sliding_attention", "full_attention"] * 2
    assert small.num_kv_shared_layers == 2  # the last two
    assert [layer.head_dim for layer in small.per_layer_config] == [256, 512, 256, 512]


def test_a_small_model_in_fp32_stands_for_itself_unless_its_window_is_long() -> None:
    model = tiny(CONFIGS["llama"])
    assert miniature_of(model) is model
    rounded = miniature_of(tiny(CONFIGS["llama"]).to(torch.bfloat16))
    assert rounded.dtype is torch.float32 and type(rounded) is type(model)
    assert miniature_of(tiny(CONFIGS["gemma3_text"])).config.sliding_window == 4
    long = tiny(MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=32))
    assert miniature_of(long).config.sliding_window == 4 and long.config.sliding_window == 32


def deep() -> PreTrainedModel:
    return tiny(LlamaConfig(**{**SHAPE, "num_hidden_layers": 5})).to(torch.bfloat16)


def test_making_one_leaves_the_model_and_all_generators_alone() -> None:
    model = deep().train()
    state, weights = torch.get_rng_state(), {name: p.clone() for name, p in model.named_parameters()}
    first, second = miniature_of(model), miniature_of(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and model.config.num_hidden_layers == 5
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())
    assert len(first.get_decoder().layers) == 2 and not first.training
    for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_class_without_a_smaller_model_stands_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep()

    def refuse(*arguments: object, **more: object) -> None:
        raise ValueError("five layers, or none")

    monkeypatch.setattr(type(model), "_from_config", refuse)
    assert miniature_of(model) is model


def test_in_half_precision_a_layer_that_mixes_neighbours_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = deep()
    isolate_documents(model)
    network = type(model.model.layers[0].mlp)
    forward = network.forward
    monkeypatch.setattr(
        network, "forward", lambda self, hidden: forward(self, hidden) + 0.001 * hidden.roll(1, 1)
    )
    with pytest.raises(UserError, match="attention to later tokens"):  # at a document's first, the last
        isolate_documents(model)
