"""Every optimizer that runs on a CPU does its update on the recipe, at every stage at which it is allowed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from signal import SIGTERM
from typing import Any

import pytest
import torch

from benchmarks.kill_resume import leaves, metric_differences
from common.config import Dtype
from common.runtime.distributed import STOPPED_EXIT_CODE
from common.training_config import OptimizerName, SchedulerName
from step1_sft.config import SFTJob
from tests.programs.told_to_stop import sft_told_to_stop
from tests.runs import Base, finish, training_lines

pytestmark = pytest.mark.slow  # a whole run of each

STEPS = 4
LEARNING_RATE = {OptimizerName.adafactor: 5e-3, OptimizerName.muon: 2e-2}
# the stages sum gradients in another order; Newton-Schulz in half precision enlarges that
STAGE_TOLERANCE = {OptimizerName.adafactor: 1e-5, OptimizerName.muon: 1e-3}


@dataclass(frozen=True)
class Point:
    optimizer: OptimizerName
    stage: int
    ranks: int = 1
    dtype: Dtype = Dtype.fp32

    @property
    def name(self) -> str:
        return f"{self.optimizer.value}-zero{self.stage}-ranks{self.ranks}-{self.dtype.value}"


ADAFACTOR = [Point(OptimizerName.adafactor, 1), Point(OptimizerName.adafactor, 2, 2)]
MUON = [
    Point(OptimizerName.muon, 1),
    Point(OptimizerName.muon, 2),
    Point(OptimizerName.muon, 3),
    Point(OptimizerName.muon, 3, 2, Dtype.bf16),
]


def job_of(base: Base, point: Point) -> SFTJob:
    # a step is a whole epoch; the first one has learning rate 0 and changes nothing
    job = base.job(
        max_steps=STEPS, save_every=1, keep_checkpoints=5, global_batch_size=64, micro_batch_size=8
    )
    job.sft.optim.name, job.sft.optim.lr = point.optimizer, LEARNING_RATE[point.optimizer]
    job.sft.optim.scheduler = SchedulerName.constant_with_warmup
    job.sft.optim.max_grad_norm = 0.0 if point.optimizer is OptimizerName.muon else 1.0
    job.model.dtype, job.deepspeed.stage = point.dtype, point.stage
    job.sft.sampling.num_prompts = 1
    return job


@pytest.fixture(scope="module")
def run_of(base: Base) -> Callable[[Point], Path]:
    return functools.cache(
        lambda point: base.run(f"optimizer-{point.name}", job_of(base, point), point.ranks)
    )


def weights_after(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """The module's weights in a checkpoint of stage 1 or 2."""
    path = run_dir / "sft" / "checkpoints" / f"step_{step:08d}" / "zero" / "mp_rank_00_model_states.pt"
    return torch.load(path, weights_only=False)["module"]


def test_the_first_step_has_learning_rate_zero(run_of: Any) -> None:
    """What the other tests take for the initial weights are just these."""
    first = weights_after(run_of(MUON[0]), 1)
    assert training_lines(run_of(MUON[0]))[0]["learning_rate"] == 0.0
    for name, weight in weights_after(run_of(ADAFACTOR[0]), 1).items():
        assert torch.equal(weight, first[name])


@pytest.mark.parametrize("point", [*ADAFACTOR, *MUON], ids=lambda point: point.name)
def test_the_loss_falls_and_every_weight_is_trained(run_of: Any, point: Point) -> None:
    from safetensors.torch import load_file

    losses = [line["loss"] for line in training_lines(run_of(point))]
    assert len(losses) == STEPS and all(math.isfinite(loss) for loss in losses)
    assert losses[3] < losses[2] < losses[1]
    before = weights_after(run_of(MUON[0]), 1)
    after = load_file(run_of(point) / "sft" / "export" / "model.safetensors")
    assert len(after) > 15
    for name, weight in after.items():
        # one update moves an element by about the learning rate; bf16 has steps of 0.008 around 1
        moved = (weight.float() - before[f"model.{name}"].to(weight.dtype).float()).abs()
        assert float((moved > LEARNING_RATE[point.optimizer] / 10).float().mean()) > 0.5, name


@pytest.mark.parametrize("points", [ADAFACTOR, MUON], ids=["adafactor", "muon"])
def test_losses_do_not_depend_on_the_stage(run_of: Any, points: list[Point]) -> None:
    first, *others = (point for point in points if point.dtype is Dtype.fp32)
    losses = [line["loss"] for line in training_lines(run_of(first))]
    for other in others:
        found = [line["loss"] for line in training_lines(run_of(other))]
        assert found == pytest.approx(losses, rel=STAGE_TOLERANCE[first.optimizer])


@pytest.mark.parametrize("point", MUON[:2], ids=lambda point: point.name)
def test_muons_first_update_of_a_matrix_is_orthogonal_and_as_large_as_adamws(
    run_of: Any, point: Point
) -> None:
    before, after = (weights_after(run_of(point), step) for step in (1, 2))
    matrices = [name for name in before if ".layers." in name and before[name].dim() == 2]
    assert len(matrices) == 14
    for name in matrices:
        update = (before[name] - after[name]) / LEARNING_RATE[point.optimizer]
        rows, columns = update.shape
        singular = torch.linalg.svdvals(update) / (0.2 * math.sqrt(max(rows, columns)))
        # five steps of Newton-Schulz bring all but the smallest near 1; a gradient's own spread is far wider,
        # and its size has nothing to do with the learning rate
        assert 0.7 < float(singular[0]) < 1.4 and float(singular[7]) > 0.5, name
        assert 0.1 < float(update.square().mean().sqrt()) < 0.3, name


@pytest.mark.parametrize("point", [ADAFACTOR[0], MUON[1], MUON[3]], ids=lambda point: point.name)
def test_a_stopped_run_goes_on_to_the_same_optimizer_state(base: Base, run_of: Any, point: Point) -> None:
    run_dir = base.write(f"optimizer-{point.name}-stopped", job_of(base, point))
    finish(run_dir, point.ranks, sft_told_to_stop, 2, 0, [SIGTERM], code=STOPPED_EXIT_CODE)
    finish(run_dir, point.ranks)
    assert metric_differences(run_of(point), run_dir) == []
    folders = [
        folder / "sft/checkpoints" / f"step_{STEPS:08d}" / "zero" for folder in (run_of(point), run_dir)
    ]
    names = sorted(path.name for path in folders[0].glob("*.pt"))
    assert names == sorted(path.name for path in folders[1].glob("*.pt"))
    for name in names:
        one, other = (dict(leaves(torch.load(folder / name, weights_only=False))) for folder in folders)
        tensors = [key for key, value in one.items() if isinstance(value, torch.Tensor)]
        # DeepSpeed keeps Muon's momentum in bf16 and restores it in fp32: the same numbers
        assert tensors and all(torch.equal(one[key].double(), other[key].double()) for key in tensors)
