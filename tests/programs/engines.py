"""Engines beside each other in one process: a small actor and critic, and what a PPO iteration does with
them.

They learn from documents that differ by rank, step and micro-batch. `alone` and `beside` must end with the
same bits: in the second, between the passes of the one engine lie those of the other, passes without
gradients, and phases with whole weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from common.config import DeepSpeedConfig, Dtype
from common.model import attention
from common.model.attention import positions_within
from common.model.loading import torch_dtype
from common.model.packed import PackedCausalLM
from common.model.scalar_head import PackedScalarModel, init_head
from common.runtime.distributed import World
from common.training.ds_config import build_ds_config
from common.training.engine import Engine
from common.training_config import OptimizerName
from tests.packed import packed_lm, packed_scorer
from tests.programs.gradients import VOCABULARY, tiny_llama

STEPS, MICRO_BATCHES = 3, 2


def adamw(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, fused=True)


def sgd(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.3)


def tiny_actor(dtype: Dtype = Dtype.fp32) -> PackedCausalLM:
    attention.register()
    return packed_lm(tiny_llama(attention.NAME).to(torch_dtype(dtype)))


def tiny_critic(dtype: Dtype = Dtype.fp32) -> PackedScalarModel:
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(tiny_llama("eager").config)
    config.num_labels = 1
    attention.register()
    torch.manual_seed(1)
    model: Any = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention.NAME)
    init_head(model.score, 2)
    return packed_scorer(model.to(torch_dtype(dtype)))


def engine_of(
    module: torch.nn.Module,
    stage: int,
    world: World,
    dtype: Dtype = Dtype.fp32,
    optimizer: Callable[..., torch.optim.Optimizer] = adamw,
    muon: bool = False,
    **zero: Any,
) -> Engine:
    """zero: further settings of DeepSpeedConfig. On stage 3 matrices come and go and vectors stay, as in
    large models; by default all of a tiny one would stay."""
    config = build_ds_config(
        DeepSpeedConfig(stage=stage, **zero), dtype=dtype, max_grad_norm=1.0, micro_batch_size=1,
        world_size=world.size, num_parameters=sum(p.numel() for p in module.parameters()),
        optimizer=OptimizerName.muon if muon else OptimizerName.adamw,
    )  # fmt: skip
    if stage == 3:
        many: Any = config["zero_optimization"]
        many |= {"stage3_param_persistence_threshold": 300, "stage3_max_reuse_distance": 0}
        many |= {"stage3_prefetch_bucket_size": 3000}
    trained = [p for p in module.parameters() if p.requires_grad]
    return Engine(module, optimizer(trained), config)


def document(*key: int) -> dict[str, Any]:
    """Two packed documents, drawn from the key; arguments of both modules."""
    generator = torch.Generator().manual_seed(hash(key))
    lengths = torch.randint(4, 12, (2,), generator=generator)
    boundaries = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
    ids = torch.randint(1, VOCABULARY, (1, int(boundaries[-1])), generator=generator)
    positions = positions_within(boundaries, ids.shape[1])
    return {
        "input_ids": ids,
        "position_ids": positions,
        "cu_seqlens": boundaries,
        "max_seqlen": int(lengths.max()),
    }


def of_actor(run: Any, inputs: Mapping[str, Any], **more: Any) -> Any:
    length = inputs["input_ids"].shape[1]
    where = torch.arange(0, length - 1, 2)
    return run(**inputs, trained_positions=where, targets=inputs["input_ids"][0, where + 1], **more)


def of_critic(run: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    return run(**inputs, score_positions=torch.arange(0, inputs["input_ids"].shape[1], 3))


def actor_losses(run: Any, rank: int, step: int) -> Iterator[torch.Tensor]:
    """A loss that weighs tokens, like PPO's, and a plain one, like that of demonstrations, in turns."""
    for micro in range(MICRO_BATCHES):
        scored = of_actor(run, document(rank, step, micro), per_token=True, with_entropy=True)
        weights = torch.linspace(-1, 1, len(scored.token_losses))
        yield (scored.token_losses * weights).sum() - 0.1 * scored.token_entropies.sum()
        yield 0.5 * of_actor(run, document(rank, step, micro, 1)).loss_sum


def critic_losses(run: Any, rank: int, step: int) -> Iterator[torch.Tensor]:
    for micro in range(MICRO_BATCHES):
        values = of_critic(run, document(rank, step, micro, 2))
        yield ((values - 1) ** 2).sum()


def alone(engine: Engine, losses: Any, world: World, steps: int = STEPS) -> None:
    """Train one engine, with nothing beside it."""
    engine.train()
    for step in range(steps):
        for loss in losses(engine, world.rank, step):
            engine.backward(loss, 10.0)
        assert engine.step().applied


def plainly(module: torch.nn.Module, losses: Any, ranks: int, steps: int = STEPS) -> None:
    """The same training without DeepSpeed: one process has the documents of all ranks."""
    optimizer = sgd(list(module.parameters()))
    for step in range(steps):
        for rank in range(ranks):
            for loss in losses(module, rank, step):
                (loss / 10.0).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def beside(actor: Engine, critic: Engine, world: World, steps: int = STEPS) -> None:
    """Train both, in turns, with everything between that an iteration has."""
    for step in range(steps):
        ask(actor, critic, world, step)
        actor.train()
        critic.train()
        critics = critic_losses(critic, world.rank, step)
        for number, loss in enumerate(actor_losses(actor, world.rank, step)):
            if number % 2 == 0:
                value_loss = next(critics)  # between the actor's forward and backward pass
                actor.backward(loss, 10.0)
                critic.backward(value_loss, 10.0)
            else:
                with torch.no_grad():
                    of_critic(critic, document(world.rank, 77))
                actor.backward(loss, 10.0)
        assert next(critics, None) is None
        assert critic.step().applied
        with torch.no_grad():
            of_critic(critic, document(world.rank, 78))
        assert actor.step().applied


@torch.no_grad()
def ask(actor: Engine, critic: Engine, world: World, step: int) -> None:
    """Passes without gradients: sampling with whole weights, log-probabilities, values."""
    actor.eval()
    critic.eval()
    with actor.gathered():
        for number in range(1 + world.rank):  # ranks need not run as many passes here
            of_actor(actor.module, document(step, number))
    before = of_actor(actor, document(world.rank, step)).loss_sum
    of_critic(critic, document(world.rank, step))
    with actor.gathered(), critic.gathered():
        inside = of_actor(actor.module, document(world.rank, step)).loss_sum
        of_critic(critic.module, document(step))
    assert torch.equal(before, inside)


def weights_of(engine: Engine, world: World) -> dict[str, torch.Tensor]:
    """Copies of all weights, the same on every rank."""
    import torch.distributed as dist

    found = [engine.full_state_dict()]
    copied = [None if found[0] is None else {name: value.clone() for name, value in found[0].items()}]
    if world.size > 1:
        dist.broadcast_object_list(copied, src=0)
    assert copied[0] is not None
    return copied[0]


def differing(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> list[str]:
    assert left.keys() == right.keys() and left
    return [name for name in left if not torch.equal(left[name], right[name])]


def count_collectives(dist: Any) -> Callable[[], int]:
    """From now on count the gathering of weights in this process; returns the number so far."""
    import deepspeed.comm

    count = 0

    def counted(name: str) -> None:
        original = getattr(deepspeed.comm, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            return original(*args, **kwargs)

        setattr(deepspeed.comm, name, call)

    for name in ("all_gather_into_tensor", "all_gather", "allgather_fn", "all_gather_coalesced", "broadcast"):
        counted(name)
    return lambda: count
