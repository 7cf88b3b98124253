"""What the loops of all recipes keep and say alike: counters, cadence, a stop, a step that was skipped.

Takes and returns plain values; which of these happens when is written in each step's train.py. Nothing here
knows what a step minimises.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from common.config import Dtype, JobConfig, OptimConfig, TrainConfig
from common.data.types import TokenizedExample, TokenizedPrompt
from common.errors import UserError
from common.evidence import chance_of_so_few
from common.runtime.distributed import STOPPED_EXIT_CODE, World
from common.runtime.progress import Progress
from common.runtime.tracking import METRICS_FILE, Tracker, read_metrics
from common.stage import Step
from common.training.checkpoint import Checkpoints, State
from common.training.ds_config import build_ds_config
from common.training.engine import Engine, StepOutcome

MAX_SKIPPED_IN_A_ROW = 5
SURPRISE = 0.01
"""How improbable it must be that so many pairs are in the wrong order by chance, before their columns are
suspected: that takes seven of them."""
log = logging.getLogger("rlhf.loop")


@dataclass(frozen=True)
class Counters:
    """Where the run is; part of every checkpoint."""

    step: int = 0  # optimizer steps whose rows were consumed
    applied: int = 0  # of these, the ones that changed the weights
    skipped_in_a_row: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    best_step: int | None = None
    best_loss: float | None = None


def build_engine(
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    job: JobConfig,
    train: TrainConfig,
    optim: OptimConfig,
    world: World,
) -> Engine:
    """The module under ZeRO, as the job says."""
    config = build_ds_config(
        job.deepspeed,
        dtype=job.model.dtype,
        max_grad_norm=optim.max_grad_norm,
        micro_batch_size=train.micro_batch_size,
        world_size=world.size,
        num_parameters=sum(parameter.numel() for parameter in module.parameters()),
        optimizer=optim.name,
    )
    return Engine(module, optimizer, config)


def resume(checkpoints: Checkpoints, engine: Engine, say: Callable[[str], None]) -> Counters:
    """Counters of the newest checkpoint that verifies, its state restored; new ones when there is none."""
    return Counters(**restore(checkpoints, engine, say))


def restore(
    checkpoints: Checkpoints,
    state: State,
    say: Callable[[str], None],
    place: Callable[[Mapping[str, Any]], str] | None = None,
) -> dict[str, Any]:
    """The same for any state and any counters, which are {} when there is no checkpoint.

    place: where such counters are, in words, if their checkpoint's number does not tell.
    """
    resumed = checkpoints.resume(state)
    if resumed is None:
        if (checkpoints.folder.parent / METRICS_FILE).exists():
            say(f"there is no checkpoint in {checkpoints.folder}: beginning again with the first step")
        return {}
    for line in resumed.set_aside:
        say(f"set aside, not verified: {line}")
    where = "" if place is None else f", {place(resumed.counters)}"
    say(f"resuming from {resumed.path}{where}")
    if resumed.resharded is not None:
        say(f"its state was resharded: {resumed.resharded}")
    return resumed.counters


def save_and_leave(
    checkpoints: Checkpoints, engine: Engine, counters: Counters, progress: Progress
) -> NoReturn:
    """Save and end the process, because all ranks were told to stop."""
    save(checkpoints, engine, counters)
    progress.log(f"told to stop: saved at step {counters.step}; the same command goes on from there")
    raise SystemExit(STOPPED_EXIT_CODE)


def save(checkpoints: Checkpoints, engine: Engine, counters: Counters) -> None:
    """Commit a checkpoint of this moment, unless there is one."""
    checkpoints.save(counters.step, engine, asdict(counters), best_step=counters.best_step)


def advance(counters: Counters, outcome: StepOutcome, tokens: float, trained: float) -> Counters:
    """The counters after one more step."""
    return replace(
        counters,
        step=counters.step + 1,
        applied=counters.applied + outcome.applied,
        skipped_in_a_row=0 if outcome.applied else counters.skipped_in_a_row + 1,
        num_tokens=counters.num_tokens + int(tokens),
        num_trained_tokens=counters.num_trained_tokens + int(trained),
    )


def with_best(counters: Counters, held_out_loss: float) -> Counters:
    """The counters with this step as the best one, if it is; smaller is better."""
    if not held_out_loss < (math.inf if counters.best_loss is None else counters.best_loss):
        return counters
    return replace(counters, best_step=counters.step, best_loss=held_out_loss)


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after `step`."""
    return every > 0 and step % every == 0


