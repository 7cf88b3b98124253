"""The two sides of a comparison on pairs of answers: our command, and TRL's settings.

Takes the pairs and the policy of `pairs_workload.py`; returns command lines, and what TRL needs of ours to
do the same: the pairs' tokens in the order in which our steps see them, and a reward model with our initial
head. Starts and measures nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import workload
from benchmarks.pairs_workload import MAX_LENGTH, PairsWorkload

if TYPE_CHECKING:
    from common.data.types import TokenizedExample

STEPS = ("reward", "dpo")
SEED = 42


@dataclass(frozen=True)
class Ours:
    """One run of ours, `python -m pipeline run 'steps=[reward]'` or `dpo`."""

    step: str
    made: PairsWorkload
    folder: Path
    cache: Path
    dtype: str
    pairs_per_step: int
    micro_batch: int  # in rows
    packing: bool  # rows of several pairs; a step has as many pairs either way
    extra: tuple[str, ...] = ()

    @property
    def run_dir(self) -> Path:
        return self.folder / "ours"

    @property
    def metrics(self) -> Path:
        """A line per optimizer step."""
        return self.run_dir / self.step / "metrics.jsonl"

    def command(self) -> list[str]:
        """The whole command line."""
        step = self.step
        overrides = [
            f"steps=[{step}]",
            "run_name=ours",
            f"output_dir={self.folder}",
            f"seed={SEED}",
            f"{step}.policy={self.made.policy}",
            f"model.dtype={self.dtype}",
            f"{step}.data.path={self.made.rows}",
            f"{step}.data.cache_dir={self.cache}",
            f"{step}.data.max_length={MAX_LENGTH}",
            f"{step}.data.packing={str(self.packing).lower()}",
            f"{step}.data.eval_fraction=0",
            f"{step}.train.global_batch_size={self.pairs_per_step}",
            f"{step}.train.micro_batch_size={self.micro_batch}",
            f"{step}.train.epochs=1",
            f"{step}.optim.lr={self.made.learning_rate}",
            f"{step}.optim.betas={list(workload.BETAS)}",
            f"{step}.optim.eps={workload.EPS}",
            f"{step}.optim.warmup_ratio={workload.WARMUP_RATIO}",
            f"{step}.optim.min_lr_ratio={workload.MIN_LR_RATIO}",
            f"{step}.optim.max_grad_norm={workload.MAX_GRAD_NORM}",
            "deepspeed=zero1",
            "launch.nproc_per_node=1",
            "tracking=off",
        ]
        return [sys.executable, "-m", "pipeline", "run", *overrides, *self.extra]


def trl_command(step: str, settings: Mapping[str, Any], folder: Path) -> list[str]:
    """TRL's trainer of a step as a process; what it leaves lies in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    path.write_text(json.dumps({**settings, "out": str(folder)}))
    return [sys.executable, "-m", f"benchmarks.trl_{step}", str(path)]


def initial_reward_model(made: PairsWorkload, folder: Path) -> Path:
    """The policy's weights with the head that our run begins with, as a folder for plain transformers."""
    import torch

    from common.config import Dtype, ModelConfig
    from common.model.loading import load_model
    from common.model.scalar_head import NEW_REWARD_MODEL
    from common.model.tokenizer import load_tokenizer

    if not (folder / "model.safetensors").is_file():
        config = ModelConfig(path=str(made.policy), dtype=Dtype.fp32)
        tokenizer = load_tokenizer(config)
        cpu = torch.device("cpu")
        model = load_model(config, tokenizer, NEW_REWARD_MODEL, seed=SEED, device=cpu, max_length=MAX_LENGTH)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class PairTokens:
    """One pair as our steps see it: the prompt's tokens, and those of both answers through the terminator."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def pair_tokens(ours: Ours) -> list[PairTokens]:
    """The pairs of the run's first epoch, step by step."""
    from common.config import DataConfig, ModelConfig
    from common.data import dataset
    from common.data.batches import BatchPlan, PairBatches
    from common.data.dataset_types import PREFERENCES
    from common.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(ModelConfig(path=str(ours.made.policy)))
    data = DataConfig(
        path=str(ours.made.rows), max_length=MAX_LENGTH, packing=ours.packing, eval_fraction=0.0
    )
    kind = PREFERENCES
    pairs, _, _ = dataset.build(
        data, tokenizer, kind=kind, stage=ours.step, seed=SEED, cache_dir=ours.cache, report=lambda _: None
    )
    plan = BatchPlan(MAX_LENGTH, ours.packing, ours.pairs_per_step, ours.micro_batch, SEED, 0, 1)
    batches = PairBatches(pairs, plan)
    steps = range(batches.steps_in_epochs(1))
    order = [int(index) for step in steps for row in batches.rows(step) for index in row]
    return [split(pairs[index].chosen, pairs[index].rejected) for index in order]


def split(chosen: TokenizedExample, rejected: TokenizedExample) -> PairTokens:
    """The prompt ends where the first label says that a token is trained; it is the same on both sides."""
    sides = [_prompt_and_answer(side) for side in (chosen, rejected)]
    if sides[0][0] != sides[1][0]:
        raise ValueError("the two sides of a pair begin with different prompts")
    return PairTokens(sides[0][0], sides[0][1], sides[1][1])


def _prompt_and_answer(side: TokenizedExample) -> tuple[list[int], list[int]]:
    from common.data.types import IGNORE

    # labels[t] is the token after t, so that the answer begins one behind the first label
    first = int((side.labels != IGNORE).argmax()) + 1
    return side.input_ids[:first].tolist(), side.input_ids[first:].tolist()


def reward_columns(pairs: Sequence[PairTokens]) -> dict[str, list[list[int]]]:
    """The pairs as RewardTrainer takes them: whole documents."""
    return {
        "chosen_ids": [pair.prompt + pair.chosen for pair in pairs],
        "rejected_ids": [pair.prompt + pair.rejected for pair in pairs],
    }


def dpo_columns(pairs: Sequence[PairTokens]) -> dict[str, list[list[int]]]:
    """The pairs as DPOTrainer's own preparation leaves them."""
    return {
        "prompt_ids": [pair.prompt for pair in pairs],
        "chosen_ids": [pair.chosen for pair in pairs],
        "rejected_ids": [pair.rejected for pair in pairs],
    }
