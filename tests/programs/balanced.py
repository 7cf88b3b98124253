"""One rank of the gradient grid of a mixture of experts: rank 0 writes {combination: {name: gradient}}.

There are more experts than a short document can reach, so passes leave some of them without a token.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import torch

from common.config import DeepSpeedConfig, Dtype
from common.data.batches import Batches, BatchPlan
from common.data.types import IGNORE
from common.model import attention
from common.model.packed import batch_arguments
from common.model.router_balance import RouterBalance
from common.runtime.distributed import World, all_reduce_sum, close_world, init_world
from common.training.ds_config import build_ds_config
from common.training.engine import Engine
from tests.packed import packed_lm
from tests.programs.gradients import LEARNING_RATE, MAX_LENGTH, VOCABULARY, ZERO_STAGES, Documents
from tests.spread import sharing
from tests.tiny import SHAPE

EXPERTS, CHOSEN = 16, 2
COEFFICIENT = 0.5  # large, so that a wrong gradient shows


class Point(NamedTuple):
    """One way to compute the same gradient."""

    micro_batch_size: int
    packing: bool
    stage: int
    checkpointing: bool = False
    coefficient: float = COEFFICIENT


GRID = [
    *(Point(micro, micro > 1, stage) for micro, stage in itertools.product((1, 2), ZERO_STAGES)),
    *(Point(2, True, stage, checkpointing=True) for stage in (2, 3)),
    Point(1, False, 3, coefficient=0.0),
]


def tiny_mixture(attn_implementation: str, *, checkpointing: bool = False) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe", **SHAPE, vocab_size=VOCABULARY, num_experts=EXPERTS, num_experts_per_tok=CHOSEN,
        moe_intermediate_size=16,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def reference_gradient(coefficient: float) -> dict[str, torch.Tensor]:
    """Plain transformers in float64, one document at a time; the loss of the routers by its formula."""
    model, documents = tiny_mixture("eager").double(), Documents()
    model.set_experts_implementation("eager")  # grouped products know no float64
    loss, trained, routed = torch.zeros((), dtype=torch.float64), 0, []
    for index in range(len(documents)):
        example = documents[index]
        ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
        out = model(ids, output_router_logits=True, use_cache=False)
        labels = torch.from_numpy(example.labels.astype(np.int64))
        loss = loss + torch.nn.functional.cross_entropy(
            out.logits[0], labels, reduction="sum", ignore_index=IGNORE
        )
        trained += int((labels != IGNORE).sum())
        routed.append(out.router_logits)
    of_layers = []
    for layer in zip(*routed, strict=True):
        probabilities = torch.cat(layer).softmax(-1)
        chosen = probabilities.topk(CHOSEN).indices
        share = torch.nn.functional.one_hot(chosen, EXPERTS).sum(1).double().mean(0)
        of_layers.append(EXPERTS * (share * probabilities.mean(0)).sum())
    (loss / trained + coefficient * sum(of_layers) / len(of_layers)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def pipeline_gradient(world: World, point: Point) -> dict[str, torch.Tensor] | None:
    """The gradient of one optimizer step over all documents, on rank 0."""
    module = packed_lm(tiny_mixture(attention.NAME, checkpointing=point.checkpointing))
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    config = build_ds_config(
        DeepSpeedConfig(stage=point.stage), dtype=Dtype.fp32, max_grad_norm=0.0, world_size=world.size,
        micro_batch_size=point.micro_batch_size, num_parameters=sum(p.numel() for p in module.parameters()),
    )  # fmt: skip
    balance = RouterBalance(module, point.coefficient) if point.coefficient else None
    engine = Engine(module, torch.optim.SGD(module.parameters(), lr=LEARNING_RATE), config)
    plan = BatchPlan(MAX_LENGTH, point.packing, 8, point.micro_batch_size, 0, **sharing(world))
    micro_batches = Batches(Documents(), plan).micro_batches(0)
    (trained,) = all_reduce_sum([sum(len(batch.targets) for batch in micro_batches)])
    engine.train()
    if balance is not None:
        balance.count(micro_batches, world.device, world.size)
    for batch in micro_batches:
        engine.backward(engine(**batch_arguments(batch)).loss_sum, trained)
    assert engine.step().applied
    after = engine.full_state_dict()
    if after is None:
        return None
    return {name: (before[name] - after[f"model.{name}"]) / LEARNING_RATE for name in before}


def main(out: str, sequence_parallel: int = 1) -> int:
    attention.register()
    world = init_world(sequence_parallel)
    gradients = {point: pipeline_gradient(world, point) for point in GRID}
    if world.is_rank0:
        torch.save({tuple(point): found for point, found in gradients.items()}, out)
    close_world()
    return 0