class SaveClock:
    """When a checkpoint is due because so many minutes went by since the last one (0: never).

    The first rank's clock decides. All ranks learn of it in the sum over ranks that opens each step anyway:
    clocks that differ would have some of them save and the others not.
    """

    def __init__(self, minutes: float, world: World, now: Callable[[], float] = time.monotonic) -> None:
        """now: seconds on a clock that never goes back."""
        self._seconds, self._now = minutes * 60, now
        self._decides = world.is_rank0 and minutes > 0
        self._last = now()

    @property
    def asks(self) -> bool:
        """Whether this rank wants a checkpoint now; never any but the first."""
        return self._decides and self._now() - self._last >= self._seconds

    def restart(self) -> None:
        """There is a checkpoint of this moment."""
        self._last = self._now()


def metrics_of_step(path: Path, step: int) -> dict[str, float]:
    """What was logged at a step, of training and of evaluation; a resume may have had nothing left to do."""
    lines = [line for line in read_metrics(path) if line["step"] == step]
    return {name: value for line in lines for name, value in line.items() if name != "step"}


def probe_of(
    example: TokenizedExample | TokenizedPrompt, device: torch.device, longest: int = 256
) -> torch.Tensor:
    """The start of a document, int64 [1, N]: what an exported model is compared with the live one on."""
    return torch.from_numpy(example.input_ids[:longest].astype(np.int64))[None].to(device)


def record(
    metrics: Mapping[str, float],
    counters: Counters,
    outcome: StepOutcome,
    places: Callable[[], Sequence[str]],
    engine: Engine,
    dtype: Dtype,
    tracker: Tracker,
    progress: Progress,
) -> None:
    """Log and show a step's metrics; say so when it was skipped. places: where its rows came from."""
    tracker.log(metrics, counters.step)
    progress.update(
        counters.step,
        loss=metrics["loss"],
        tokens_per_second=metrics["perf/tokens_per_second"],
        mfu=metrics.get("perf/mfu"),
    )
    if not outcome.applied:
        report_skipped(counters, places(), metrics["loss"], engine.loss_scale, dtype, progress)


def report_skipped(
    counters: Counters,
    places: Sequence[str],
    loss: float,
    loss_scale: float,
    dtype: Dtype,
    progress: Progress,
    *,
    unit: str = "step",
    key: str = "optim.lr",
) -> None:
    """Say which rows a skipped step had; UserError after too many in a row.

    unit: what is counted, where a run has more than one network that learns. key: of its learning rate.
    """
    log.warning("%s %d skipped, loss %s, rows %s", unit, counters.step, loss, ", ".join(places))
    if dtype is Dtype.fp16 and math.isfinite(loss) and loss_scale > 1:
        return  # fp16 looks for its loss scale by overflowing
    progress.log(
        f"{unit} {counters.step}: loss {loss:.4g}, its gradient is not finite; skipped on all ranks "
        f"(its rows are named in logs/rank_0.log)"
    )
    if counters.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise UserError(
            f"{counters.skipped_in_a_row} {unit}s in a row were not finite, up to {unit} {counters.step}",
            hint=f"none of them changed the weights: lower {key}, use model.dtype=bf16 or fp32, "
            "or look at the rows named in the step's logs/rank_0.log",
        )


def swapped_warning(
    metrics: Mapping[str, float], accuracy: str, margin: str, *, step: Step, pairs: int
) -> str | None:
    """What to say when answers that people rejected ended above those they chose, and hardly by chance.

    Held-out pairs show it when their columns, or the others', are swapped. Where all rows are swapped alike,
    the model learns that order and nothing can show it. accuracy, margin: names of the metrics that hold the
    share of the pairs in the right order and the mean difference of rewards; pairs: how many those are of.
    """
    share, mean = metrics.get(accuracy, 1.0), metrics.get(margin, 0.0)
    if mean >= 0 or chance_of_so_few(share, pairs) >= SURPRISE:
        return None
    key = f"{step.value}.data"
    return (
        f"warning: at the end the rejected answers have higher rewards than the chosen ones ({margin} "
        f"{mean:.3g}; {share:.1%} of {pairs:,} pairs are in the right order): are the columns chosen and "
        f"rejected swapped, in {key}.eval_path or in one of {key}.sources?"
    )


def skipped_warning(
    counters: Counters, dtype: Dtype, step: Step, *, unit: str = "step", key: str = "optim.lr"
) -> str | None:
    """What to say of steps that changed nothing because their gradient was not finite; fp16 has some.

    unit, key: as in `report_skipped`, the key without its step.
    """
    skipped = counters.step - counters.applied
    if not skipped or dtype is Dtype.fp16:
        return None
    return (
        f"warning: {skipped} of {counters.step} {unit}s were skipped, because their gradients were not "
        f"finite: the training diverged; lower {step.value}.{key}"
    )
