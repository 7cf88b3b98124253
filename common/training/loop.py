"""A recipe's loop: counters, cadence, stopping, skipped steps. Knows nothing of the loss."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic

import torch

from common.artifacts import Artifact
from common.config import Dtype
from common.data.batches import Batches
from common.errors import UserError
from common.model.packed import PackedModel
from common.phases import enter
from common.runtime.distributed import STOPPED_EXIT_CODE, broadcast_from_rank0, seed_everything
from common.runtime.performance import performance, training_flops_per_token
from common.stage import Input, Step
from common.text import did_you_mean
from common.training.ahead import PATIENCE, Ahead
from common.training.engine import StepOutcome
from common.training.learner import Learner
from common.training.session import ExtraDetails, FinalLines, Session, restore
from common.training.step_data import Rows, StepData
from common.training_config import Exported, StopWhenConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_SKIPPED_IN_A_ROW = 5
log = logging.getLogger("rlhf.loop")


SMALLER_IS_BETTER = ("loss", "perplexity", "error", "kl")
"""In the last part of a metric's name."""


def smaller_is_better(metric: str) -> bool:
    """Whether a smaller value of a metric is better, by its name."""
    return any(word in metric.rpartition("/")[2] for word in SMALLER_IS_BETTER)


@dataclass(frozen=True)
class EarlyStopping:
    """The state of early stopping: the best value of its metric, and the evaluations since."""

    metric: str | None = None
    best: float | None = None
    waited: int = 0

    def after(self, stop_when: StopWhenConfig, metrics: Mapping[str, float]) -> EarlyStopping:
        """The state after an evaluation. UserError names its metrics when the watched one is missing."""
        if (metric := stop_when.metric) is None:
            return self
        if (value := metrics.get(metric)) is None:
            raise UserError(
                f"train.stop_when.metric={metric} is not measured on held-out rows",
                hint=did_you_mean(metric, metrics, f"measured are {', '.join(sorted(metrics))}"),
            )
        if self.metric != metric or self.best is None or math.isnan(self.best):
            return EarlyStopping(metric, value)
        is_better = value < self.best if smaller_is_better(metric) else value > self.best
        return (
            EarlyStopping(metric, value) if is_better else EarlyStopping(metric, self.best, self.waited + 1)
        )

    def is_over(self, stop_when: StopWhenConfig) -> bool:
        """Whether the step ends here."""
        is_watched = stop_when.metric is not None and self.metric == stop_when.metric
        return is_watched and self.waited >= stop_when.patience


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
    watched: EarlyStopping = field(default_factory=lambda: EarlyStopping())

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Counters:
        """From a checkpoint; one of an earlier version watches nothing."""
        return cls(**{**stored, "watched": EarlyStopping(**stored.get("watched", {}))})


def advance(counters: Counters, outcome: StepOutcome, tokens: float, trained: float) -> Counters:
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


