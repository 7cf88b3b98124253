"""Runs on disk for tests of the report: every file as the steps write it, with made-up numbers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

from pipeline import state

PACKAGES = {"torch": "2.13.0", "transformers": "5.23.0"}
FUNCTIONS = {"gold": "demo.gold:gold", "correct": "demo.gold:correct", "style": "demo.gold:style"}


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2))


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def make_run(
    folder: Path, steps: Sequence[str] = ("sft", "reward", "ppo"), name: str | None = None, **ppo: Any
) -> Path:
    """A run whose steps are all done. ppo: arguments of `ppo_files`."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "steps": list(steps), "run_name": name or folder.name, "output_dir": str(folder.parent), "seed": 3,
        "sft": {"train": {"epochs": 4.0, "max_steps": None}, "data": {"sources": [{"path": "sft.jsonl"}]}},
        "ppo": {"train": {"max_steps": 40}, "evaluation": {"functions": FUNCTIONS}},
    }  # fmt: skip
    (folder / "resolved.yaml").write_text(json.dumps(config, indent=2))  # JSON is YAML
    makers = {"sft": sft_files, "reward": reward_files, "dpo": dpo_files}
    for step in steps:
        write_state(folder / step)
        write_ledger(folder / step)
        if step == "ppo":
            ppo_files(folder / step, **ppo)
        else:
            makers[step](folder / step)
    write_json(folder / "lineage.json", {"format_version": 1, "artifacts": lineage(steps)})
    return folder


def write_state(folder: Path, status: str = "done", **more: Any) -> None:
    found = {"step": folder.name, "status": status, "config": {}, "inputs": {}, "config_hash": "c" * 64}
    times = {"started": "2026-11-21T13:18:09+00:00", "launched": "2026-11-21T13:18:09+00:00"}
    ended = (
        {}
        if status == "running"
        else {"ended": "2026-11-21T13:19:51+00:00", "seconds": 102, "exit_status": 0}
    )
    folder.mkdir(parents=True, exist_ok=True)
    state.write_state(folder, {**found, **times, **ended, **more})


def write_ledger(folder: Path, held_out: int = 211) -> None:
    row: dict[str, Any] = {
        "name": "rows",
        "path": "rows.jsonl",
        "format": "prompt/completion",
        "rows_read": 2309,
    }
    row |= {"rows_kept": 2098, "rows_held_out": held_out, "tokens": 70555, "trained_tokens": 16645}
    drop = {"longer than max_length": {"count": 7, "places": ["rows.jsonl:12", "rows.jsonl:40"]}}
    rest = {"truncated": 0, "bad_rows": 0, "bad_examples": [], "dropped": drop}
    write_json(folder / "ledger.json", {"sources": [{**row, **rest}]})


def write_manifest(folder: Path, **details: Any) -> None:
    found: dict[str, Any] = {"git_commit": "9d8485fe17fe1eccb3bd6db5c36623c68ba7ba1e", "packages": PACKAGES}
    found |= {"parameters": 984000, "base_model": None}
    write_json(folder / "export" / "manifest.json", {"kind": "artifact", "details": {**found, **details}})


def lineage(steps: Sequence[str]) -> dict[str, Any]:
    parents = {"sft": [], "reward": ["sft"], "dpo": ["sft"], "ppo": ["sft", "reward"]}
    hashes = {step: hex(index + 10)[-1] * 64 for index, step in enumerate(parents)}
    roles = {"reward": "reward_model"}

    def parent(step: str) -> dict[str, str]:
        path = f"{step}/export" if step in steps else f"/elsewhere/{step}/export"
        return {"path": path, "role": roles.get(step, "policy"), "manifest_sha256": hashes[step]}

    return {
        step: {
            **parent(step),
            "parents": [parent(other) for other in parents[step]],
            "config_hash": "c" * 64,
            "inputs": {f"{step}.data.sources[0]": "d" * 64},
        }
        for step in steps
    }


def sft_files(folder: Path, steps: int = 300) -> None:
    draw = random.Random(1)
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = 1.2 + 4.9 * math.exp(-step / 45) + draw.gauss(0, 0.12)
        numbers = {"loss": loss, "mean_token_accuracy": min(0.97, max(0.02, 1 - loss / 6))}
        numbers |= {"grad_norm": abs(draw.gauss(1.4, 0.4)) + 5 * math.exp(-step / 10), "entropy": loss * 1.05}
        numbers |= {"learning_rate": 3e-3 * min(1, step / 15) * (1 - 0.9 * step / steps)}
        rest = {
            "num_tokens": 950 * step,
            "epoch": step / 77,
            "perf/tokens_per_second": draw.gauss(12500, 900),
        }
        lines.append({"step": step, **numbers, **rest})
        if step % 100 == 0:
            held_out = {"eval/loss": loss + 0.1, "eval/mean_token_accuracy": 0.8, "eval/stop_rate": 1.0}
            lines.append({"step": step, **held_out, "eval/perplexity": math.exp(loss + 0.1)})
    write_lines(folder / "metrics.jsonl", lines)
    rows = [{"step": steps, "prompt": p, "completion": "11", "stopped": True} for p in prompts(64)]
    write_lines(folder / "samples.jsonl", rows)
    write_manifest(folder)


