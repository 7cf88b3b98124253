"""Engines that write their state, and engines of other ranks or stages that go on from it.

What a state consists of is asked of DeepSpeed by the name of each parameter, not of our own layout. The
documents of a step are the same for 1, 2 and 4 ranks.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.config import Dtype, LoraConfig, Offload
from common.errors import UserError
from common.model import attention
from common.model.adapters import add_adapters
from common.model.loading import torch_dtype
from common.runtime.distributed import World, barrier, init_world
from common.training.ema import ExponentialMovingAverage
from common.training.engine import Engine
from common.training.optim import build_optimizer
from common.training.reshard import LAYOUT
from common.training.snapshot import Snapshot
from common.training_config import OptimConfig, OptimizerName
from tests.packed import packed_lm
from tests.programs import engines
from tests.programs.gradients import tiny_llama

BEFORE, AFTER, SHARES = 3, 2, 4


@dataclass(frozen=True)
class Case:
    """What is trained, and how it is divided."""

    optimizer: OptimizerName = OptimizerName.adamw
    dtype: Dtype = Dtype.fp32
    stage: int = 2
    offload: bool = False
    frozen: bool = False
    lora: bool = False
    hpz: int = 1

    @property
    def name(self) -> str:
        more = "-offload" * self.offload + "-frozen" * self.frozen + "-lora" * self.lora
        more += f"-hpz{self.hpz}" if self.hpz > 1 else ""
        return f"{self.optimizer.value}-{self.dtype.value}-zero{self.stage}{more}"


def engine_of(case: Case, world: World, noise: float = 0.0) -> Engine:
    """noise: added to the trained weights, so that only what is loaded can be right."""
    module = module_of(case)
    module.register_buffer("scale", torch.zeros(3))
    for name, parameter in module.named_parameters():
        if case.frozen and ".0." in name:
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            parameter.data.add_(noise)
    optim = OptimConfig(name=case.optimizer, weight_decay=0.1)
    cpu = Offload.cpu if case.offload else Offload.none
    zero: dict[str, Any] = {"offload_optimizer": cpu, "hpz_partition_size": min(case.hpz, world.size)}
    if case.stage == 3:
        zero["offload_param"] = cpu
    return engines.engine_of(
        module, case.stage, world, case.dtype, lambda _: build_optimizer(module, optim, 1e-2),
        muon=case.optimizer is OptimizerName.muon, **zero,
    )  # fmt: skip


def module_of(case: Case) -> torch.nn.Module:
    if case.dtype is Dtype.fp16:  # DeepSpeed asks whether it is fast; here it need only be there
        import deepspeed

        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    if not case.lora:
        return engines.tiny_actor(case.dtype)
    attention.register()
    network: Any = tiny_llama(attention.NAME)
    lora = LoraConfig(enabled=True, r=4, alpha=8, targets=["all-linear"])
    return packed_lm(add_adapters(network, lora, "CAUSAL_LM").to(torch_dtype(case.dtype)))


def learn(engine: Engine, world: World, steps: range, average: ExponentialMovingAverage) -> None:
    engine.train()
    for step in steps:
        for share in range(world.rank, SHARES, world.size):
            for loss in engines.actor_losses(engine, share, step):
                engine.backward(loss, 10.0)
        # fp16 looks for its loss scale by overflowing
        assert engine.step().applied or engine.loss_scale > 1
        average.update()


def keys_of(optimizer: OptimizerName, is_muon: bool) -> tuple[str, ...]:
    if optimizer is OptimizerName.adafactor:
        return ("exp_avg_sq",)
    if optimizer is OptimizerName.adamw_8bit:
        return ()  # rounded once more, and not where DeepSpeed looks for it
    return ("momentum_buffer",) if is_muon else ("exp_avg", "exp_avg_sq")


def state_of(engine: Engine, optimizer: OptimizerName) -> dict[str, torch.Tensor]:
    """Master weights and the optimizer's state by parameter, whole, and the module's weights and buffers."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    zero = engine._engine.optimizer
    if engine.zero_stage < 3:
        zero._hp_optimizer_states_linked = False  # as after a step
        zero._lazy_init_hp_params_optimizer_state()
    scaler = getattr(zero, "loss_scaler", None)
    found = {"scale": engine.module.scale.clone(), "scale of a rank": scale_of_a_rank(engine)}
    found["passes"] = torch.tensor(getattr(scaler, "cur_iter", 0))
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        found[f"{name} weights"] = safe_get_full_fp32_param(parameter).clone()
        for key in keys_of(optimizer, getattr(parameter, "use_muon", False)):
            if key == "momentum_buffer" and engine.zero_stage < 3:
                continue  # it is not where DeepSpeed looks for it
            value = safe_get_full_optimizer_state(parameter, key)
            assert value is not None
            found[f"{name} {key}"] = value.clone()
    return found


def scale_of_a_rank(engine: Engine) -> torch.Tensor:
    """By how much a rank's gradients are larger in the backward pass than those of the mean loss."""
    return torch.tensor(engine.loss_scale * engine._world_size if engine.loss_scale > 1 else 1.0)


def write(folder: str, cases: list[Case]) -> int:
    """Under folder/<case>: `state`, `then.pt` with what it consists of, `later.pt` after some more steps."""
    world = init_world()
    for case in cases:
        where = Path(folder) / case.name
        (where / "state").mkdir(parents=True, exist_ok=True)
        (where / "average").mkdir(exist_ok=True)
        engine = engine_of(case, world)
        average = ExponentialMovingAverage(engine, 0.8)
        learn(engine, world, range(BEFORE), average)
        engine.module.scale.fill_(7.0)
        engine.save(where / "state", Snapshot(where, None).open)
        average.save(where / "average", Snapshot(where, None).open)
        then, averaged = state_of(engine, case.optimizer), averaged_weights(engine, average, world)
        learn(engine, world, range(BEFORE, BEFORE + AFTER), average)
        later = (engines.weights_of(engine, world), averaged_weights(engine, average, world))
        if world.is_rank0:
            torch.save((then, averaged), where / "then.pt")
            torch.save(later, where / "later.pt")
    return 0


