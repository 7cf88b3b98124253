"""The surroundings of a recipe: ranks, stop signal, console, metrics, checkpoints, export.

loop.py (PPO: iterations.py) decides when to save, evaluate and stop; a step's train.py does its work.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from common.artifacts import MANIFEST, Artifact, file_sha256
from common.compiling import ALONE
from common.config import DataConfig, JobConfig, ModelConfig, SamplingConfig, to_plain
from common.data.batches import BatchPlan
from common.data.dataset_types import DatasetType
from common.data.types import TokenizedExample, TokenizedPrompt
from common.decoding.sampling import sample_completions, stop_rate
from common.errors import UserError
from common.handoff import TakenFrom, load_named, parent_record
from common.model.adapters import reach, unwrapped
from common.model.architecture import HeadSpec
from common.model.compiled import settled
from common.model.loading import load_model
from common.model.packed import PackedCausalLM, PackedModel, refuse_unsliced
from common.model.partition import node_reading, share_of
from common.model.router_balance import routers_of
from common.model.tokenizer import terminators_of
from common.phases import enter
from common.rates import few_steps
from common.runtime.distributed import (
    StopSignal,
    World,
    all_reduce_sum,
    broadcast_from_rank0,
    close_world,
    init_world,
    seed_everything,
    wait_for_rank0,
)
from common.runtime.progress import Progress
from common.runtime.tracking import METRICS_FILE, Tracker, read_metrics
from common.stage import Input, Step
from common.training.checkpoint import Checkpoints, Stateful
from common.training.engine import Engine
from common.training.export import ask_live, export_model
from common.training.export_stream import stream_weights
from common.training.learner import Learner, build_learner
from common.training.rehearsal import rehearse_export
from common.training.step_data import Rows, StepData, batch_plan, load_data
from common.training.training_record import origin_of, training_record
from common.training_config import OptimConfig, TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

FinalLines = Callable[[Mapping[str, float]], Iterable[str | None]]
"""Makes the closing lines for the user from the last step's metrics."""
ExtraDetails = Callable[[Mapping[str, float]], Mapping[str, Any]]
"""Makes further details of the manifest from the same metrics."""

WRITING_SECONDS = 60.0
"""That the end of a step waits for a checkpoint that is being written, when an error ends it."""


class SaveClock:
    """When a checkpoint is due because so many minutes went by since the last one (0: never).

    Rank 0's clock decides, and all ranks learn of it in the all-reduce that opens each step anyway: with
    clocks of their own some ranks would save and others not.
    """

    def __init__(self, minutes: float, world: World, now: Callable[[], float] = time.monotonic) -> None:
        """now: seconds on a clock that never goes back."""
        self._seconds, self._now = minutes * 60, now
        self._decides = world.is_rank0 and minutes > 0
        self._last = now()

    @property
    def asks(self) -> bool:
        """Whether this rank wants a checkpoint now; never any but rank 0."""
        return self._decides and self._now() - self._last >= self._seconds

    def restart(self) -> None:
        self._last = self._now()


