"""Both sides of a parity run on pairs, and what TRL's own preparation of the rows does differently.

Takes a step's name and the pairs; returns what both sides logged at the same optimizer steps on the same
tokens. Ours is the real command; TRL's trainer gets the tokens that our steps saw, in that order. What is
compared, and what the trainers do differently on purpose, is in reward_parity.py and dpo_parity.py.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import parity, workload
from benchmarks.measure import run_measured, threads_environment
from benchmarks.pair_sides import Ours, PairTokens, pair_tokens, trl_command
from benchmarks.pairs_workload import KINDS, MAX_LENGTH, PairsWorkload

PAIRS_PER_STEP = 32
MICRO_BATCH = 8
Steps = list[dict[str, float]]


@dataclass(frozen=True)
class Trial:
    """What all runs of one invocation share."""

    step: str
    made: PairsWorkload
    folder: Path
    base: Path  # the model that TRL starts from
    steps: int
    threads: int

    def ours(self, name: str, steps: int, overrides: Sequence[str] = ()) -> Ours:
        """A run of ours under `folder/name`."""
        extra = (f"{self.step}.train.max_steps={steps}", *overrides)
        return Ours(
            self.step, self.made, self.folder / name, self.folder / "cache", "fp32", PAIRS_PER_STEP,
            MICRO_BATCH, False, extra,
        )  # fmt: skip


def parser_of(program: str) -> argparse.ArgumentParser:
    """The options that both programs have."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{program}")
    parser.add_argument("--pairs", choices=KINDS, default="gsm8k")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="keep files here; by default a folder that is removed")
    parser.add_argument("--results", type=Path, help="folder of the JSON; by default benchmarks/results")
    return parser


def run_ours(trial: Trial, name: str, overrides: Sequence[str] = (), steps: int | None = None) -> Steps:
    """What our command logged."""
    ours = trial.ours(name, steps or trial.steps, overrides)
    if not (ours.run_dir / ours.step / "export").is_dir():
        environment = threads_environment(trial.threads)
        run_measured(ours.command(), log=ours.folder / "log", environment=environment)
    return parity.read_ours(ours.metrics)


def tokens_of_ours(trial: Trial) -> list[PairTokens]:
    """The pairs in the order in which our runs see them."""
    return pair_tokens(trial.ours("ours", trial.steps))


def run_trl(
    trial: Trial,
    name: str,
    columns: Mapping[str, Any],
    quantities: Sequence[parity.Quantity],
    arguments: Mapping[str, Any] | None = None,
    steps: int | None = None,
) -> Steps:
    """What TRL's trainer logged on these tokens; the schedule is that of the whole trial."""
    from common.rates import warmup_steps

    folder, total = trial.folder / name, steps or trial.steps
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokens.json").write_text(json.dumps(columns))
    settings = {
        "base": str(trial.base),
        "dtype": "fp32",
        "tokenized": str(folder / "tokens.json"),
        "save": False,
        "exact_grad_norm": True,
        "arguments": {
            **workload.optimizer_arguments(trial.made.learning_rate),
            "warmup_steps": warmup_steps(workload.WARMUP_RATIO, total),
            "max_steps": total,
            "per_device_train_batch_size": MICRO_BATCH,
            "gradient_accumulation_steps": PAIRS_PER_STEP // MICRO_BATCH,
            "train_sampling_strategy": "sequential",
            "max_length": MAX_LENGTH,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            **(arguments or {}),
        },
    }
    command = trl_command(trial.step, settings, folder)
    run_measured(command, log=folder / "log", environment=threads_environment(trial.threads))
    return parity.read_trl(folder, quantities)


def prepared_by_trl(trial: Trial) -> dict[str, list[list[int]]]:
    """The rows' tokens as TRL's own preparation makes them, in the rows' order."""
    folder = trial.folder / "prepared"
    settings = {
        "base": str(trial.base), "dtype": "fp32", "rows": str(trial.made.rows), "only_prepare": True,
        "arguments": {"max_length": MAX_LENGTH, "gradient_checkpointing": False},
    }  # fmt: skip
    command = trl_command(trial.step, settings, folder)
    run_measured(command, log=folder / "log", environment=threads_environment(trial.threads))
    return json.loads((folder / "prepared.json").read_text())


def surplus(prepared: Mapping[str, Sequence[list[int]]], ours: Sequence[PairTokens]) -> Counter[tuple]:
    """What TRL's documents have behind ours, as token ids, and how often.

    Pairs are matched by their tokens, as the order differs; ValueError when one of ours is nowhere.
    """
    prompts = prepared.get("prompt_ids") or [[]] * len(prepared["chosen_ids"])
    behind: Counter[tuple] = Counter()
    sides = ("chosen", "rejected")
    theirs = {
        side: _by_beginning([a + b for a, b in zip(prompts, prepared[f"{side}_ids"], strict=True)])
        for side in sides
    }
    for pair in ours:
        for side in sides:
            document = tuple(pair.prompt + getattr(pair, side))
            if document not in theirs[side]:
                raise ValueError(f"TRL prepares no document that begins like {document[:8]}...")
            behind[theirs[side][document]] += 1
    return behind


def _by_beginning(documents: Sequence[list[int]], longest: int = 3) -> dict[tuple, tuple]:
    """What follows, by each document's beginning without its last 0 to `longest` tokens."""
    return {
        tuple(document[: len(document) - cut]): tuple(document[len(document) - cut :])
        for document in documents
        for cut in range(min(longest, len(document) - 1) + 1)
    }


def described(behind: Counter[tuple], base: Path) -> str:
    """The surplus in words."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    texts = {ids: repr(tokenizer.decode(list(ids))) for ids in behind if ids}
    parts = [f"{behind[ids]} have {text} behind the terminator" for ids, text in texts.items()]
    same = behind.get((), 0)
    return f"of {sum(behind.values())} documents, {same} are the same" + "".join(f", {p}" for p in parts)