def same_bits(folder: str, cases: list[Case]) -> int:
    """A second engine of the same ranks goes on from the first one's state, and ends with the same bits."""
    world = init_world()
    for case in cases:
        where = Path(folder) / case.name
        where.mkdir(parents=True, exist_ok=True)
        ends = []
        for first in (True, False):
            engine = engine_of(case, world, noise=0.0 if first else 0.5)
            average = ExponentialMovingAverage(engine, 0.8)
            if first:
                learn(engine, world, range(BEFORE), average)
                engine.save(where, Snapshot(where, None).open)
                barrier()
            else:
                assert engine.load(where) is None, case.name
            learn(engine, world, range(BEFORE, BEFORE + AFTER), average)
            ends.append(engines.weights_of(engine, world))
            if case.optimizer is OptimizerName.adamw_bf16:
                kept = engine._engine.optimizer.optimizer.state.values()
                assert kept and all(state["exp_avg"].dtype is torch.bfloat16 for state in kept), case.name
        assert engines.differing(*ends) == [], case.name
    return 0


def averaged_weights(
    engine: Engine, average: ExponentialMovingAverage, world: World
) -> dict[str, torch.Tensor]:
    with average.swapped_in():
        return engines.weights_of(engine, world)


def read(folder: str, pairs: list[tuple[Case, Case]]) -> int:
    """Go on from the first case's state as the second; what it consists of must be the same, bit for bit."""
    world = init_world()
    for case, wanted in pairs:
        where = Path(folder) / case.name
        engine = engine_of(wanted, world, noise=0.5)
        average = ExponentialMovingAverage(engine, 0.8)
        changed = engine.load(where / "state"), average.load(where / "average")
        (then, averaged), later = torch.load(where / "then.pt"), torch.load(where / "later.pt")
        mark = f"{case.name} -> {wanted.name} ({changed[0]})"
        assert changed[0] is not None and changed[0] == changed[1], mark
        found = state_of(engine, case.optimizer)
        wrong = [key for key in then if key in found and not torch.equal(found[key], then[key])]
        assert not wrong, f"{mark}: {wrong}"
        kinds = {key.partition(" ")[2] for key in found} & {key.partition(" ")[2] for key in then}
        assert {"weights", *keys_of(case.optimizer, False)} <= kinds, (mark, kinds)
        assert engines.differing(averaged_weights(engine, average, world), averaged) == [], mark
        learn(engine, world, range(BEFORE, BEFORE + AFTER), average)
        ends = (engines.weights_of(engine, world), averaged_weights(engine, average, world))
        pairs_of_ends = zip(ends, later, strict=True)
        errors = [distance(end, other) / distance(end, averaged) for end, other in pairs_of_ends]
        if world.is_rank0:
            print(f"{mark}: {max(errors):.2g}")
        assert max(errors) < tolerance(case), (mark, errors)
    without = Path(folder) / "without a layout"
    if world.is_rank0:
        shutil.copytree(where / "state", without)
        (without / LAYOUT).unlink()
    barrier()
    try:
        engine.load(without)
        raise AssertionError("it does not say how it is divided")
    except UserError as error:
        assert "and an earlier version" in error.message and "launch.nproc_per_node=" in str(error.hint)
    return 0


def distance(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    return sum(float(((left[name].float() - right[name].float()) ** 2).sum()) for name in left) ** 0.5


def tolerance(case: Case) -> float:
    """Of the error as a share of what was learned: stages sum gradients in another order, in bf16 with
    roundings of 2^-9, and Newton-Schulz enlarges that."""
    if case.dtype is not Dtype.fp32:
        return 0.1
    if case.optimizer is OptimizerName.adamw_8bit:
        return 2e-2  # other ranks have other blocks of 256: once more rounded to 8 bits, as in every step
    return 1e-2 if case.optimizer is OptimizerName.muon else 1e-4


def sft_recorded(config: str, stop_after: int) -> int:
    """`python -m step1_sft --config CONFIG`, whose ranks record beside it which rows they learn from.

    Rank 0 is told to stop after that step, if it is not 0; at -1 it dies of the first state it reshards.
    """
    import json
    import os
    import signal

    import common.training.engine
    from common.data.batches import Batches
    from tests.forked import sft
    from tests.programs.told_to_stop import sft_told_to_stop

    take = Batches.micro_batches
    path = Path(config).with_name(f"rows_{os.getpid()}.jsonl")

    def recorded(self: Batches, step: int) -> Any:
        made = take(self, step)
        waiting = stop_after > 0 and step >= stop_after  # its rows are not learned from: it is told to stop
        rows = [int(row) for batch in made for row in batch.row_ids]
        with path.open("a") as file:
            if not waiting:
                file.write(json.dumps({"step": step, "rows": rows}) + "\n")
        return made

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    Batches.micro_batches = recorded  # type: ignore[method-assign]
    if stop_after < 0:
        common.training.engine.Engine.publish_master_weights = die  # type: ignore[method-assign]
        return sft(config)
    return sft_told_to_stop(config, stop_after, 0, [signal.SIGTERM]) if stop_after else sft(config)
