"""Kill a run with SIGKILL again and again, resume it, and compare what is left with a run nobody touched.

    python -m benchmarks.kill_resume --kills 20
    python -m benchmarks.kill_resume --step dpo --kills 10      (or reward, ppo)

For 1 and 2 ranks and ZeRO 1, 2 and 3: one uninterrupted run of a small model with dropout, and one that is
killed `--kills` times at seeded moments: at start-up, in the middle of a step (PPO: in its roll-out, scoring
and updates, whose moments are aimed at by how long they last in the uninterrupted run), and while a
checkpoint is being written. PPO is besides stopped by SIGTERM now and then, also between two updates of an
iteration, and must go on from there. At the end the weights, the fp32 masters, the optimizers' states, the
counters (PPO's KL coefficient is one), the exported artifact, every sample and every logged number (but for
times) must be the same bits. Exit status 1 when any differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measure import write_results
from launch import local
from launch.agent import children, exit_status
from launch.local import Job

SAVE_EVERY = 2


@dataclass(frozen=True)
class Point:
    """One combination."""

    ranks: int
    stage: int
    steps: int = 24
    step_name: str = "sft"
    beside: bool = False  # training goes on while a checkpoint is written


@dataclass
class Kills:
    """How many kills hit which moment, and how many attempts ended before theirs came."""

    hits: Counter[str] = field(default_factory=Counter)
    stopped: int = 0  # by SIGTERM, state saved
    missed: int = 0


MODULES = {"sft": "step1_sft", "reward": "step2_reward", "dpo": "step2_dpo", "ppo": "step3_ppo"}
PHASES = ("rollout", "score", "learn")
STEPS = {"ppo": 60}
"""Steps of a run where they are not 160: an iteration of PPO has six updates."""

Windows = Mapping[str, tuple[float, float]]
"""Seconds from the end of a step to the beginning and the end of each phase of the next."""
CONTEXT, VOCABULARY = 128, 300
MODEL: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
    "attention_dropout": 0.1, "tie_word_embeddings": True,
}  # fmt: skip


def write_rows(path: Path, step_name: str = "sft") -> None:
    """Preferences for the steps that take them, demonstrations for the others."""
    rows = preferences() if step_name in ("reward", "dpo") else demonstrations()
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
    from common.model.tokenizer import load_tokenizer

    texts = [text for line in rows.read_text().splitlines() for text in json.loads(line).values()]
    own = TokenizerConfig(train_vocab_size=VOCABULARY)
    model = ModelConfig(config=dict(MODEL), tokenizer=own, dtype=Dtype.fp32)
    export_as_policy(model, load_tokenizer(model, lambda: iter(texts)), folder, CONTEXT)


def make_reward_model(folder: Path, policy: Path) -> None:
    """A reward model of random weights that reads text as the policy does."""
    from benchmarks.ppo_workload import export_as_reward_model
    from common.config import Dtype, ModelConfig
    from common.model.tokenizer import load_tokenizer

    model = ModelConfig(path=str(policy), dtype=Dtype.fp32)
    export_as_reward_model(model, load_tokenizer(model), folder, CONTEXT)


def write_config(run_dir: Path, point: Point, data: Path, policy: Path | None = None) -> Path:
    """The resolved configuration that the ranks read, as the controller would write it.

    policy: the artifact that the steps after the first start from; PPO's reward model lies beside it.
    """
    from omegaconf import OmegaConf

    from common.config import DeepSpeedConfig, Dtype, TokenizerConfig, to_plain
    from common.tracking_config import WandbMode

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
    if point.step_name == "ppo":
        configure_ppo(settings, policy)
    if hasattr(settings, "sampling"):
        settings.sampling.num_prompts, settings.sampling.max_new_tokens = 2, 4
    settings.optim.lr = 1e-3 if point.step_name == "ppo" else 1e-2
    settings.train.async_save = point.beside
    job.deepspeed = DeepSpeedConfig(stage=point.stage)
    job.tracking.wandb = WandbMode.off
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "resolved.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(to_plain(job))))
    return path


def configure_ppo(settings: Any, policy: Path | None) -> None:
    """Everything that has a state: both optimizers, a coefficient that moves, an average; and several updates
    in an iteration, the last of each pass a short one."""
    from step3_ppo.config import KLConfig, KLController, RolloutConfig

    assert policy is not None
    settings.reward_model = str(policy.with_name("reward_model"))
    settings.rollout = RolloutConfig(prompts=8, samples_per_prompt=2, max_new_tokens=12, slots=4)
    settings.ppo_epochs, settings.ema_decay = 2, 0.9
    settings.kl = KLConfig(controller=KLController.adaptive, target=0.5, horizon=100.0)
    settings.evaluation.num_prompts = 2
    settings.critic.optim.lr = 1e-3


def new_job(step_name: str, **identity: Any) -> Any:
    """A job of the step, all settings at their defaults."""
    from step1_sft.config import SFTJob
    from step2_dpo.config import DPOJob
    from step2_reward.config import RewardJob
    from step3_ppo.config import PPOJob

    return {"sft": SFTJob, "reward": RewardJob, "dpo": DPOJob, "ppo": PPOJob}[step_name](**identity)


class Attempt:
    """One start of the run, as the controller starts it: several ranks under torchrun's agent."""

    def __init__(self, config: Path, point: Point, environment: Mapping[str, str] | None = None) -> None:
        """environment: what the ranks have beside this process's."""
        logs = config.parent / point.step_name / "logs"
        job = Job(MODULES[point.step_name], ("--config", str(config)), point.ranks, logs)
        own = {**local.environment(job), "OMP_NUM_THREADS": "1", **(environment or {})}
        with (config.parent / "output.log").open("a") as output:
            self._process = subprocess.Popen(
                local.command(job), env={**os.environ, **own}, stdin=subprocess.DEVNULL, stdout=output,
                stderr=output, start_new_session=True,
            )  # fmt: skip

    def is_running(self) -> bool:
        return self._process.poll() is None

    def ranks(self) -> dict[int, int]:
        """The process of each rank that is alive, where they are several."""
        found = {}
        for process in children(self._process.pid):
            with contextlib.suppress(OSError):
                values = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
                found.update({int(value[5:]): process for value in values if value.startswith(b"RANK=")})
        return found

    def kill(self) -> None:
        """SIGKILL to what watches the ranks: they die with it."""
        left = set(self.ranks().values())
        self._process.kill()
        self._process.wait()
        while any(is_alive(process) for process in left):
            time.sleep(0.01)

    def stop(self) -> int:
        """Tell all ranks to save their state and leave; returns the exit status."""
        self._process.terminate()
        return self.finish()

    def finish(self, seconds: float = 600.0) -> int:
        """The exit status: 128 + N where signal N killed a rank. subprocess.TimeoutExpired."""
        return exit_status(self._process.wait(seconds))