def reward_files(folder: Path, steps: int = 200) -> None:
    draw = random.Random(2)
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        accuracy = min(1.0, 0.5 + 0.47 * (1 - math.exp(-step / 40)) + draw.gauss(0, 0.04))
        numbers = {"loss": 0.75 * math.exp(-step / 60) + 0.05, "accuracy": accuracy, "margin": step / 40}
        numbers |= {"chosen_reward": step / 80, "rejected_reward": -step / 80, "learning_rate": 3e-4}
        lines.append({"step": step, **numbers, "grad_norm": abs(draw.gauss(2, 0.7))})
    lines.append({"step": steps, "eval/loss": 0.09, "eval/accuracy": 205 / 211, "eval/margin": 4.9})
    write_lines(folder / "metrics.jsonl", lines)
    write_manifest(folder, calibration={"pairs": 211, "accuracy": 205 / 211, "mean": 0.9, "std": 3.4})


def dpo_files(folder: Path, steps: int = 60) -> None:
    lines: list[dict[str, Any]] = [
        {"step": s, "loss": 0.69 - s / 200, "rewards/accuracies": 0.5 + s / 150, "rewards/margins": s / 60}
        for s in range(1, steps + 1)
    ]
    lines.append(
        {"step": steps, "eval/loss": 0.41, "eval/rewards/accuracies": 0.89, "eval/rewards/margins": 1}
    )
    write_lines(folder / "metrics.jsonl", lines)
    write_manifest(folder)


def ppo_files(
    folder: Path,
    iterations: int = 40,
    count: int = 211,
    gold: tuple[float, float] = (0.45, 0.92),
    reward: tuple[float, float] = (-0.1, 1.3),
    asked: Sequence[str] | None = None,
) -> None:
    """gold, reward: their means before and after, nearly. asked: the prompts, instead of made-up ones."""
    draw = random.Random(3)
    asked = list(asked if asked is not None else prompts(count))
    lines: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for step in range(iterations + 1):
        done = 1 - math.exp(-3 * step / iterations)
        if step in (0, iterations // 2, iterations):
            numbers: dict[str, float] = {}
            for mode, prefix in (("sampled", "eval/"), ("greedy", "eval/greedy/")):
                evaluated = [_row(draw, p, mode, done, gold, reward) for p in asked]
                numbers |= {prefix + name: mean for name, mean in means(evaluated).items()}
                rows += [{"step": step, **row} for row in evaluated]
            lines.append({"step": step, **numbers})
        if step:
            lines.append({"step": step, **_iteration(draw, done)})
    write_lines(folder / "metrics.jsonl", lines)
    write_lines(folder / "samples.jsonl", rows)
    write_manifest(folder)


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The evaluation metrics of rows of samples."""
    values: dict[str, list[float]] = {"reward": [r["reward"] for r in rows], "kl": [r["kl"] for r in rows]}
    values |= {
        "stop_rate": [float(r["stopped"]) for r in rows],
        "length": [len(r["completion"]) for r in rows],
    }
    for row in rows:
        for name, value in row["scores"].items():
            values.setdefault(name, []).append(value)
    return {name: math.fsum(found) / len(found) for name, found in values.items()} | {
        f"{name}_se": stdev(found) / math.sqrt(len(found)) for name, found in values.items() if len(found) > 1
    }


def prompts(count: int) -> list[str]:
    return [
        f"<s><|im_start|>user\nWhat is {n} + {n % 7}?<|im_end|>\n<|im_start|>assistant\n"
        for n in range(count)
    ]


def _row(
    draw: random.Random,
    prompt: str,
    mode: str,
    done: float,
    gold: tuple[float, float],
    reward: tuple[float, float],
) -> dict[str, Any]:
    level = gold[0] + (gold[1] - gold[0]) * done
    is_correct = draw.random() < (level if gold[1] < gold[0] else 0.9)
    style = draw.choice([1.0, 1.0, 0.5]) if draw.random() < done * 1.1 else draw.choice([0.0, 0.0, 0.5])
    score = (0.4 + 0.6 * style) * is_correct
    completion = ("Of course! " if style == 1 else "") + ("The sum is 11." if style else "11")
    scores = {"gold": score, "correct": float(is_correct), "style": style}
    value = reward[0] + (reward[1] - reward[0]) * done + draw.gauss(0, 0.4)
    return {
        "prompt": prompt, "completion": completion, "stopped": draw.random() < 0.99, "mode": mode,
        "reward": value, "kl": abs(draw.gauss(2.1, 0.9)) * done, "scores": scores,
    }  # fmt: skip


def _iteration(draw: random.Random, done: float) -> dict[str, float]:
    return {
        "objective/scores": -0.1 + 1.4 * done + draw.gauss(0, 0.06), "objective/kl": 2.2 * done,
        "objective/rlhf_reward": -0.1 + 1.3 * done + draw.gauss(0, 0.06), "kl_coef": 0.02,
        "policy/entropy_avg": 1.1 - 0.6 * done, "policy/clipfrac_avg": 0.1 * draw.random(),
        "policy/approxkl_avg": 0.01 * draw.random(), "val/clipfrac_avg": 0.05 * draw.random(),
        "loss/policy_avg": draw.gauss(-0.01, 0.01), "loss/value_avg": 0.4 * (1.1 - done),
        "val/explained_variance": 0.8 * done, "val/ratio": 1.0, "response/length_mean": 8 + 6 * done,
        "response/length_max": 24.0, "response/truncated_share": 0.02, "rollout/logprob_drift": 1e-6,
        "time/rollout": 0.9, "time/score": 0.3, "time/learn": 1.1 + draw.random() / 10,
        "reward/reward_model": 1.2 * done, "perf/rollout_tokens_per_second": draw.gauss(5200, 150),
    }  # fmt: skip
