"""The real chain on a small pretrained model, on the CPU: `python -m benchmarks.real_chain`.

SmolLM2-135M-Instruct (`make pretrained`) goes through four runs of `experiment=smollm2` in fp32: SFT on some
hundred GSM8K solutions, a reward model and DPO on people's choices between two answers (HH, each with its
own share of the pairs), and GRPO on sums whose answers are checked. Each goes on from the policy of SFT.
Reads what the runs logged on held-out rows before and after, and the seconds from outside. Writes
`results/real_chain_smollm2.json`, and the tables with the machine as `.txt`. Exit status 1 when a bar is
missed. Sized for half an hour on two idle cores. Settings at the end of the command go to every run:
`'reward.optim.lr=1e-5'`.
"""

from __future__ import annotations

import argparse
import json
import operator
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import PROJECT, RESULTS, run_measured, table, write_results
from benchmarks.pairs_workload import DATA
from benchmarks.workload import GSM8K
from common.runtime.tracking import read_metrics

STEPS = ("sft", "reward", "dpo", "ppo")
MODEL = PROJECT / "models" / "smollm2"
PAIRS = DATA / "hh_rlhf" / "harmless_a.jsonl.gz"
SUMS, LARGEST = 400, 50
NAME = "real_chain_smollm2"

SETTINGS: Mapping[str, Sequence[str]] = {
    "sft": (
        "sft.data.max_length=512", "sft.data.eval_fraction=0.15", "sft.train.epochs=1",
        "sft.train.global_batch_size=4", "sft.train.eval_every=0", "sft.optim.lr=1e-4",
        "sft.sampling.num_prompts=4", "sft.sampling.max_new_tokens=64",
    ),
    "reward": (
        "reward.data.max_length=128", "reward.data.on_bad_row=skip", "reward.data.eval_fraction=0.14",
        "reward.data.stage_split={reward: 3, dpo: 1}", "reward.train.global_batch_size=16",
        "reward.train.micro_batch_size=4", "reward.train.eval_every=0", "reward.optim.lr=5e-5",
    ),
    "dpo": (
        "dpo.data.max_length=128", "dpo.data.on_bad_row=skip", "dpo.data.eval_fraction=0.32",
        "dpo.data.stage_split={reward: 3, dpo: 1}", "dpo.train.global_batch_size=16",
        "dpo.train.micro_batch_size=4", "dpo.train.eval_every=0", "dpo.optim.lr=2e-5",
        "dpo.sampling.num_prompts=0",
    ),
    "ppo": (
        "ppo.estimator=grpo", "ppo.rewards=[{function: 'step3_ppo.rewards.verifiable:gsm8k'}]",
        "ppo.missing_eos_penalty=0.2", "ppo.data.max_length=128", "ppo.data.eval_fraction=0.16",
        "ppo.rollout.prompts=8", "ppo.rollout.samples_per_prompt=8", "ppo.rollout.max_new_tokens=32",
        "ppo.train.max_steps=12", "ppo.train.global_batch_size=32", "ppo.train.micro_batch_size=8",
        "ppo.train.eval_every=0", "ppo.train.save_every=0", "ppo.optim.lr=1e-5",
        "ppo.kl.controller=fixed", "ppo.kl.placement=loss", "ppo.kl.coef=0.02",
        "ppo.evaluation.num_prompts=64",
    ),
}  # fmt: skip

FIGURES: Mapping[str, Sequence[str]] = {
    "sft": ("eval/loss", "eval/mean_token_accuracy"),
    "reward": ("eval/loss", "eval/accuracy", "eval/margin"),
    "dpo": ("eval/loss", "eval/rewards/accuracies", "eval/rewards/margins"),
    "ppo": ("eval/reward", "eval/greedy/reward", "eval/kl", "eval/length", "eval/stop_rate"),
}
"""What is read of each step's held-out rows, before and after."""

Seen = dict[str, Any]
"""A step's figures: `before` and `after` by metric, `held_out` rows, `usage`."""