class Session:
    """One step of a run, on this rank.

    Joins the process group, listens for the stop signal and seeds. `progress` and `tracker` are there within
    `tracked()`; until then, and before anything is trained, the stop signal ends the process at once.
    """

    progress: Progress
    tracker: Tracker
    save_clock: SaveClock

    def __init__(self, job: JobConfig, step: Step, train_config: TrainConfig, run_dir: Path) -> None:
        """train_config: of the step's loop. The step's files are under `run_dir/<step>`."""
        self.job, self.step, self.train_config, self.run_dir = job, step, train_config, run_dir
        self.folder = run_dir / step.value
        self.taken_from = TakenFrom.read(self.folder)
        self._base_revision: str | None = None
        self.world = init_world(job.launch.sequence_parallel)
        self.stop = StopSignal()
        seed_everything(job.seed)
        self.say = print if self.world.is_rank0 else logging.getLogger(f"rlhf.{step.value}").info

    def all_reduce(self, counts: Sequence[float] = ()) -> tuple[list[float], bool, bool]:
        """The sums of `counts` over all ranks, whether to stop, and whether to save: the same on all of them.

        Commits a checkpoint that all ranks have written meanwhile. UserError on all ranks when the step's
        folder was removed: their work could not be saved.
        """
        is_removed = self.world.is_rank0 and not self.folder.exists()
        flags = (self.stop.received, self.save_clock.asks, is_removed, self.checkpoints.is_written)
        *sums, stopping, saving, removed, written = all_reduce_sum([*counts, *flags])
        if removed:
            raise UserError(
                f"{self.folder} was removed while the step was running",
                hint="a run needs its folder until it ends; the same command begins again",
            )
        if written == self.world.size:
            self.checkpoints.finish()
        return sums, bool(stopping), bool(saving)

    def load_artifact(self, named: str | None, taken: Input, key: str | None = None) -> Artifact:
        """The verified artifact at `named`, the value of `key` (by default the step's own). The controller
        has filled in the path of an earlier step's artifact."""
        key = key or f"{self.step.value}.{taken.value}"
        return broadcast_from_rank0(self.world, lambda: load_named(named or "", taken.role, key))

    def load_base_artifact(self, model: ModelConfig) -> dict[Input, Artifact]:
        """The verified policy at `model.path`, if that is an artifact; else empty."""
        if model.path is None or not (Path(model.path) / MANIFEST).exists():
            return {}
        return {Input.policy: self.load_artifact(model.path, Input.policy, "model.path")}

    def load_data(
        self,
        data: DataConfig,
        kind: DatasetType[Rows],
        tokenizer: PreTrainedTokenizerFast,
        *,
        policy: Artifact | None = None,
        folder: Path | None = None,
    ) -> StepData[Rows]:
        """The step's rows; see `step_data.load_data`. folder: of the ledger, by default the step's."""
        return load_data(
            self.job, self.step, data, kind, tokenizer, folder or self.folder, self.world, self.say,
            policy=policy,
        )  # fmt: skip

    def batch_plan(self, data: DataConfig, *, share_prefix: bool = True) -> BatchPlan:
        """How the rows become this rank's batches."""
        return batch_plan(self.job, data, self.train_config, self.world, share_prefix=share_prefix)

    def load_network(
        self, head: HeadSpec, model: ModelConfig, tokenizer: PreTrainedTokenizerFast, max_length: int
    ) -> PreTrainedModel:
        """The network that `model` names, on this rank's device; first a small one with this head is
        exported.

        max_length: tokens of the longest document.
        """
        self.rehearse_export(model, head)
        device, seed = self.world.device, self.job.seed
        if self.step in ALONE:
            model = settled(model, device, self.job.deepspeed.stage)
        share = share_of(self.job.deepspeed.stage)
        network = load_model(
            model, tokenizer, head, seed=seed, device=device, max_length=max_length, share=share,
            node=node_reading(self.job.launch),
        )  # fmt: skip
        refuse_unsliced(network, self.job.launch, self.world.size)
        if model.router_aux_loss_coef:
            routers_of(unwrapped(network))
        self.say_adapted_layers(network)
        self._base_revision = getattr(unwrapped(network).config, "_commit_hash", None)
        return network

    def rehearse_export(self, model: ModelConfig, head: HeadSpec) -> None:
        """UserError when a trained model could not be exported; see `rehearsal`. Loading it begins here."""
        enter("model")
        broadcast_from_rank0(self.world, lambda: rehearse_export(model, head, self.say))

    def say_adapted_layers(self, network: PreTrainedModel) -> None:
        if reached := reach(network):
            self.say(reached)

    def build_learner(
        self, module: PackedModel, optim: OptimConfig, *, peak_lr: float, steps: int
    ) -> Learner:
        """The module under ZeRO with its optimizer; says which learning rates it has."""
        learner = build_learner(
            module, self.job, self.train_config, optim, self.world, peak_lr=peak_lr, steps=steps
        )
        self.say(f"learning rate: {learner.rates.in_words()}")
        if few := few_steps(self.train_config, steps, self.step.value):
            self.say(f"note: {few}")
        return learner

    @cached_property
    def checkpoints(self) -> Checkpoints:
        """Of this step. With a network from the hub they belong to its commit."""
        return Checkpoints(
            self.folder / "checkpoints", keep=self.train_config.keep_checkpoints, world=self.world,
            base_revision=self._base_revision,
            background=self.train_config.saves_beside(gpu=self.world.device.type == "cuda"),
        )  # fmt: skip

    @contextmanager
    def tracked(self, total_steps: int, done: int, *, resumed: bool) -> Iterator[None]:
        """Progress and metrics are open, and a stop is deferred to the next step; in the end all ranks part.

        done: steps of an earlier process; resumed: whether there was one.
        """
        rank0, name = self.world.is_rank0, self.step.value
        with (
            Progress(total_steps, label=name, done=done, enabled=rank0) as self.progress,
            Tracker(
                name, self.job.run_name, self.folder, self.job.tracking, to_plain(self.job),
                done if resumed else None, enabled=rank0, say=self.progress.log,
            ) as self.tracker,
        ):  # fmt: skip
            self.stop.deferred = True
            self.save_clock = SaveClock(self.train_config.save_minutes, self.world)
            try:
                yield
            finally:
                self.checkpoints.settle(WRITING_SECONDS)
        close_world()

    def sample(
        self,
        module: PackedCausalLM,
        engine: Engine,
        tokenizer: PreTrainedTokenizerFast,
        prompts: Sequence[np.ndarray],
        sampling: SamplingConfig,
        step: int,
    ) -> dict[str, float]:
        """Complete held-out prompts (int32 [T] each), log the samples, and measure how many stop."""
        if not prompts:
            return {}
        samples = sample_completions(
            module.base(), tokenizer, prompts, terminators_of(tokenizer), sampling, self.world,
            seed=self.job.seed, is_partitioned=engine.zero_stage == 3,
        )  # fmt: skip
        self.tracker.log_samples([asdict(sample) for sample in samples], step)
        return {"eval/stop_rate": stop_rate(samples)}

    def warn(self, line: str) -> None:
        """Show a warning, and send it as an alert where alerts are on."""
        self.progress.log(line)
        self.tracker.alert(line.removeprefix("warning: "))

    def begin_export(self) -> None:
        """Training is over and saved: from here on a stop signal ends the process at once. A collective."""
        self.checkpoints.finish()
        self.stop.deferred = False
        enter("export")

    def export(
        self,
        module: PackedModel,
        engine: Engine,
        tokenizer: PreTrainedTokenizerFast,
        documents: Sequence[torch.Tensor],
        *,
        steps: int,
        total_steps: int,
        parents: Mapping[Input, Artifact],
        data: Mapping[str, Any],
        counters: Mapping[str, Any],
        final_lines: FinalLines,
        extra_details: ExtraDetails = lambda final: {},
    ) -> None:
        """Export the trained model to `<step>/export`, checked against its answers to `documents`.

        documents: int64 [T] each, of the run; one for a policy. steps: their number, of total_steps. parents:
        the artifacts that training started from; data: fingerprints of the rows; counters: where the run
        ended. A
        collective; `begin_export` comes before.
        """
        engine.forget_optimizer()
        engine.eval()
        model: Any = module.model
        probe = ask_live(module, documents)
        rank0, folder = self.world.is_rank0, self.folder / "export"
        streamed = stream_weights(engine, model, folder, writes=rank0) if engine.zero_stage == 3 else None
        weights = engine.full_state_dict() if streamed is None else None
        if rank0:
            before, final = (metrics_of_step(self.folder / METRICS_FILE, step) for step in (0, steps))
            for line in filter(None, final_lines(final)):
                self.progress.log(line)
            details = {
                "parents": [
                    parent_record(parent.path, self.run_dir, taken) for taken, parent in parents.items()
                ],
                "resolved_config_hash": (
                    file_sha256(self.run_dir / "resolved.yaml")
                    if self.taken_from is None
                    else self.taken_from.resolved_config_hash
                ),
                "data": data,
                "progress": counters,
                "metrics": final,
                "origin": origin_of(self.job.model, self._base_revision, parents.get(Input.policy)),
                "training": training_record(
                    self.job,
                    self.step,
                    self.folder,
                    before,
                    total_steps=total_steps,
                    adapters=hasattr(model, "peft_config"),
                    taken_from=self.taken_from,
                ),
                **extra_details(final),
            }
            export_model(
                model, weights, tokenizer, folder, probe,
                details=details, say=self.progress.log, streamed=streamed,
            )  # fmt: skip
            self.tracker.log_artifact(folder, module.role.value, file_sha256(folder / MANIFEST))
            self.tracker.finish(summary=final)
        wait_for_rank0(self.world, "export")