class Loop(Generic[Rows]):
    """The optimizer steps of a recipe with one network: where the run is, and what surrounds each step.

    A recipe calls `resume`, and within `training()` in each step `begin`, `all_reduce`, its forward and
    backward passes, `update`, `log` and `evaluate_and_save`; then `export`.
    """

    def __init__(
        self,
        session: Session,
        learner: Learner,
        batches: Batches,
        data: StepData[Rows],
        total_steps: int,
        evaluate_held_out: Callable[[Rows, int], tuple[dict[str, float], str]],
    ) -> None:
        """batches: of `data.train`. evaluate_held_out: measures the model that would be exported after a step
        on held-out rows; returns metrics, among them `eval/loss`, and a line to show.
        """
        self._session, self._learner, self._batches = session, learner, batches
        self._ahead = Ahead(batches, total_steps, session.world.device)
        self._data: StepData[Rows] = data
        self._evaluate_held_out: Callable[[Rows, int], tuple[dict[str, float], str]] = evaluate_held_out
        self.total_steps = total_steps
        model: Any = learner.engine.module.model
        self._flops_per_token = training_flops_per_token(model)
        self._checkpoints = session.checkpoints
        self.counters = Counters()
        self._began, self._epoch, self._saving = 0.0, 0.0, False
        self._balance: Mapping[str, float] = {}

    def resume(self) -> None:
        """Go on from the newest checkpoint that verifies, if there is one. A collective."""
        self.counters = Counters.of(restore(self._checkpoints, self._learner.engine, self._session.say))
        check_length(self.counters.step, self.total_steps, self._session.step)

    @property
    def goes_on(self) -> bool:
        """Whether there is another step: not after the last, nor when the evaluations got no better, nor
        where a checkpoint is exported."""
        is_exported = self._session.taken_from is not None
        return self.counters.step < self.total_steps and not self._is_over and not is_exported

    @property
    def _is_over(self) -> bool:
        return self.counters.watched.is_over(self._session.train_config.stop_when)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Progress and metrics are open; before the first step there is an evaluation.

        At a good end the process group is closed: everything that needs the other ranks happens within.
        """
        session, done = self._session, self.counters.step
        with session.tracked(self.total_steps, done, resumed=done > 0):
            self._learner.engine.train()
            if done == 0:
                self._evaluate()  # what training starts from; no checkpoint, so never the best
                session.progress.restart()
            try:
                yield
            finally:
                self._ahead.settle(PATIENCE)

    def begin(self) -> list[Any]:
        """Begin a step and seed its random draws; returns this rank's micro-batches."""
        enter("step", self.counters.step + 1)
        self._began = time.perf_counter()
        draws = (self._session.job.seed, self.counters.step, self._session.world.rank)
        seed_everything(*draws)
        micro_batches, self._epoch = self._ahead.take(self.counters.step)
        self._balance = self._learner.balance_routers(micro_batches, self._session.world)
        if self._balance:
            seed_everything(*draws)  # what counted experts and what is trained have the same dropout
        return micro_batches

    def all_reduce(self, counts: Sequence[float]) -> list[float]:
        """The sums of `counts` over all ranks: the one collective before the first backward pass.

        It also carries whether to save after this step and whether to stop. Told to stop, all ranks save and
        leave by SystemExit; else the next step's micro-batches are begun.
        """
        session = self._session
        sums, stopping, self._saving = session.all_reduce(counts)
        if stopping:
            self._save()
            self._checkpoints.finish()
            session.progress.log(
                f"told to stop: saved at step {self.counters.step}; the same command goes on from there"
            )
            raise SystemExit(STOPPED_EXIT_CODE)
        self._ahead.make(self.counters.step + 1)
        return sums

    def update(self, tokens: float, trained: float | None = None) -> None:
        """Update the weights. tokens: of the step's documents, on all ranks. trained: tokens that carry the
        loss (None: the loss is not over tokens).
        """
        self._learning_rate = self._learner.learning_rate(self.counters.applied)
        self._outcome = self._learner.step(self.counters.applied)
        self.counters = advance(self.counters, self._outcome, tokens, tokens if trained is None else trained)
        self._tokens, self._counts_trained = tokens, trained is not None
        self._seconds = time.perf_counter() - self._began

    def log(self, metrics: Mapping[str, float], *, padding: float, computed: float | None = None) -> None:
        """Log and show the step, and say so when it was skipped.

        metrics: of the step, among them `loss`. padding, computed: positions over all ranks, of filler and of
        documents; a shared prompt is computed once (None: as many as tokens).
        """
        session, world, dtype = self._session, self._session.world, self._session.job.model.dtype
        counters, tokens, flops = self.counters, self._tokens, self._flops_per_token
        if computed is not None:
            flops = flops * computed / tokens
        else:
            computed = tokens
        seen: dict[str, float] = {
            **metrics,
            **self._balance,
            "grad_norm": self._outcome.grad_norm,
            "learning_rate": self._learning_rate,
            "num_tokens": counters.num_tokens,
            **({"num_trained_tokens": counters.num_trained_tokens} if self._counts_trained else {}),
            "epoch": self._epoch,
            "perf/padding_share": padding / (computed + padding),
            **performance(flops, tokens, self._seconds, dtype.value, world),
        }
        session.tracker.log(seen, counters.step)
        session.progress.update(
            counters.step, loss=seen["loss"], tokens_per_second=seen["perf/tokens_per_second"],
            mfu=seen.get("perf/mfu"),
        )  # fmt: skip
        if not self._outcome.applied:
            self._ahead.settle()
            rows = self._batches.rows(counters.step - 1)
            places = [self._data.train.place(int(index)) for row in rows for index in row]
            scale = self._learner.engine.loss_scale
            report_skipped(counters, places, seen["loss"], scale, dtype, session.warn)

    def _evaluate(self) -> float:
        """Measure the model that would be exported now; returns its held-out loss, inf without held-out
        rows."""
        if self._data.held_out is None:
            return math.inf
        enter("evaluate")
        metrics, line = self._evaluate_held_out(self._data.held_out, self.counters.step)
        watched = early_stopping_on_all_ranks(self._session, self.counters.watched, metrics)
        self.counters = replace(self.counters, watched=watched)
        self._session.tracker.log(metrics, self.counters.step)
        self._session.progress.log(line)
        return metrics["eval/loss"]

    def evaluate_and_save(self) -> None:
        """Evaluate and save after a step, when due; the best step so far and the last one are always
        saved."""
        train, step = self._session.train_config, self.counters.step
        is_last = step == self.total_steps
        if is_due(step, train.eval_every) or is_last:
            held_out_loss = self._evaluate()  # which counts, too
            self.counters = with_best(self.counters, held_out_loss)
        is_last = is_last or self._is_over
        if is_due(step, train.save_every) or self._saving or self.counters.best_step == step or is_last:
            self._save()
        if self._is_over:
            self._ahead.settle(PATIENCE)  # with a step that does not come
            self._session.progress.log(stopping_line(step, train.stop_when))

    def export(
        self,
        module: PackedModel,
        tokenizer: PreTrainedTokenizerFast,
        documents: Sequence[torch.Tensor],
        *,
        parents: Mapping[Input, Artifact],
        final_lines: FinalLines = lambda final: [],
        extra_details: ExtraDetails = lambda final: {},
    ) -> None:
        """Export the model of the step that `train.export` names; see `Session.export`."""
        session = self._session
        self._take_exported()
        session.export(
            module, self._learner.engine, tokenizer, documents, steps=self.counters.step,
            total_steps=self.total_steps, parents=parents, data=self._data.fingerprints(),
            counters=asdict(self.counters),
            final_lines=lambda final: [
                *final_lines(final), skipped_warning(self.counters, session.job.model.dtype, session.step),
            ],
            extra_details=extra_details,
        )  # fmt: skip

    def _take_exported(self) -> None:
        """With `train.export=best` go back to the checkpoint of the best step. A collective."""
        best, session = self.counters.best_step, self._session
        if session.train_config.export is Exported.last or best == self.counters.step:
            return
        if best is None:
            session.progress.log(
                "warning: no held-out loss is finite, so that no step is best: the last is exported"
            )
            return
        self.counters = Counters.of(self._checkpoints.load(best, self._learner.engine))
        session.progress.log(
            f"exporting step {best}, the best on held-out rows: loss {self.counters.best_loss:.4f}"
        )

    def _save(self) -> None:
        """Commit a checkpoint of this moment, unless there is one."""
        counters = self.counters
        self._checkpoints.save(
            counters.step, self._learner.engine, asdict(counters), best_step=counters.best_step
        )
        self._session.save_clock.restart()


