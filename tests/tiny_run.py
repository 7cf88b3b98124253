"""Whole runs of a tiny model through the command line, for tests of launchers."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_SECONDS = 240.0


def sft(folder: Path, *, steps: int = 8, zero: int = 3) -> list[str]:
    """Overrides of an SFT run of so many steps that writes into `folder`/runs; its rows are written there."""
    generator = random.Random(1)
    rows = []
    for _ in range(64):
        a, b = generator.randrange(100), generator.randrange(100)
        rows.append({"question": f"What is {a} + {b}?", "answer": f"{a + b}"})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    return [
        "steps=[sft]", f"deepspeed=zero{zero}", f'output_dir="{folder}/runs"', "tracking.wandb=off",
        *(f"model.config.{key}={value}" for key, value in model.items()), "model.dtype=fp32",
        "model.tokenizer.train_vocab_size=300", f'sft.data.path="{folder}/sums.jsonl"',
        "sft.data.max_length=96", "sft.data.eval_fraction=0.1", f"sft.train.max_steps={steps}",
        "sft.train.global_batch_size=4", "sft.train.micro_batch_size=2", "sft.optim.lr=1e-3",
        "sft.sampling.num_prompts=0",
    ]  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    """Of a process that runs the pipeline on few threads."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "CUDA_VISIBLE_DEVICES": "",
        **more,
    }


def start(overrides: Sequence[str], more: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start `pipeline run`; what it prints, both streams together, is the process's stdout."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", *overrides],
        cwd=ROOT,
        env=environment(**(more or {})),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(overrides: Sequence[str], more: Mapping[str, str] | None = None, *, status: int = 0) -> str:
    """Run to the end, which must be `status`; returns what was printed."""
    process = start(overrides, more)
    try:
        printed = process.communicate(timeout=PATIENCE_SECONDS)[0]
    finally:
        process.kill()
    assert process.returncode == status, f"exit status {process.returncode}\n{printed[-4000:]}"
    return printed


def steps_done(run_dir: Path) -> int:
    """Optimizer steps of SFT that are logged."""
    path = run_dir / "sft" / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


def wait_until(condition: Callable[[], bool], explain: Callable[[], str]) -> None:
    """Return once it is so; what explains the wait is shown when that takes too long."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, explain()[-3000:]
        time.sleep(0.01)


def weights(run_dir: Path, step: str = "sft") -> dict[str, str]:
    """Hashes of the weights of a step's artifact, by file."""
    files = sorted((run_dir / step / "export").glob("*.safetensors"))
    assert files, f"{run_dir} has no weights of {step}"
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
