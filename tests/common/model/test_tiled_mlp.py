"""Feed-forward networks in tiles: the numbers of the whole, with two forward passes and no more.

Tiles have 5 tokens here. Tolerances are those of fp32 sums in another order, unless said.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from common import notices
from common.config import CheckpointingPolicy, LoraConfig, ModelConfig
from common.errors import UserError
from common.model import tiled_mlp
from common.model.adapters import add_adapters
from common.model.attention import positions_within
from common.model.packed import PackedCausalLM
from common.model.recomputation import enable_checkpointing, recompute_layers
from tests.common.model.test_last_layer import model_of
from tests.packed import packed_lm

TOKENS = 17
BOUNDARIES = torch.tensor([0, 5, 12, TOKENS], dtype=torch.int32)
CPU = torch.device("cpu")
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
FP32 = 1e-6
"""Relative, of a gradient's norm: sums of 17 products in another order."""


@pytest.fixture
def said() -> list[str]:
    lines: list[str] = []
    notices.listen(lines.append)
    return lines


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled_mlp, "TILE", 5)


def recomputed(model: Any, tiled: bool | None) -> Any:
    recompute_layers(model, ModelConfig(gradient_checkpointing=True, tiled_mlp=tiled), CPU)
    return model.train()


def watched(model: Any) -> list[int]:
    """Tokens of each call of the first layer's last matrix, from now on."""
    calls: list[int] = []
    matrix = model.get_decoder().layers[0].mlp.down_proj
    matrix.register_forward_pre_hook(lambda _, arguments: calls.append(arguments[0].shape[1]))
    return calls


Gradients = dict[str, torch.Tensor]


def whole_rows(model: Any) -> PackedCausalLM:
    """In training mode, the last layer computed at all positions, as in a model that is recomputed."""
    packed = packed_lm(model)
    packed.shortcuts = replace(packed.shortcuts, partial_last_layer=False)
    return packed.train()


def gradients(packed: PackedCausalLM, shared_prefix: tuple[int, ...] = ()) -> tuple[torch.Tensor, Gradients]:
    """Token losses, and the gradients of a weighted sum of them."""
    ids, rows = (torch.arange(TOKENS) * 7 % 50)[None], torch.arange(TOKENS - 1)
    positions = positions_within(BOUNDARIES, TOKENS)
    if shared_prefix:
        positions[:, 5:12] += shared_prefix[1]
    losses = packed(
        ids, positions, BOUNDARIES, 7, rows, rows, shared_prefix=shared_prefix, per_token=True
    ).token_losses
    (losses * torch.arange(1.0, TOKENS)).sum().backward()
    found = {name: p.grad for name, p in packed.model.named_parameters() if p.grad is not None}
    return losses.detach(), found


def assert_same(found: Gradients, wanted: Gradients, within: float = FP32) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        difference = float((found[name] - gradient).norm() / gradient.norm().clamp(min=1e-12))
        assert difference <= within, (name, difference)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "olmo2", "glm4"])
@pytest.mark.parametrize("shared_prefix", [(), (0, 3, 0)])
def test_gradients_are_those_of_whole_layers(kind: str, shared_prefix: tuple[int, ...]) -> None:
    model = model_of(kind)
    tiled, whole = (recomputed(copy.deepcopy(model), choice) for choice in (None, False))
    packed = whole_rows(tiled)
    calls = watched(tiled)
    losses, found = gradients(packed, shared_prefix)
    whole_losses, wanted = gradients(whole_rows(whole), shared_prefix)
    assert set(calls) == {4, 5}  # 17 tokens in tiles of at most 5
    torch.testing.assert_close(losses, whole_losses, rtol=1e-6, atol=1e-6)
    assert_same(found, wanted)


@pytest.mark.parametrize(("kind", "passes"), [("llama", 2), ("olmo2", 3)])
def test_a_network_runs_forward_twice_and_once_more_where_a_norm_follows(kind: str, passes: int) -> None:
    model = recomputed(model_of(kind), None)
    packed = whole_rows(model)
    calls = watched(model)
    gradients(packed)
    assert sum(calls) == passes * TOKENS


def test_a_pass_of_no_more_tokens_than_a_tile_is_computed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled_mlp, "TILE", TOKENS)
    model = model_of("llama")
    tiled, whole = (recomputed(copy.deepcopy(model), choice) for choice in (None, False))
    (losses, found), (whole_losses, wanted) = gradients(whole_rows(tiled)), gradients(whole_rows(whole))
    assert torch.equal(losses, whole_losses)
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


@pytest.mark.parametrize("targets", [["all-linear"], ["gate_proj", "up_proj", "down_proj"], ["q_proj"]])
def test_adapters_learn_the_same(targets: list[str]) -> None:
    """With the second the first network is reached by no gradient, with the third the networks are frozen."""
    found = []
    for choice in (None, False):
        model = recomputed(model_of("llama"), choice)
        torch.manual_seed(1)
        adapted = add_adapters(model, LoraConfig(enabled=True, r=4, targets=targets), "CAUSAL_LM").train()
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if "lora_B" in name:
                    weight.normal_()
        found.append(gradients(whole_rows(adapted))[1])
    assert all("lora" in name for name in found[0])
    assert_same(*found)


