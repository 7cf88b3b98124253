"""Inputs of recomputed layers put away and got back: the same bits, and nothing left behind."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch

from common import notices
from common.config import CheckpointingPolicy, ModelConfig
from common.errors import UserError
from common.model import activation_offload, tiled_mlp
from common.model.activation_offload import HostMemory, offload_layer_inputs
from common.model.recomputation import enable_checkpointing, recompute_layers
from tests.common.model.test_last_layer import model_of
from tests.common.model.test_tiled_mlp import TOKENS, gradients, whole_rows

LAYERS = 2


def offloaded(model: Any) -> Any:
    enable_checkpointing(model)
    offload_layer_inputs(model)
    return model.train()


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of what was put away."""
    shapes: list[torch.Size] = []
    real = HostMemory.put
    monkeypatch.setattr(
        HostMemory, "put", lambda self, tensor: (shapes.append(tensor.shape), real(self, tensor))[1]
    )
    return shapes


@pytest.mark.parametrize("tile", [8192, 5])
@pytest.mark.parametrize("chunk", [64 << 20, 40])  # bytes of a block; 10 numbers, which divide no input
def test_gradients_are_the_same_bits(
    put: list[torch.Size], monkeypatch: pytest.MonkeyPatch, tile: int, chunk: int
) -> None:
    monkeypatch.setattr(tiled_mlp, "TILE", tile)
    monkeypatch.setattr(activation_offload, "CHUNK", chunk)
    model = model_of("llama")
    moved, stayed = copy.deepcopy(model), model
    for each in (moved, stayed):
        recompute_layers(each, ModelConfig(gradient_checkpointing=True), torch.device("cpu"))
    offload_layer_inputs(moved)
    (losses, found), (wanted_losses, wanted) = (
        gradients(whole_rows(each.train())) for each in (moved, stayed)
    )
    assert put == [(1, TOKENS, 32)] * LAYERS  # rotary embeddings, which layers share, stay
    assert torch.equal(losses, wanted_losses)
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


def test_no_input_of_a_layer_is_left_where_it_was() -> None:
    model = offloaded(
        model_of(
            "llama",
        )
    )
    packed, inputs = whole_rows(model), []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, arguments: inputs.append(weakref.ref(arguments[0])))
    ids, rows = (torch.arange(TOKENS) * 7 % 50)[None], torch.arange(3)
    bounds = torch.tensor([0, TOKENS], dtype=torch.int32)
    result = packed(ids, torch.arange(TOKENS)[None], bounds, TOKENS, rows, rows)
    assert len(inputs) == LAYERS and all(each() is None for each in inputs)
    result.loss_sum.backward()


def test_the_input_before_is_fetched_while_a_layer_is_computed() -> None:
    host = HostMemory()
    first, second = (torch.full((2, 3), float(number)) for number in (1, 2))
    away = [host.put(first), host.put(second)]
    assert torch.equal(away[1].get(), second)
    assert away[0]._fetched is not None and away[1]._fetched is None
    assert torch.equal(away[0].get(), first)


def test_what_is_put_away_goes_with_the_graph_that_wants_it() -> None:
    host = HostMemory()
    first = weakref.ref(host.put(torch.ones(2)))
    assert first() is None
    host.put(torch.ones(2)).get()  # looks for the one before


def test_a_pass_without_gradients_puts_nothing_away(put: list[torch.Size]) -> None:
    packed = whole_rows(offloaded(model_of("llama")))
    ids, bounds = torch.arange(6)[None], torch.tensor([0, 6], dtype=torch.int32)
    with torch.no_grad():
        packed(ids, ids, bounds, 6, torch.arange(3), torch.arange(3))
    assert not put


def test_on_the_cpu_nothing_is_moved_and_that_is_said(put: list[torch.Size]) -> None:
    said: list[str] = []
    notices.listen(said.append)
    settings = ModelConfig(gradient_checkpointing=True, activation_offload=True)
    model = model_of("llama")
    recompute_layers(model, settings, torch.device("cpu"))
    gradients(whole_rows(model.train()))
    assert not put and any("model.activation_offload moves nothing" in line for line in said)


def test_a_model_whose_layers_are_not_recomputed_is_refused() -> None:
    with pytest.raises(UserError, match="no layer of model_type=llama is recomputed"):
        offload_layer_inputs(model_of("llama"))


@pytest.mark.parametrize("key", ["tiled_mlp", "activation_offload"])
def test_a_setting_that_does_not_go_with_it_is_refused_with_the_way_out(key: str) -> None:
    selective = CheckpointingPolicy.selective
    for others, way in (
        ({}, "add model.gradient_checkpointing=true"),
        (
            {"gradient_checkpointing": True, "checkpointing_policy": selective},
            "model.checkpointing_policy=full",
        ),
        ({"gradient_checkpointing": True, "compile": True}, f"model.compile=null, or leave model.{key} out"),
    ):
        with pytest.raises(UserError, match=rf"model.{key}=true") as refused:
            ModelConfig(path="x", **{key: True}, **others).check("model.")
        assert refused.value.hint == way
    ModelConfig(path="x", **{key: True}, gradient_checkpointing=True).check("model.")
