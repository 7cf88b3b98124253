"""The iterations of PPO: where the run is, and what surrounds the parts of an iteration.

Knows when to stop, to save, to evaluate and to warn; what an iteration does is written in train.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import NoReturn

from common.data.stored import PromptDataset
from common.phases import enter
from common.runtime.distributed import STOPPED_EXIT_CODE, seed_everything
from common.training.checkpoint import Stateful, StatefulGroup
from common.training.ema import ExponentialMovingAverage, swapped_in
from common.training.loop import check_length, early_stopping_on_all_ranks, is_due, stopping_line
from common.training.session import Session, restore
from step3_ppo.config import PPOConfig
from step3_ppo.evaluate import Evaluation
from step3_ppo.lengths import ExpectedLengths
from step3_ppo.loss import UpdateSums
from step3_ppo.metrics import held_out_line
from step3_ppo.minibatches import Minibatch
from step3_ppo.networks import Networks
from step3_ppo.rollout import Experience, Sampler
from step3_ppo.state import PPOCounters, Unfinished
from step3_ppo.update import Outcome, report_skipped
from step3_ppo.watchdogs import Watchdogs


class Iterations:
    """Where a run is, with all that a checkpoint holds.

    counters: of iterations and updates. lengths: expected of responses. experience: the responses of the
    iteration that is not finished. learned: the sums of its updates so far, over all ranks.
    """

    def __init__(
        self,
        session: Session,
        ppo: PPOConfig,
        networks: Networks,
        sampler: Sampler,
        evaluation: Evaluation | None,
        *,
        prompts: int,
        total_steps: int,
        updates: int,
    ) -> None:
        """Resumes from the newest checkpoint that verifies. prompts: of the data set. updates: of an
        iteration, at most."""
        self._session, self._ppo, self._networks, self._sampler = session, ppo, networks, sampler
        self._evaluation, self._total_steps, self._updates = evaluation, total_steps, updates
        actor = networks.actor.engine
        self.average = None if ppo.ema_decay is None else ExponentialMovingAverage(actor, ppo.ema_decay)
        self._unfinished = Unfinished(writes=session.world.is_rank0)
        self.lengths = ExpectedLengths(prompts, writes=session.world.is_rank0)
        critic = None if networks.critic is None else networks.critic.engine
        parts: dict[str, Stateful | None] = {
            "actor": actor, "experience": self._unfinished, "critic": critic, "average": self.average,
            "lengths": self.lengths,
        }  # fmt: skip
        self._state = StatefulGroup(**{name: part for name, part in parts.items() if part is not None})
        self._checkpoints = session.checkpoints
        restored = restore(
            self._checkpoints, self._state, session.say, lambda stored: PPOCounters.of(stored).place
        )
        self.counters = PPOCounters.of(restored or {"kl_coef": ppo.kl.coef})
        check_length(self.counters.step, total_steps, session.step, unit="iterations")
        self.learned = UpdateSums.of(self.counters.sums)
        self._watchdogs = Watchdogs(ppo, session.job.model.dtype, self.counters.watchdogs)

    @property
    def experience(self) -> Experience | None:
        """The responses of the iteration that is not finished, scored; None before."""
        return self._unfinished.experience

    @experience.setter
    def experience(self, filled_in: Experience | None) -> None:
        self._unfinished.experience = filled_in

    @property
    def goes_on(self) -> bool:
        """Whether there is another iteration: not after the last, nor when the evaluations got no better, nor
        where a checkpoint is exported."""
        is_exported = self._session.taken_from is not None
        return self.counters.step < self._total_steps and not self._is_over and not is_exported

    @property
    def _is_over(self) -> bool:
        return self.counters.watched.is_over(self._ppo.train.stop_when)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Progress and metrics are open; before the first iteration there is an evaluation."""
        session, counters = self._session, self.counters
        with session.tracked(self._total_steps, counters.step, resumed=not counters.is_fresh):
            if counters.is_fresh:
                self._evaluate()
                session.progress.restart()
            yield

    def begin(self) -> int:
        """Begin an iteration, or go on with an unfinished one; its number, from 0."""
        enter("step", self.counters.step + 1)
        self._networks.eval()
        return self.counters.step

    def agree(self) -> None:
        """Before an update all ranks agree on whether to save or to stop, and seed it."""
        session, counters = self._session, self.counters
        _, stopping, saving = session.all_reduce()
        if stopping:
            self.leave()
        if saving:
            self._save()
        seed_everything(session.job.seed, counters.step, counters.update, session.world.rank)

    def leave(self) -> NoReturn:
        """Save and end the process: all ranks were told to stop."""
        self._save()
        self._checkpoints.finish()
        self._session.progress.log(
            f"told to stop: saved in iteration {self.counters.step + 1}; the same command goes on there"
        )
        raise SystemExit(STOPPED_EXIT_CODE)

    def after_update(
        self, outcome: Outcome, seen: UpdateSums, minibatch: Minibatch, rows: PromptDataset
    ) -> dict[str, float]:
        """Count an update, and say so when it was skipped; its means over all ranks.

        seen: sums over this rank's part of the update. rows: the data set of its prompts.
        """
        assert self.experience is not None
        if self.average is not None and outcome.actor is not None and outcome.actor.applied:
            self.average.update()
        total = seen.all_reduced()
        self.learned.add(total)
        means = total.means()
        if self.counters.update == 0:
            self.counters = replace(self.counters, first_ratio_error=means.get("val/ratio_off"))
        self.counters = self.counters.after_update(outcome.actor, outcome.critic)
        if outcome.is_skipped:
            asked = [self.experience.responses[index].prompt_id for index in minibatch.responses]
            places = [rows.place(prompt_id) for prompt_id in dict.fromkeys(asked)]
            dtype, warn = self._session.job.model.dtype, self._session.warn
            report_skipped(outcome, self.counters, self._networks, means, places, dtype, warn)
        return means

    def finish(self, kl_coef: float) -> None:
        """Count the iteration. kl_coef: of the next one."""
        assert self.experience is not None
        self.counters = self.counters.after_iteration(self.experience, kl_coef)
        self.experience, self.learned = None, UpdateSums()

    def record(self, metrics: dict[str, float]) -> None:
        """Log and show an iteration, warn of what looks wrong; evaluate and save where it is due."""
        session, step = self._session, self.counters.step
        session.tracker.log(metrics, step)
        session.progress.update(
            step, tokens_per_second=metrics.get("perf/tokens_per_second"),
            numbers={"reward": metrics["objective/scores"], "KL": metrics.get("objective/kl")},
        )  # fmt: skip
        for line in self._watchdogs.look(step, metrics):
            session.warn(f"warning: {line}")
        is_last = step == self._total_steps
        if is_due(step, session.train_config.eval_every) or is_last:
            self._evaluate()
        if is_due(step, session.train_config.save_every) or is_last or self._is_over:
            self._save()
        if self._is_over:
            session.progress.log(stopping_line(step, self._ppo.train.stop_when, unit="iteration"))

    def _evaluate(self) -> None:
        """Measure the policy that would be exported now, on held-out prompts."""
        if self._evaluation is None:
            return
        enter("evaluate")
        session, step = self._session, self.counters.step
        self._networks.eval()
        with swapped_in(self.average):
            held_out, samples = self._evaluation(self._networks, self._sampler)
        watched = early_stopping_on_all_ranks(session, self.counters.watched, held_out)
        self.counters = replace(self.counters, watched=watched)
        session.tracker.log(held_out, step)
        session.tracker.log_samples(samples, step)
        session.progress.log(held_out_line(step, held_out))
        for line in self._watchdogs.look_at_evaluation(step, held_out):
            session.warn(f"warning: {line}")

    def _save(self) -> None:
        """Commit a checkpoint of this moment, also between two updates of an iteration."""
        counters = self.counters
        now = replace(counters, sums=self.learned.state(), watchdogs=self._watchdogs.state())
        number = counters.step * self._updates + counters.update
        self._checkpoints.save(number, self._state, asdict(now), best_step=None)
        self._session.save_clock.restart()