BARS: Mapping[str, tuple[str, Callable[[Seen], float], Callable[[float, float], bool], float]] = {
    "held-out loss falls in SFT": ("sft", lambda s: risen(s, "eval/loss"), operator.lt, 0.0),
    "reward model orders more than 60 % of held-out pairs": (
        "reward", lambda s: s["after"]["eval/accuracy"], operator.gt, 0.6,
    ),
    "at least 100 of them": ("reward", lambda s: s["held_out"], operator.ge, 100),
    "DPO's held-out accuracy rises": ("dpo", lambda s: risen(s, "eval/rewards/accuracies"), operator.gt, 0.0),
    "GRPO's held-out reward rises": ("ppo", lambda s: risen(s, "eval/reward"), operator.gt, 0.0),
    "KL under 5 nats a response": ("ppo", lambda s: s["after"]["eval/kl"], operator.lt, 5.0),
}  # fmt: skip
"""By name: the step, its number, and how it compares with what is wanted."""


@dataclass(frozen=True)
class Given:
    """What the chain is run on, and where to."""

    model: Path
    gsm8k: Path
    pairs: Path
    folder: Path
    rows: int
    most_pairs: int


def main() -> int:
    """Run the steps one after the other, print tables and bars, write the record."""
    arguments = parse(sys.argv[1:])
    for needed in (arguments.model, arguments.gsm8k, arguments.pairs):
        if not needed.exists():
            raise SystemExit(f"{needed} is not there: see --help")
    with tempfile.TemporaryDirectory(prefix="real_chain_") as temporary:
        folder = (arguments.output_dir or Path(temporary)).resolve()
        given = Given(
            arguments.model.resolve(), arguments.gsm8k.resolve(), arguments.pairs.resolve(), folder,
            arguments.rows, arguments.most_pairs,
        )  # fmt: skip
        chain = {}
        for step in arguments.steps:
            chain[step] = run(step, given, arguments.overrides)
            print(rendered({step: chain[step]}) + "\n", flush=True)
    missed = missed_bars(chain)
    write(chain, missed, arguments.results)
    return 1 if missed else 0


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_chain")
    parser.add_argument("--model", type=Path, default=MODEL, help="`make pretrained` makes it")
    parser.add_argument("--gsm8k", type=Path, default=GSM8K, help="JSONL of question and answer")
    parser.add_argument("--pairs", type=Path, default=PAIRS, help="JSONL of chosen and rejected transcripts")
    parser.add_argument("--rows", type=int, default=260, help="of GSM8K, some of which are held out")
    parser.add_argument("--most-pairs", type=int, default=1500, help="for the reward model and DPO together")
    parser.add_argument(
        "--steps", nargs="+", choices=STEPS, default=STEPS, help="others than sft need --output-dir"
    )
    parser.add_argument("--output-dir", type=Path, help="keep the runs here; by default they are deleted")
    parser.add_argument("--results", type=Path, help="folder of the record; by default benchmarks/results")
    parser.add_argument("overrides", nargs="*", help="further settings of every run")
    return parser.parse_args(words)


def command(step: str, given: Given, overrides: Sequence[str]) -> list[str]:
    """`pipeline run` of one step; those after SFT start from its policy."""
    start = (
        f"model.path={given.model}" if step == "sft" else f"{step}.policy={given.folder / 'sft/sft/export'}"
    )
    path, most = {
        "sft": (given.gsm8k, given.rows),
        "reward": (given.pairs, given.most_pairs),
        "dpo": (given.pairs, given.most_pairs),
        "ppo": (given.folder / "sums.jsonl", SUMS),
    }[step]
    return [
        sys.executable, "-m", "pipeline", "run", "experiment=smollm2", f"steps=[{step}]", start,
        f"output_dir={given.folder}", f"run_name={step}", "model.dtype=fp32", "deepspeed=zero1",
        "tracking=off", f"{step}.data.path=null",
        f"{step}.data.sources=[{{path: '{path}', max_rows: {most}}}]",
        *SETTINGS[step], *overrides,
    ]  # fmt: skip