def keeping(mlp: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The forward pass of a tiled network, of which autograd keeps everything."""
    whole = mlp.forward._whole

    def run(hidden: torch.Tensor) -> torch.Tensor:
        return torch.cat([whole(hidden.narrow(-2, *part)) for part in tiled_mlp._tiles(hidden.shape[-2])], -2)

    return run


def test_dropout_is_drawn_again_as_it_was() -> None:
    """Against the same tiles without recomputation."""
    found = []
    for kept in (False, True):
        model = model_of("llama")
        if kept:
            tiled_mlp.tile_feed_forward(model, insisted=True)
            for layer in model.model.layers:
                layer.mlp.forward = keeping(layer.mlp)
        else:
            recomputed(model, None)
        torch.manual_seed(1)
        adapted = add_adapters(model, LoraConfig(enabled=True, r=4, dropout=0.5), "CAUSAL_LM").train()
        torch.manual_seed(2)
        found.append(gradients(whole_rows(adapted)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-6)
    assert_same(found[0][1], found[1][1])


def test_a_weights_gradient_is_summed_in_fp32() -> None:
    """Of 33 tiles in bf16: as far from fp32 as the gradient of the whole, which is rounded once."""
    torch.manual_seed(0)
    tokens = 5 * 33
    hidden, by_out = torch.randn(2, 1, tokens, 32)
    exact = model_of("llama").model.layers[0].mlp
    errors = []
    for tiled in (False, True):
        model = model_of("llama").bfloat16()
        if tiled:
            tiled_mlp.tile_feed_forward(model, insisted=True)
        model.model.layers[0].mlp(hidden.bfloat16()).backward(by_out.bfloat16())
        errors.append(model.model.layers[0].mlp.down_proj.weight.grad.float())
    exact(hidden).backward(by_out)
    wanted = exact.down_proj.weight.grad
    whole, tiles = (float((error - wanted).norm() / wanted.norm()) for error in errors)
    assert tiles <= 1.5 * whole


def test_experts_are_left_whole_and_that_is_said(said: list[str]) -> None:
    model = recomputed(model_of("qwen3_moe", **EXPERTS), None)
    assert not any(map(tiled_mlp.is_tiled, model.modules()))
    for _ in range(2):
        gradients(whole_rows(model))
    assert len(said) == 1 and "2 of 2 layers of model_type=qwen3_moe have experts" in said[0]
    with pytest.raises(UserError, match="2 of 2 layers .* have experts"):
        tiled_mlp.tile_feed_forward(model, insisted=True)


def test_a_network_that_mixes_tokens_is_left_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    kind = type(model.model.layers[0].mlp)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x + x.mean(1, keepdim=True)))
    tiled_mlp.tile_feed_forward(model, insisted=False)
    assert not any(map(tiled_mlp.is_tiled, model.modules()))


def test_short_passes_say_nothing_of_networks_that_cannot_be_tiled(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do those without gradients, which keep nothing. All tokens of a pass count, not those of a row."""
    model = recomputed(model_of("qwen3_moe", **EXPERTS), None)
    ids, rows = (torch.arange(TOKENS) * 7 % 50)[None], torch.arange(TOKENS - 1)
    with torch.no_grad():
        whole_rows(model)(ids, positions_within(BOUNDARIES, TOKENS), BOUNDARIES, 7, rows, rows)
    monkeypatch.setattr(tiled_mlp, "TILE", TOKENS)
    gradients(whole_rows(model))
    assert not said
    monkeypatch.setattr(tiled_mlp, "TILE", TOKENS - 1)
    gradients(whole_rows(model))
    assert len(said) == 1


def test_selective_recomputation_is_not_tiled() -> None:
    model = model_of("llama")
    policy = CheckpointingPolicy.selective
    recompute_layers(model, ModelConfig(gradient_checkpointing=True, checkpointing_policy=policy), CPU)
    assert not any(map(tiled_mlp.is_tiled, model.modules()))


def test_a_pass_without_gradients_is_computed_in_tiles() -> None:
    model = model_of("llama")
    enable_checkpointing(model)
    ids = (torch.arange(TOKENS) * 7 % 50)[None]
    positions = positions_within(BOUNDARIES, TOKENS)
    with torch.no_grad():
        packed = packed_lm(model)
        whole = packed(ids, positions, BOUNDARIES, 7, torch.arange(3), torch.arange(3)).token_losses
        tiled_mlp.tile_feed_forward(model, insisted=True)
        calls = watched(model)
        tiled = packed(ids, positions, BOUNDARIES, 7, torch.arange(3), torch.arange(3)).token_losses
    assert sum(calls) == TOKENS and max(calls) == 5
    torch.testing.assert_close(tiled, whole, rtol=1e-6, atol=1e-6)
