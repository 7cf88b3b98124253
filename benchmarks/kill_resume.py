"""Kill a run with SIGKILL again and again, resume it, and compare what is left with a run nobody touched.

    python -m benchmarks.kill_resume --kills 20
    python -m benchmarks.kill_resume --step dpo --kills 10      (or reward)

For 1 and 2 ranks and ZeRO 1, 2 and 3: one uninterrupted run of a small model with dropout, and one that is
killed `--kills` times at seeded moments: at start-up, in the middle of a step, and while a checkpoint is
being written. At the end the weights, the fp32 masters, the optimizer's state, the exported artifact and
every logged number (but for times) must be the same bits. Exit status 1 when any differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import write_results

ROOT = Path(__file__).resolve().parent.parent
SAVE_EVERY = 2


@dataclass(frozen=True)
class Point:
    """One combination."""

    ranks: int
    stage: int
    steps: int = 24
    step_name: str = "sft"


@dataclass
class Kills:
    """How many kills hit which moment, and how many attempts ended before theirs came."""

    startup: int = 0
    step: int = 0
    checkpoint: int = 0
    missed: int = 0

    @property
    def total(self) -> int:
        return self.startup + self.step + self.checkpoint


MODULES = {"sft": "step1_sft", "reward": "step2_reward", "dpo": "step2_dpo"}
CONTEXT, VOCABULARY = 128, 300
MODEL: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
    "attention_dropout": 0.1, "tie_word_embeddings": True,
}  # fmt: skip


def write_rows(path: Path, step_name: str = "sft") -> None:
    """Demonstrations, or preferences for the steps that take them."""
    rows = demonstrations() if step_name == "sft" else preferences()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def demonstrations(count: int = 96) -> Iterator[dict[str, str]]:
    """Questions and answers of different lengths, the same each time."""
    generator = random.Random(0)
    for _ in range(count):
        a, b = generator.randrange(1000), generator.randrange(1000)
        words = " ".join(
            generator.choice(["so", "then", "thus", "and"]) for _ in range(generator.randrange(20))
        )
        yield {"question": f"What is {a} + {b}?", "answer": f"{words} {a + b}"}


def preferences(count: int = 96) -> Iterator[dict[str, str]]:
    """The same questions, each with its answer and a wrong one of another length."""
    for number, row in enumerate(demonstrations(count)):
        wrong = f"{'well ' * (number % 7)}{number}"
        yield {"prompt": row["question"], "chosen": row["answer"], "rejected": wrong}


def make_policy(folder: Path, rows: Path) -> None:
    """A policy of random weights, its tokenizer trained on the rows."""
    from benchmarks.pairs_workload import export_as_policy
    from common.config import Dtype, ModelConfig, TokenizerConfig
    from common.models import load_tokenizer

    texts = [text for line in rows.read_text().splitlines() for text in json.loads(line).values()]
    own = TokenizerConfig(train_vocab_size=VOCABULARY)
    model = ModelConfig(config=dict(MODEL), tokenizer=own, dtype=Dtype.fp32)
    export_as_policy(model, load_tokenizer(model, lambda: iter(texts)), folder, CONTEXT)


def write_config(run_dir: Path, point: Point, data: Path, policy: Path | None = None) -> Path:
    """The resolved configuration that the ranks read, as the controller would write it.

    policy: the artifact that the steps after the first start from.
    """
    from omegaconf import OmegaConf

    from common.config import DeepSpeedConfig, Dtype, TokenizerConfig, WandbMode, to_plain

    job = new_job(point.step_name, run_name="killed", output_dir=str(run_dir.parent), seed=3)
    settings = getattr(job, point.step_name)
    if point.step_name == "sft":
        job.model.config = dict(MODEL)
        job.model.tokenizer = TokenizerConfig(train_vocab_size=VOCABULARY)
    else:
        settings.policy = str(policy)
    job.model.dtype = Dtype.bf16
    settings.data.path, settings.data.max_length = str(data), CONTEXT
    settings.data.cache_dir = str(run_dir / "cache")  # its own: what fills it may be killed, too
    settings.train.global_batch_size, settings.train.micro_batch_size = 6, 2
    settings.train.max_steps, settings.train.save_every, settings.train.eval_every = (
        point.steps, SAVE_EVERY, 8,
    )  # fmt: skip
    if hasattr(settings, "sampling"):
        settings.sampling.num_prompts, settings.sampling.max_new_tokens = 2, 4
    settings.optim.lr = 1e-2
    job.deepspeed = DeepSpeedConfig(stage=point.stage)
    job.tracking.wandb = WandbMode.off
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "resolved.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(to_plain(job))))
    return path


def new_job(step_name: str, **identity: Any) -> Any:
    """A job of the step, all settings at their defaults."""
    from step1_sft.config import SFTJob
    from step2_dpo.config import DPOJob
    from step2_reward.config import RewardJob

    return {"sft": SFTJob, "reward": RewardJob, "dpo": DPOJob}[step_name](**identity)


class Attempt:
    """All ranks of one start of the run, in a process group of their own."""

    def __init__(self, config: Path, point: Point) -> None:
        ranks = point.ranks
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        shared = {
            **os.environ, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        with (config.parent / "output.log").open("a") as output:
            self.processes = [
                subprocess.Popen(
                    [sys.executable, "-m", MODULES[point.step_name], "--config", str(config)],
                    env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )  # fmt: skip
                for rank in range(ranks)
            ]

    def is_running(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def finish(self) -> list[int]:
        return [process.wait(timeout=600) for process in self.processes]


def last_step(folder: Path) -> int:
    """The last step in metrics.jsonl."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return max((json.loads(line)["step"] for line in lines), default=0)
    except (OSError, ValueError):
        return 0


