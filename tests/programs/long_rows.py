"""One rank of a step with layers recomputed in tiles, their inputs put away: rank 0 writes gradients.

As in `gradients`, the gradient is read off a plain SGD step so large that the old weight is lost in rounding.
"""

from __future__ import annotations

import itertools

import torch

from common.config import DeepSpeedConfig, Dtype, LoraConfig, ModelConfig
from common.data.batches import Batches, BatchPlan
from common.model import attention, tiled_mlp
from common.model.activation_offload import offload_layer_inputs
from common.model.adapters import add_adapters
from common.model.packed import batch_arguments
from common.model.recomputation import recompute_layers
from common.runtime.distributed import World, all_reduce_sum, close_world, init_world
from common.training.ds_config import build_ds_config
from common.training.engine import Engine
from tests.packed import packed_lm
from tests.programs.gradients import LEARNING_RATE, MAX_LENGTH, ZERO_STAGES, Documents, tiny_llama
from tests.spread import sharing

TILE = 5
ADAPTED: tuple[tuple[str, ...], ...] = ((), ("all-linear",), ("gate_proj", "up_proj", "down_proj"))
"""Targets of adapters; the first: all weights learn. With the last, the first network's input wants none."""

Gradients = dict[str, torch.Tensor]


def gradient(world: World, stage: int, targets: tuple[str, ...], *, tiled: bool) -> Gradients | None:
    """Of one optimizer step over all documents, on rank 0. tiled: and inputs put away."""
    network = tiny_llama(attention.NAME)
    recompute_layers(network, ModelConfig(gradient_checkpointing=True, tiled_mlp=tiled), torch.device("cpu"))
    if tiled:
        offload_layer_inputs(network)
    if targets:
        network = add_adapters(network, LoraConfig(enabled=True, r=4, targets=list(targets)), "CAUSAL_LM")
        torch.manual_seed(1)
        with torch.no_grad():
            for name, weight in network.named_parameters():
                if "lora_" in name:
                    weight.normal_(std=0.1)
    module = packed_lm(network.train())
    before = {f"model.{name}": value.clone() for name, value in module.model.state_dict().items()}
    config = build_ds_config(
        DeepSpeedConfig(stage=stage), dtype=Dtype.fp32, max_grad_norm=0.0, micro_batch_size=2,
        world_size=world.size, num_parameters=sum(p.numel() for p in module.parameters()),
    )  # fmt: skip
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    engine = Engine(module, torch.optim.SGD(trained, lr=LEARNING_RATE), config)
    plan = BatchPlan(MAX_LENGTH, True, 8, 2, 0, **sharing(world))
    micro_batches = Batches(Documents(), plan).micro_batches(0)
    (tokens,) = all_reduce_sum([sum(len(batch.targets) for batch in micro_batches)])
    engine.train()
    for batch in micro_batches:
        engine.backward(engine(**batch_arguments(batch)).loss_sum, tokens)
    assert engine.step().applied
    after = engine.full_state_dict()
    if after is None:
        return None
    return {name: (before[name] - value) / LEARNING_RATE for name, value in after.items() if name in before}


def main(out: str, sequence_parallel: int) -> int:
    attention.register()
    tiled_mlp.TILE = TILE
    world = init_world(sequence_parallel)
    found = {
        (stage, targets, tiled): gradient(world, stage, targets, tiled=tiled)
        for stage, targets, tiled in itertools.product(ZERO_STAGES, ADAPTED, (True, False))
    }
    if world.is_rank0:
        torch.save(found, out)
    close_world()
    return 0