def early_stopping_on_all_ranks(
    session: Session, before: EarlyStopping, metrics: Mapping[str, float]
) -> EarlyStopping:
    """`EarlyStopping.after` as rank 0 has it, so that no rank goes on alone. A collective where one is
    watched."""
    stop_when = session.train_config.stop_when
    if stop_when.metric is None:
        return before
    return broadcast_from_rank0(session.world, lambda: before.after(stop_when, metrics))


def stopping_line(step: int, stop_when: StopWhenConfig, *, unit: str = "step") -> str:
    """The line for a step of the chain that ends early."""
    waited = f"{stop_when.metric} was not better in {stop_when.patience} evaluation(s)"
    return f"stopping after {unit} {step}: {waited} (train.stop_when)"


def check_length(done: int, total: int, step: Step, *, unit: str = "steps") -> None:
    """UserError when more steps are done than are asked for."""
    if done > total:
        raise UserError(
            f"{done} {unit} of {step.value} are done, and {total} are asked for",
            hint=f"{step.value}.train.max_steps={done}, or export an earlier checkpoint that is kept",
        )


def report_skipped(
    counters: Counters,
    places: Sequence[str],
    loss: float,
    loss_scale: float,
    dtype: Dtype,
    warn: Callable[[str], None],
    *,
    unit: str = "step",
    key: str = "optim.lr",
) -> None:
    """Say which rows a skipped step had; UserError after too many in a row.

    unit: the name of a step, where a run trains more than one network. key: of its learning rate.
    """
    log.warning("%s %d skipped, loss %s, rows %s", unit, counters.step, loss, ", ".join(places))
    if dtype is Dtype.fp16 and math.isfinite(loss) and loss_scale > 1:
        return  # fp16 looks for its loss scale by overflowing
    warn(
        f"{unit} {counters.step}: loss {loss:.4g}, its gradient is not finite; skipped on all ranks "
        f"(its rows are named in logs/rank_0.log)"
    )
    if counters.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise UserError(
            f"{counters.skipped_in_a_row} {unit}s in a row were not finite, up to {unit} {counters.step}",
            hint=f"none of them changed the weights: lower {key}, use model.dtype=bf16 or fp32, "
            "or look at the rows named in the step's logs/rank_0.log",
        )


def skipped_warning(
    counters: Counters, dtype: Dtype, step: Step, *, unit: str = "step", key: str = "optim.lr"
) -> str | None:
    """A warning about steps without an update, because their gradient was not finite; fp16 has some.

    unit, key: as in `report_skipped`, the key without its step.
    """
    skipped = counters.step - counters.applied
    if not skipped or dtype is Dtype.fp16:
        return None
    return (
        f"warning: {skipped} of {counters.step} {unit}s were skipped, because their gradients were not "
        f"finite: the training diverged; lower {step.value}.{key}"
    )