def run(step: str, given: Given, overrides: Sequence[str]) -> Seen:
    """One step, and what it left."""
    if (given.folder / step).exists():
        raise SystemExit(f"{given.folder / step} exists: it would be skipped; name another --output-dir")
    given.folder.mkdir(parents=True, exist_ok=True)
    if step == "ppo":
        lines = (json.dumps(row) + "\n" for row in sums(SUMS))
        (given.folder / "sums.jsonl").write_text("".join(lines))
    usage, _ = run_measured(command(step, given, overrides), log=given.folder / f"{step}.txt")
    return {"usage": asdict(usage), **figures(given.folder / step / step, step)}


def sums(count: int) -> list[dict[str, str]]:
    """Different sums of two numbers, with the answer where a checker looks for it; always the same."""
    pairs = [(a, b) for a in range(2, LARGEST) for b in range(2, LARGEST)]
    chosen = random.Random(0).sample(pairs, count)
    return [{"question": f"What is {a} + {b}?", "answer": f"#### {a + b}"} for a, b in chosen]


def figures(folder: Path, step: str) -> Seen:
    """What the metrics and the ledger of a finished step say."""
    lines = read_metrics(folder / "metrics.jsonl")
    evaluations = [line for line in lines if FIGURES[step][0] in line]
    if len(evaluations) < 2 or evaluations[0]["step"] != 0:
        raise ValueError(f"{folder}: no evaluation before and after")
    ledger = json.loads((folder / "ledger.json").read_text())
    before, after = (
        {name: line[name] for name in FIGURES[step] if name in line}
        for line in evaluations[:: len(evaluations) - 1]
    )
    return {
        "before": before,
        "after": after,
        "steps": evaluations[-1]["step"],
        "held_out": sum(source["rows_held_out"] for source in ledger["sources"]),
        "kept": sum(source["rows_kept"] for source in ledger["sources"]),
    }


def risen(seen: Seen, name: str) -> float:
    """How much higher a number is after the step than before."""
    return float(seen["after"][name] - seen["before"][name])


def missed_bars(chain: Mapping[str, Seen]) -> list[str]:
    """Those of steps that ran and are not met, with the number."""
    found = []
    for name, (step, value_of, holds, wanted) in BARS.items():
        if step in chain and not holds(value := value_of(chain[step]), wanted):
            found.append(f"{name}: MISSED ({value:.4g})")
    return found


def rendered(chain: Mapping[str, Seen]) -> str:
    """A line per number, and one per step with its rows and what it took."""
    numbers = [
        (f"{step} {name.removeprefix('eval/')}", value, seen["after"][name])
        for step, seen in chain.items()
        for name, value in seen["before"].items()
    ]
    taken = [
        (
            step, seen["kept"] - seen["held_out"], seen["held_out"], seen["steps"],
            seen["usage"]["wall_seconds"], seen["usage"]["cpu_seconds"], seen["usage"]["peak_rss_mb"],
        )
        for step, seen in chain.items()
    ]  # fmt: skip
    head = ("step", "rows", "held out", "steps", "wall s", "CPU s", "peak MB")
    return f"{table(('held out', 'before', 'after'), numbers)}\n\n{table(head, taken)}"


def write(chain: Mapping[str, Seen], missed: Sequence[str], to: Path | None) -> None:
    """The record as JSON and as text."""
    written = write_results(NAME, {"bars": list(BARS), "missed": list(missed), "steps": dict(chain)}, to=to)
    record = json.loads(written.read_text())
    about = "\n".join(f"{name}: {value}" for name, value in record["machine"].items())
    verdict = "\n".join(missed) if missed else "all bars of these steps met: " + "; ".join(BARS)
    text = f"{record['command']}\n{about}\n\n{rendered(chain)}\n\n{verdict}\n"
    path = (to or RESULTS) / f"{NAME}.txt"
    path.write_text(text)
    print(f"{text}written: {written}, {path}")


if __name__ == "__main__":
    sys.exit(main())