def strike(attempt: Attempt, folder: Path, generator: random.Random, kills: Kills) -> None:
    """Kill the attempt at a moment drawn from `generator`, unless it ends before."""
    kind = generator.choices(["startup", "step", "checkpoint"], [1, 5, 4])[0]
    before, count = last_step(folder), generator.randint(1, 3)
    delay = generator.uniform(0.0, 6.0 if kind == "startup" else 0.15)
    present = set((folder / "checkpoints").glob("step_*"))
    while attempt.is_running() and kind != "startup":
        if kind == "step" and last_step(folder) >= before + count:
            break
        partial = set((folder / "checkpoints").glob("step_*.tmp")) - present
        if kind == "checkpoint" and partial:
            delay /= 5  # a save of this model takes tens of milliseconds
            break
        time.sleep(0.001)
    time.sleep(delay)
    if attempt.is_running():
        setattr(kills, kind, getattr(kills, kind) + 1)
    else:
        kills.missed += 1
    attempt.kill()


def run_to_the_end(config: Path, point: Point) -> None:
    codes = Attempt(config, point).finish()
    if any(codes):
        raise RuntimeError(f"exit status {codes}:\n" + (config.parent / "output.log").read_text()[-3000:])


def run_and_kill(config: Path, point: Point, count: int, seed: int) -> Kills:
    """Start and kill until `count` kills have hit; then let it end."""
    kills, generator, folder = Kills(), random.Random(seed), config.parent / point.step_name
    while kills.total < count and last_step(folder) < point.steps:
        strike(Attempt(config, point), folder, generator, kills)
    run_to_the_end(config, point)
    return kills


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor and plain value in nested containers, by path."""
    if isinstance(value, dict):
        for key in value:
            yield from leaves(value[key], f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from leaves(item, f"{name}/{index}")
    else:
        yield name, value


def state_differences(one: Path, other: Path, steps: int, step_name: str = "sft") -> list[str]:
    """Names of everything that differs between the last checkpoints and the artifacts of two runs."""
    import torch
    from safetensors.torch import load_file

    differences = []
    checkpoints = [folder / step_name / "checkpoints" / f"step_{steps:08d}" for folder in (one, other)]
    files = [sorted(p.relative_to(c) for p in c.rglob("*") if p.is_file()) for c in checkpoints]
    if files[0] != files[1]:
        return [f"files: {sorted(set(files[0]) ^ set(files[1]))}"]
    tensors = 0
    for name in (file for file in files[0] if file.suffix == ".pt"):
        left, right = (dict(leaves(torch.load(c / name, weights_only=False))) for c in checkpoints)
        if left.keys() != right.keys():
            differences.append(f"{name}: other keys")
        for key in left.keys() & right.keys():
            if isinstance(left[key], torch.Tensor):
                tensors += 1
                same = torch.equal(left[key].float().nan_to_num(), right[key].float().nan_to_num())
                same = same and left[key].dtype == right[key].dtype
            else:
                same = left[key] == right[key] or not isinstance(left[key], int | float | str | bool)
            if not same:
                differences.append(f"{name}{key}")
    assert tensors > 10, "a comparison of nothing would always succeed"
    weights = [load_file(folder / step_name / "export" / "model.safetensors") for folder in (one, other)]
    differences += [f"export/{k}" for k in weights[0] if not torch.equal(weights[0][k], weights[1][k])]
    return differences


def metric_differences(one: Path, other: Path, step_name: str = "sft") -> list[str]:
    """Lines of metrics.jsonl and samples.jsonl that differ in more than times."""
    found = []
    for file in ("metrics.jsonl", "samples.jsonl"):
        if not any((folder / step_name / file).exists() for folder in (one, other)):
            continue  # a step that samples nothing
        rows = [
            [
                {k: v for k, v in json.loads(line).items() if not k.startswith("perf/")}
                for line in (folder / step_name / file).read_text().splitlines()
            ]
            for folder in (one, other)
        ]
        if len(rows[0]) != len(rows[1]):
            found.append(f"{file}: {len(rows[0])} and {len(rows[1])} lines")
        found += [
            f"{file} line {i + 1}: {a} {b}" for i, (a, b) in enumerate(zip(*rows, strict=False)) if a != b
        ]
    return found


def trial(folder: Path, point: Point, count: int, seed: int) -> tuple[Kills, list[str]]:
    """Both runs of one combination: the kills that hit, and what differs at the end."""
    rows, policy = folder / "rows.jsonl", folder / "policy"
    if not rows.exists():
        write_rows(rows, point.step_name)
        make_policy(policy, rows)
    name = f"ranks{point.ranks}-zero{point.stage}"
    whole, killed = (
        write_config(folder / f"{name}-{kind}", point, rows, policy) for kind in ("whole", "killed")
    )
    run_to_the_end(whole, point)
    kills = run_and_kill(killed, point, count, seed)
    differences = state_differences(whole.parent, killed.parent, point.steps, point.step_name)
    return kills, differences + metric_differences(whole.parent, killed.parent, point.step_name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", choices=tuple(MODULES), default="sft", help="which step is killed")
    parser.add_argument("--kills", type=int, default=20, help="kills per combination")
    parser.add_argument("--steps", type=int, default=160, help="optimizer steps of each run")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kill_resume_"))
    results = []
    for ranks in (1, 2):
        for stage in (1, 2, 3):
            point = Point(ranks, stage, arguments.steps, arguments.step)
            seed = arguments.seed + 10 * ranks + stage
            kills, differences = trial(folder, point, arguments.kills, seed)
            results.append({**vars(point), **vars(kills), "kills": kills.total, "differences": differences})
            print(json.dumps(results[-1]), flush=True)
    name = "kill_resume" if arguments.step == "sft" else f"kill_resume_{arguments.step}"
    write_results(name, {"save_every": SAVE_EVERY, "results": results})
    shutil.rmtree(folder)
    return int(any(result["differences"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
