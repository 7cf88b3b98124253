"""Two engines and an average in one checkpoint: saved, resumed, and refused by a disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import torch

from common.config import Dtype
from common.errors import UserError
from common.runtime.distributed import World, barrier, init_world
from common.training.checkpoint import Checkpoints, StatefulGroup
from common.training.ema import ExponentialMovingAverage
from tests.programs import engines


class Trained:
    """An actor with an average, and a critic."""

    def __init__(self, stage: int, dtype: Dtype, world: World) -> None:
        self.actor = engines.engine_of(engines.tiny_actor(dtype), stage, world, dtype)
        self.critic = engines.engine_of(engines.tiny_critic(dtype), stage, world, dtype)
        self.average = ExponentialMovingAverage(self.actor, 0.8)
        self.state = StatefulGroup(actor=self.actor, critic=self.critic, average=self.average)
        self.world = world

    def learn(self, step: int) -> None:
        for engine, losses in ((self.actor, engines.actor_losses), (self.critic, engines.critic_losses)):
            engine.train()
            for loss in losses(engine, self.world.rank, step):
                engine.backward(loss, 10.0)
            assert engine.step().applied
        self.average.update()


def end(folder: Path, stage: int, dtype: Dtype, *, stop: bool) -> int:
    """Four steps, the last of which is saved; with `stop` by two engines each, the second resumed."""
    world = init_world()
    checkpoints = Checkpoints(folder, keep=9, world=world)
    trained = Trained(stage, dtype, world)
    for step in range(4):
        if stop and step == 2:
            checkpoints.save(2, trained.state, {"step": 2}, best_step=None)
            trained = Trained(stage, dtype, world)
            resumed = checkpoints.resume(trained.state)
            assert resumed is not None and resumed.counters == {"step": 2}
        trained.learn(step)
    checkpoints.save(4, trained.state, {"step": 4}, best_step=None)
    return 0


def every_end(folder: str) -> int:
    """Under folder/<dtype>-<stage>/: `whole` and `stopped`."""
    for dtype, stage in ((Dtype.fp32, 1), (Dtype.bf16, 2), (Dtype.fp32, 3), (Dtype.bf16, 3)):
        for name in ("whole", "stopped"):
            where = Path(folder) / f"{dtype.value}-{stage}" / name
            where.parent.mkdir(parents=True, exist_ok=True)
            end(where, stage, dtype, stop=name == "stopped")
    return 0


def refused(folder: str, victim: int) -> int:
    """On rank `victim` the disk takes the actor's part and refuses the critic's."""
    world = init_world()
    Path(folder).mkdir(exist_ok=True)
    for stage in (1, 2, 3):
        checkpoints = Checkpoints(Path(folder) / str(stage), keep=9, world=world)
        trained = Trained(stage, Dtype.fp32, world)
        trained.learn(0)
        checkpoints.save(1, trained.state, {}, best_step=None)
        trained.learn(1)
        write = torch.save

        def refuse(value: Any, file: Any, *rest: Any, write: Any = write, **more: Any) -> None:
            if "/critic/" in file.name:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(value, file, *rest, **more)

        if world.rank == victim:
            torch.save = refuse
        try:
            checkpoints.save(2, trained.state, {}, best_step=None)
            raise AssertionError("the disk did not refuse")
        except UserError as error:
            assert "the disk is full" in error.message, error.message
        finally:
            torch.save = write
        barrier()  # rank 0 removes what was begun
        found = sorted(path.name for path in checkpoints.folder.iterdir())
        assert found == ["step_00000001"], found
        trained.learn(2)
        checkpoints.save(3, trained.state, {}, best_step=None)
        assert sorted(checkpoints.steps()) == [1, 3]
    return 0
