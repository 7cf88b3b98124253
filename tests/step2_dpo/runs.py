"""Tiny DPO runs for tests: a policy made at random, pairs, the job, and its start on one rank or several."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from common.config import Dtype, ModelConfig, SourceConfig, TokenizerConfig
from common.runtime.tracking import read_metrics
from common.tracking_config import WandbMode
from step2_dpo.config import DPOJob
from tests.packed import packed_lm
from tests.programs.live_logits import keep_live
from tests.runs import LLAMA, finish, write_job


def make_policy(folder: Path, tokenizer: Path, seed: int = 0, **config: Any) -> Path:
    """Export a random model as a policy artifact to `folder`; one that is there is overwritten in place."""
    import shutil

    import torch

    from common.model.loading import load_model
    from common.model.tokenizer import load_tokenizer
    from common.training.export import ask_live, export_model

    settings = ModelConfig(
        config={**LLAMA, **config}, tokenizer=TokenizerConfig(path=str(tokenizer)), dtype=Dtype.fp32
    )
    loaded = load_tokenizer(settings)
    model = load_model(settings, loaded, seed=seed, device=torch.device("cpu"))
    probe = ask_live(packed_lm(model.eval()), torch.arange(3, 20)[None])
    shutil.rmtree(folder, ignore_errors=True)
    return export_model(model, None, loaded, folder, probe, details={})


def pairs(count: int = 30) -> list[dict[str, str]]:
    """Sums with a right and a wrong answer of different lengths, the same each time."""
    generator, rows = random.Random(5), []
    for _ in range(count):
        a, b = generator.randrange(100), generator.randrange(100)
        thought = " so".join([""] * generator.randrange(1, 8))
        wrong = a + b + generator.randrange(1, 9)
        rows.append(
            {
                "prompt": f"What is {a} + {b}?",
                "chosen": f"{thought} {a + b}".strip(),
                "rejected": f"it is{thought} {wrong}",
            }
        )
    return rows


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_job(folder: Path, policy: Path, **train: Any) -> DPOJob:
    """The smallest job that does everything. `train`: fields of `dpo.train`."""
    job = DPOJob(run_name="tiny", output_dir=str(folder / "runs"), seed=3)
    job.model.dtype = Dtype.fp32
    job.dpo.policy = str(policy)
    rows = folder / "pairs.jsonl"
    job.dpo.data.sources = [SourceConfig(path=str(rows if rows.exists() else write_rows(rows, pairs())))]
    job.dpo.data.max_length, job.dpo.data.eval_fraction = 96, 0.2
    job.dpo.data.cache_dir = str(folder / "cache")
    job.dpo.optim.lr = 1e-3
    job.dpo.sampling.num_prompts, job.dpo.sampling.max_new_tokens = 3, 4
    job.tracking.wandb = WandbMode.off
    defaults = {"global_batch_size": 6, "micro_batch_size": 2, "max_steps": 5}
    for name, value in {**defaults, **train}.items():
        setattr(job.dpo.train, name, value)
    return job


def run_job(job: DPOJob, run_dir: Path, ranks: int = 1, *, code: int = 0) -> str:
    """Run the job to its end; returns what was printed."""
    return finish(write_job(job, run_dir), ranks, dpo, code=code)


def lines_of(run_dir: Path, name: str = "loss") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that have this metric."""
    return [line for line in read_metrics(run_dir / "dpo" / "metrics.jsonl") if name in line]


def series(run_dir: Path, name: str) -> list[float]:
    return [line[name] for line in lines_of(run_dir, name)]


# programs of a rank


def dpo(config: str, *extra: str) -> int:
    """`python -m step2_dpo --config CONFIG ...` in this process."""
    from step2_dpo.__main__ import main

    sys.argv = ["step2_dpo", "--config", config, *extra]
    return main()


def dpo_with_live_logits(config: str) -> int:
    """The same; saves live_logits.pt."""
    keep_live(config, "logits")
    return dpo(config)


def dpo_killed(config: str, moment: str, rank: int) -> int:
    """The same, of which this rank does not survive `moment` (see tests/programs/killed.py)."""
    import os

    from tests.programs import killed

    if int(os.environ["RANK"]) == rank:
        if moment == "before the reference is kept":
            from step2_dpo import reference

            reference._write = killed.die
        else:
            killed._prepare(moment)
    return dpo(config)
