"""Tiny SFT runs for tests: data, a tokenizer, the job, and its start on one rank or several."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import Dtype, JobConfig, SourceConfig, to_plain
from common.runtime.tracking import read_metrics
from common.tracking_config import WandbMode
from step1_sft.config import SFTJob
from tests import forked

LLAMA: Mapping[str, Any] = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}  # fmt: skip
VOCABULARY = 300
CHECKPOINT = (
    "counters.json", "layout.json", "manifest.json", "zero/mp_rank_00_model_states.pt",
    "zero/zero_pp_rank_0_mp_rank_00_optim_states.pt",
)  # fmt: skip
"""Files of a checkpoint of one network, on one rank at ZeRO 1 or 2."""
EXPORT = (
    "README.md", "chat_template.jinja", "config.json", "generation_config.json", "manifest.json",
    "model.safetensors", "tokenizer.json", "tokenizer_config.json",
)  # fmt: skip
"""Files of a policy's artifact."""


@dataclass(frozen=True)
class Base:
    """What all runs of a test session share."""

    folder: Path
    sources: tuple[Path, ...]
    tokenizer: Path

    @classmethod
    def make(cls, folder: Path) -> Base:
        """Write the rows and train the tokenizer."""
        from common.model.tokenizer import train_tokenizer

        sources = (folder / "sums.jsonl", folder / "words.jsonl")
        _write(sources[0], sums(40))
        _write(sources[1], words(24))
        texts = (json.dumps(row) for row in [*sums(40), *words(24)])
        train_tokenizer(texts, VOCABULARY).save_pretrained(folder / "tokenizer")
        return cls(folder, sources, folder / "tokenizer")

    def job(self, **train: Any) -> SFTJob:
        """The smallest job that does everything. `train`: fields of `sft.train`."""
        job = SFTJob(run_name="tiny", output_dir=str(self.folder / "runs"), seed=3)
        job.model.config = dict(LLAMA)
        job.model.tokenizer.path = str(self.tokenizer)
        job.model.dtype = Dtype.fp32
        job.sft.data.sources = [SourceConfig(path=str(path)) for path in self.sources]
        job.sft.data.max_length, job.sft.data.eval_fraction = 96, 0.2
        job.sft.data.cache_dir = str(self.folder / "cache")
        job.sft.optim.lr = 3e-3
        job.sft.sampling.num_prompts, job.sft.sampling.max_new_tokens = 3, 4
        job.tracking.wandb = WandbMode.off
        defaults = {"global_batch_size": 4, "micro_batch_size": 2, "max_steps": 6}
        for name, value in {**defaults, **train}.items():
            setattr(job.sft.train, name, value)
        return job

    def write(self, name: str, job: SFTJob) -> Path:
        """Write the job's resolved.yaml, as the controller would; returns the run's folder."""
        return write_job(job, self.folder / "runs" / name)

    def run(self, name: str, job: SFTJob, ranks: int = 1) -> Path:
        """Run the job to its end; returns the run's folder."""
        run_dir = self.write(name, job)
        finish(run_dir, ranks)
        return run_dir


def write_job(job: JobConfig, run_dir: Path) -> Path:
    """Write the job's resolved.yaml, as the controller would; returns the run's folder."""
    from omegaconf import OmegaConf

    run_dir.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(to_plain(job)), run_dir / "resolved.yaml")
    return run_dir


def start(run_dir: Path, ranks: int, program: Callable[..., int] = forked.sft, *more: Any) -> forked.Ranks:
    """Start the job that was written into `run_dir`."""
    return forked.start(program, (str(run_dir / "resolved.yaml"), *more), ranks, run_dir / "output.txt")


def finish(
    run_dir: Path, ranks: int, program: Callable[..., int] = forked.sft, *more: Any, code: int = 0
) -> str:
    """Start it and wait; every rank must end with `code`. Returns what was printed by this start."""
    output = run_dir / "output.txt"
    begin = output.stat().st_size if output.exists() else 0
    codes = start(run_dir, ranks, program, *more).finish()
    printed = output.read_text()[begin:]
    assert codes == [code] * ranks, f"exit {codes}\n{printed[-4000:]}"
    return printed


def wait_while(started: forked.Ranks, condition: Callable[[], bool]) -> None:
    """Return as soon as the condition is false; what was printed is shown when that takes too long."""
    has_time = started.patience()
    while condition():
        assert has_time(), started.output.read_text()[-3000:]
        time.sleep(0.002)


def dies(run_dir: Path, ranks: int, victim: int, program: Callable[..., int], *more: Any) -> None:
    """Start it; rank `victim` must kill itself. The other is then killed by its launcher."""
    started = start(run_dir, ranks, program, *more)
    wait_while(started, lambda: started.processes[victim].is_alive())
    started.kill()
    assert started.processes[victim].exitcode == -signal.SIGKILL, (run_dir / "output.txt").read_text()[-3000:]


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def training_lines(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that belong to optimizer steps."""
    return [line for line in read_metrics(run_dir / "sft" / "metrics.jsonl") if "loss" in line]


def evaluation_lines(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that belong to evaluations."""
    return [line for line in read_metrics(run_dir / "sft" / "metrics.jsonl") if "eval/loss" in line]


def sums(count: int) -> list[dict[str, str]]:
    """Questions with answers of different lengths, the same each time."""
    generator, rows = random.Random(1), []
    for _ in range(count):
        a, b = generator.randrange(100), generator.randrange(100)
        thought = " so".join([""] * generator.randrange(1, 12))
        rows.append({"question": f"What is {a} + {b}?", "answer": f"{thought} {a + b}".strip()})
    return rows


def words(count: int) -> list[dict[str, str]]:
    """Prompts to repeat a word."""
    generator, rows = random.Random(2), []
    for _ in range(count):
        word = "".join(generator.choice("abcde") for _ in range(generator.randrange(2, 9)))
        rows.append({"prompt": f"Say {word} twice.", "completion": f"{word} {word}"})
    return rows


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
