"""Long rows in plan: tiles, inputs of layers in host memory, and what is named where they do not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.stage import Step
from pipeline.compose import compose, prepare
from pipeline.planning import memory
from pipeline.planning.activations import TILE, activations
from pipeline.planning.fitting import Room, ways_out_of
from pipeline.planning.network import from_fields
from pipeline.planning.work import Head, MicroBatchShape, Sharding, Trained, Workload
from pipeline.planning.workload import workload_of

FIELDS = {
    "vocab_size": 1000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 10,
    "num_attention_heads": 8,
}  # fmt: skip
TOKENS = 65_536


def work(tokens: int = TOKENS, experts: int = 0, **settings: bool) -> Workload:
    network = from_fields({**FIELDS, "num_experts": experts, "num_experts_per_tok": 1})
    assert network is not None
    return Workload(
        (Trained(network, network.parameters, Head.tokens),), MicroBatchShape(tokens, tokens, short=False),
        Sharding(1, 1), half=True, gpu=True, checkpointing=True, **settings,
    )  # fmt: skip


def of_activations(of: Workload) -> float:
    return activations(of, of.networks[0])


def test_sizes_are_those_of_the_code() -> None:
    from common.model import activation_offload, tiled_mlp

    assert (TILE, memory.PINNED_BLOCK) == (tiled_mlp.TILE, activation_offload.CHUNK)


def test_by_hand_a_layer_in_tiles_is_bounded_by_the_norm_before_its_network() -> None:
    """bf16, h = 1024, per token: two norms 16 h, attention 2 (2 q + 2 k), the norm's backward pass 18 h; the
    inputs of 10 layers 2 h each. Whole networks have 4 i numbers and as many gradients instead of 18 h."""
    h, i = 1024, 4096
    common = 16 * h + 2 * 4 * h + 10 * 2 * h
    assert of_activations(work(tiled=True)) == TOKENS * (common + 18 * h)
    assert of_activations(work()) == TOKENS * (common + 8 * i * 2) + 2 * 3 * i * h


def test_inputs_in_host_memory_are_one_on_the_device_and_all_on_the_host() -> None:
    stay, moved = work(tiled=True), work(tiled=True, offload_activations=True)
    one = TOKENS * 1024 * 2
    assert of_activations(stay) - of_activations(moved) == 9 * one
    assert memory.estimate(moved).host - memory.estimate(stay).host == 10 * one


def test_blocks_of_host_memory_are_rounded_up_to_powers_of_two() -> None:
    """40,000 tokens are 81.9 MB: a block of 67.1 and, for 14.8, one of 16.8."""
    moved = work(40_000, tiled=True, offload_activations=True)
    assert memory.inputs_on_host(moved).host == 10 * (2**26 + 2**24)


@pytest.mark.parametrize("whole", [{"tokens": TILE}, {"experts": 4}])
def test_short_passes_and_experts_are_counted_whole(whole: dict[str, int]) -> None:
    assert of_activations(work(**whole, tiled=True)) == of_activations(work(**whole))


@pytest.mark.parametrize("compile", [None, True])
def test_host_memory_is_named_where_a_row_does_not_fit(compile: bool | None) -> None:
    overrides = ["experiment=demo", "steps=[sft]", "sft.train.micro_batch_size=1"]
    config = compose(prepare(overrides).overrides)
    config.model.compile = compile
    found = workload_of(config, Step.sft, 1, gpu=True)
    assert found is not None
    found = replace(found, batch=MicroBatchShape(1_000_000, 1_000_000, short=False))
    ways = ways_out_of(found, Step.sft, config, Room(0))
    named = [way.partition(":")[0] for way in ways if "model.activation_offload=true" in way]
    assert named[0].startswith("model.gradient_checkpointing=true model.activation_offload=true")
    given = ["model.compile=true"] if compile else []
    for way in named:  # what is named comes last, and goes together
        compose(prepare([*overrides, *given, *way.split()]).overrides)


def test_a_row_whose_layers_inputs_are_on_the_host_is_not_compiled_by_itself() -> None:
    overrides = ["experiment=demo", "steps=[sft]", "model.gradient_checkpointing=true"]
    plain = workload_of(compose(prepare(overrides).overrides), Step.sft, 1, gpu=True)
    moved = [*overrides, "model.activation_offload=true"]
    offloaded = workload_of(compose(prepare(moved).overrides), Step.sft, 1, gpu=True)
    assert plain is not None and offloaded is not None
    assert (plain.compiled, plain.tiled) == (True, False)
    assert (offloaded.compiled, offloaded.tiled, offloaded.offload_activations) == (False, True, True)
    on_cpu = workload_of(compose(prepare(moved).overrides), Step.sft, 1, gpu=False)
    assert on_cpu is not None and on_cpu.tiled and not on_cpu.offload_activations