def is_alive(process: int) -> bool:
    """Whether the process is there and has not ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def last_step(folder: Path) -> int:
    """The last step in metrics.jsonl."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return max((json.loads(line)["step"] for line in lines), default=0)
    except (OSError, ValueError):
        return 0


def phase_windows(folder: Path) -> Windows:
    """When roll-out, scoring and updates take place in a step; empty for a step without them."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = [line for line in lines if "time/rollout" in line]
    windows, begin = {}, 0.0
    for phase in PHASES if timed else ():
        end = begin + statistics.median(line[f"time/{phase}"] for line in timed)
        windows[phase], begin = (begin, end), end
    return windows


def moments(windows: Windows) -> dict[str, int]:
    """Where kills are aimed at, and how often."""
    steps = {"rollout": 2, "score": 1, "learn": 3, "stop": 2} if windows else {"step": 5}
    return {"startup": 1, **steps, "checkpoint": 4}


def await_moment(attempt: Attempt, folder: Path, generator: random.Random, windows: Windows) -> str:
    """Return at a moment drawn from `generator`, or when the attempt ends before it; what kind it is of."""
    weights = moments(windows)
    (kind,) = generator.choices([*weights], [*weights.values()])
    before, count = last_step(folder), generator.randint(1, 3)
    window = windows.get("learn" if kind == "stop" else kind)
    delay = generator.uniform(*(window or (0.0, 6.0 if kind == "startup" else 0.15)))
    present = set((folder / "checkpoints").glob("step_*"))
    while attempt.is_running() and kind != "startup":
        done = last_step(folder)
        # a phase is aimed at where no checkpoint comes before it
        if kind != "checkpoint" and done >= before + count and (kind == "step" or done % SAVE_EVERY):
            break
        partial = set((folder / "checkpoints").glob("step_*.tmp")) - present
        if kind == "checkpoint" and partial:
            delay /= 5  # a save of this model takes tens of milliseconds
            break
        time.sleep(0.001)
    time.sleep(delay)
    return kind


def strike(attempt: Attempt, folder: Path, generator: random.Random, kills: Kills, windows: Windows) -> None:
    """Kill the attempt at a moment drawn from `generator`, or stop it in an update, unless it ends before."""
    from common.runtime.distributed import STOPPED_EXIT_CODE

    kind = await_moment(attempt, folder, generator, windows)
    if not attempt.is_running():
        kills.missed += 1
    elif kind == "stop":
        kills.stopped += attempt.stop() == STOPPED_EXIT_CODE
    else:
        kills.hits[kind] += 1
    attempt.kill()


def run_to_the_end(config: Path, point: Point) -> None:
    if (status := Attempt(config, point).finish()) != 0:
        raise RuntimeError(f"exit status {status}:\n" + (config.parent / "output.log").read_text()[-3000:])


def run_and_kill(config: Path, point: Point, count: int, seed: int, windows: Windows) -> Kills:
    """Start and kill until `count` kills have hit; then let it end."""
    kills, generator, folder = Kills(), random.Random(seed), config.parent / point.step_name
    while kills.hits.total() < count and last_step(folder) < point.steps:
        strike(Attempt(config, point), folder, generator, kills, windows)
    run_to_the_end(config, point)
    return kills


def last_checkpoint(folder: Path) -> int:
    """Its number; PPO counts updates in it, the other steps steps."""
    return max(int(place.name.removeprefix("step_")) for place in (folder / "checkpoints").glob("step_*"))


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
    """Names of everything that differs between the last checkpoints and the artifacts of two runs.

    steps: the number in the name of the last checkpoint.
    """
    import torch
    from safetensors.torch import load_file

    differences = []
    checkpoints = [folder / step_name / "checkpoints" / f"step_{steps:08d}" for folder in (one, other)]
    files = [sorted(p.relative_to(c) for p in c.rglob("*") if p.is_file()) for c in checkpoints]
    if files[0] != files[1]:
        return [f"files: {sorted(set(files[0]) ^ set(files[1]))}"]
    tensors = 0
    for name in files[0]:
        left, right = (contents(checkpoint / name) for checkpoint in checkpoints)
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


def contents(file: Path) -> dict[str, Any]:
    """Tensors and plain values of a checkpoint's file, by path; empty for its manifest, which has hashes."""
    import torch
    from safetensors.torch import load_file

    if file.suffix == ".pt":
        return dict(leaves(torch.load(file, weights_only=False)))
    if file.suffix == ".safetensors":
        return dict(leaves(load_file(file)))
    return dict(leaves(json.loads(file.read_text()))) if file.name == "counters.json" else {}


