"""Leaving out what nobody reads changes nothing that is read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from common.model import attention
from common.model.attention import positions_within
from common.model.probes import find_shortcuts, isolate_documents
from tests.packed import packed_lm

ROWS, BOUNDARIES = torch.tensor([3, 4, 4, 8, 11]), torch.tensor([0, 5, 12], dtype=torch.int32)


def model_of(kind: str, **more: Any) -> Any:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    attention.register()
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, **more,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)


def run(model: Any, rows: torch.Tensor | None) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Token losses at ROWS, the gradients of a weighted sum, and positions the last MLP computed."""
    packed = packed_lm(model)
    if rows is None:
        packed.shortcuts = replace(packed.shortcuts, partial_last_layer=False)
    seen = []
    hook = model.model.layers[-1].mlp.down_proj.register_forward_pre_hook(
        lambda module, arguments: seen.append(arguments[0].shape[1])
    )
    model.zero_grad()
    ids = torch.arange(3, 15)[None]
    positions = positions_within(BOUNDARIES, 12)
    losses = packed(ids, positions, BOUNDARIES, 7, ROWS, torch.arange(5), per_token=True).token_losses
    (losses * torch.arange(1.0, 6.0)).sum().backward()
    hook.remove()
    return losses.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}, seen[-1]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "olmo2"])
def test_losses_and_gradients_are_those_of_the_whole_layer(kind: str) -> None:
    model = model_of(kind)
    losses, gradients, computed = run(model, ROWS)
    whole_losses, whole_gradients, whole_computed = run(model, None)
    assert (computed, whole_computed) == (4, 12)  # position 4 is read twice and computed once
    torch.testing.assert_close(losses, whole_losses, rtol=1e-5, atol=1e-5)
    for name, gradient in whole_gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-5 * scale + 1e-9, msg=name)


def test_everything_is_computed_outside_of_a_scored_pass() -> None:
    model = model_of("llama")
    packed = packed_lm(model)
    run(model, ROWS)
    ids = torch.arange(3, 15)[None]
    with attention.plain_attention(model), torch.no_grad():
        plain = model(ids, use_cache=False).logits[0]
    torch.testing.assert_close(packed.logits(ids).detach(), plain, rtol=1e-4, atol=1e-4)


def test_a_model_that_mixes_positions_in_its_feed_forward_network_is_computed_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of("llama")
    network = model.model.layers[-1].mlp
    forward = network.forward
    monkeypatch.setattr(network, "forward", lambda hidden: forward(hidden + hidden.mean(1, keepdim=True)))
    assert not find_shortcuts(model).partial_last_layer


def test_recomputed_layers_are_computed_whole() -> None:
    model = model_of("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert not find_shortcuts(model.train()).partial_last_layer


def test_a_feed_forward_network_called_by_keyword_is_computed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    layer = model.model.layers[-1]
    call = layer.mlp.__call__
    monkeypatch.setattr(type(layer), "forward", lambda self, hidden_states, **kwargs: call(x=hidden_states))
    assert not find_shortcuts(model).partial_last_layer
    assert not layer.mlp._forward_hooks and not layer.mlp._forward_pre_hooks


def test_a_check_leaves_no_hook_behind() -> None:
    model = model_of("llama")
    isolate_documents(model)
    packed_lm(model)
    assert not model.model.layers[-1].mlp._forward_hooks