def restore(
    checkpoints: Checkpoints,
    state: Stateful,
    say: Callable[[str], None],
    place: Callable[[Mapping[str, Any]], str] = lambda counters: "",
) -> dict[str, Any]:
    """Counters of the newest checkpoint that verifies, `state` restored; {} when there is no checkpoint.

    place: where such counters are, in words, if their checkpoint's number does not tell.
    """
    resumed = checkpoints.resume(state)
    if resumed is None:
        if (checkpoints.folder.parent / METRICS_FILE).exists():
            say(f"there is no checkpoint in {checkpoints.folder}: beginning again with the first step")
        return {}
    for line in resumed.set_aside:
        say(f"set aside, not verified: {line}")
    say(", ".join(filter(None, [f"resuming from {resumed.path}", place(resumed.counters)])))
    if resumed.resharded is not None:
        say(f"its state was resharded: {resumed.resharded}")
    return resumed.counters


def metrics_of_step(path: Path, step: int) -> dict[str, float]:
    """The metrics logged at a step, by training and by evaluation. Read from the file: a resumed run may have
    had no step left."""
    lines = [line for line in read_metrics(path) if line["step"] == step]
    return {name: value for line in lines for name, value in line.items() if name != "step"}


def probe_of(
    example: TokenizedExample | TokenizedPrompt, device: torch.device, longest: int = 256
) -> list[torch.Tensor]:
    """The start of a document, one int64 [T]: the exported policy is compared with the live one on it."""
    return [torch.from_numpy(example.input_ids[:longest].astype(np.int64)).to(device)]
