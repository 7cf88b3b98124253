"""Tiny jobs of every step for the fake device, and the process that runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config import CheckpointingPolicy, Dtype, LoraConfig, Offload
from step1_sft.config import SFTJob
from step2_dpo.config import DPOJob
from step2_reward.config import RewardJob
from step3_ppo.config import PPOJob
from tests.runs import Base
from tests.step2_dpo import runs as dpo
from tests.step2_reward import runs as reward
from tests.step3_ppo import runs as ppo

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = 3
MICRO_BATCHES = 2
"""Of an optimizer step."""
MOE: dict[str, Any] = {
    "model_type": "qwen3_moe", "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
TRAINING = ("step", "backward", "update")
"""The phases of an optimizer step."""


@dataclass(frozen=True)
class Shape:
    """How a step is run. model: fields of the model's config."""

    size: int = 1
    stage: int = 1
    dtype: Dtype = Dtype.bf16
    offload_optimizer: bool = False
    offload_param: bool = False
    hpz: int = 1
    lora: bool = False
    checkpointing: bool = False
    selective: bool = False
    compile: bool = False
    model: tuple[tuple[str, Any], ...] = ()
    shared: int = 1  # ranks that share each row

    def put_into(self, job: Any) -> None:
        job.model.dtype, job.model.gradient_checkpointing = self.dtype, self.checkpointing
        job.model.compile = self.compile
        if self.selective:
            job.model.checkpointing_policy = CheckpointingPolicy.selective
        job.model.lora = LoraConfig(enabled=self.lora, r=4, alpha=8)
        job.launch.sequence_parallel = self.shared
        job.deepspeed.stage, job.deepspeed.hpz_partition_size = self.stage, self.hpz
        job.deepspeed.offload_optimizer = Offload.cpu if self.offload_optimizer else Offload.none
        job.deepspeed.offload_param = Offload.cpu if self.offload_param else Offload.none


@dataclass
class Outcome:
    """What came of a case. syncs: (phase, step, what, site, count); as in `record.Record.plain`. kernels: as
    in `kernels.Kernels.plain`, where they were counted."""

    status: Any
    printed: str
    passes: list[list[int]] = field(default_factory=list)
    syncs: list[list[Any]] = field(default_factory=list)
    collectives: list[list[Any]] = field(default_factory=list)
    pageable: list[list[Any]] = field(default_factory=list)
    peak: int = 0
    pinned_peak: int = 0
    peak_site: str = ""
    kernels: list[list[Any]] = field(default_factory=list)

    def syncs_of(self, step: int, phases: tuple[str, ...] = TRAINING) -> Counter[str]:
        """By what waits and where, without line numbers: `what, file function`."""
        found: Counter[str] = Counter()
        for phase, at, what, site, count in self.syncs:
            if at == step and phase in phases:
                found[f"{what}: {without_lines(site)}"] += count
        return found

    def pageable_of(self, step: int) -> set[str]:
        """Where a step copies to the device from memory that is not pinned: `file function`."""
        return {without_lines(at[2]) for at in self.pageable if at[1] == step and at[0] in TRAINING}


def without_lines(site: str) -> str:
    return " <- ".join(f"{part.split(':')[0]} {part.split(' ')[-1]}" for part in site.split(" <- "))


class Fake:
    """The process of `rank.py`, and what it needs: rows, a tokenizer, a policy and a reward model."""

    def __init__(self, folder: Path) -> None:
        self.base = Base.make(folder)
        self.folder, self._number = folder, 0
        self._artifacts: dict[str, ppo.Artifacts] = {}
        self._process: subprocess.Popen[str] | None = None
        self._known: dict[Any, Outcome] = {}

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def artifacts(self, shape: Shape) -> ppo.Artifacts:
        name = json.dumps(shape.model)
        if name not in self._artifacts:
            folder = self.folder / f"artifacts {len(self._artifacts)}"
            self._artifacts[name] = ppo.make_artifacts(folder, self.base.tokenizer, **dict(shape.model))
        return self._artifacts[name]

    def job(self, step: str, shape: Shape) -> Any:
        """The smallest job of a step: nothing is held out, nothing sampled but what is learned from."""
        train = {"max_steps": STEPS, "save_every": 0, "eval_every": 0, "micro_batch_size": 2}
        train["global_batch_size"] = 2 * MICRO_BATCHES * shape.size // shape.shared
        job: SFTJob | RewardJob | DPOJob | PPOJob
        if step == "sft":
            job = self.base.job(**train)
            job.model.config.update(dict(shape.model))
            job.sft.data.eval_fraction, job.sft.sampling.num_prompts = 0.0, 0
        elif step == "ppo":
            job = ppo.make_job(self.folder, self.artifacts(shape), **train)
            rollout = job.ppo.rollout
            rollout.prompts, rollout.samples_per_prompt = train["global_batch_size"], 1
            rollout.max_new_tokens, rollout.slots = 4, 3
            job.ppo.data.eval_fraction, job.ppo.ppo_epochs = 0.0, 1
        else:
            made = {"reward": reward, "dpo": dpo}[step].make_job(
                self.folder, self.artifacts(shape).policy, **train
            )
            job = made
            data = getattr(job, step).data
            data.eval_fraction, data.packing = 0.0, False  # a row for each pair, and so two micro-batches
            if isinstance(job, DPOJob):
                job.dpo.sampling.num_prompts = 0
        shape.put_into(job)
        return job

    def run(
        self, step: str, shape: Shape = Shape(), *, change: str | None = None, job: Any = None
    ) -> Outcome:
        """Run a step of this shape, once. change: a function of `mutations` that is called before."""
        key = (step, shape, change)
        if job is not None or key not in self._known:
            self._number += 1
            run_dir = self.folder / "runs" / str(self._number)
            dpo.write_job(job or self.job(step, shape), run_dir)
            case = {
                "step": step,
                "config": str(run_dir / "resolved.yaml"),
                "size": shape.size,
                "compile": shape.compile,
                "change": change,
            }
            outcome = self._ask(case)
            if job is not None:
                return outcome
            self._known[key] = outcome
        return self._known[key]

    def run_large(self, case: dict[str, Any]) -> Outcome:
        """Steps of real sizes; see `large.train`."""
        return self._ask(case)

    def _ask(self, case: dict[str, Any]) -> Outcome:
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(case) + "\n")
        process.stdin.flush()
        if not (answer := process.stdout.readline()):
            self._process = None  # the next case has another
            raise AssertionError((self.folder / "errors.txt").read_text()[-3000:])
        return Outcome(**json.loads(answer))

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.gpu_fake.rank"],
                cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=(self.folder / "errors.txt").open("w"),
            )  # fmt: skip
            assert self._process.stdout is not None
            said = self._process.stdout.readline()
            assert said == "ready\n", (self.folder / "errors.txt").read_text()[-3000:]
        return self._process