def metric_differences(one: Path, other: Path, step_name: str = "sft") -> list[str]:
    """Lines of metrics.jsonl and samples.jsonl that differ in more than times."""
    found = []
    for file in ("metrics.jsonl", "samples.jsonl"):
        if not any((folder / step_name / file).exists() for folder in (one, other)):
            continue  # a step that samples nothing
        rows = [
            [
                {k: v for k, v in json.loads(line).items() if not k.startswith(("perf/", "time/"))}
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
        if point.step_name == "ppo":
            make_reward_model(folder / "reward_model", policy)
    name = f"ranks{point.ranks}-zero{point.stage}"
    whole, killed = (
        write_config(folder / f"{name}-{kind}", point, rows, policy) for kind in ("whole", "killed")
    )
    run_to_the_end(whole, point)
    windows = phase_windows(whole.parent / point.step_name)
    kills = run_and_kill(killed, point, count, seed, windows)
    last = last_checkpoint(whole.parent / point.step_name)
    differences = state_differences(whole.parent, killed.parent, last, point.step_name)
    return kills, differences + metric_differences(whole.parent, killed.parent, point.step_name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", choices=tuple(MODULES), default="sft", help="which step is killed")
    parser.add_argument("--kills", type=int, default=20, help="kills per combination")
    parser.add_argument("--steps", type=int, help="steps of each run; by default 160, of PPO 60")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3], help="of ZeRO")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--beside", action="store_true", help="checkpoints are written beside training")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kill_resume_"))
    results = []
    for ranks in arguments.ranks:
        for stage in arguments.stages:
            steps = arguments.steps or STEPS.get(arguments.step, 160)
            point = Point(ranks, stage, steps, arguments.step, arguments.beside)
            seed = arguments.seed + 10 * ranks + stage
            kills, differences = trial(folder, point, arguments.kills, seed)
            counted = {
                **kills.hits,
                "stopped": kills.stopped,
                "missed": kills.missed,
                "kills": kills.hits.total(),
            }
            results.append({**vars(point), **counted, "differences": differences})
            print(json.dumps(results[-1]), flush=True)
    name = "kill_resume" if arguments.step == "sft" else f"kill_resume_{arguments.step}"
    name += "_beside" if arguments.beside else ""
    write_results(name, {"save_every": SAVE_EVERY, "results": results})
    shutil.rmtree(folder)
    return int(any(result["differences"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
