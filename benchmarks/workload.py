"""The rows and the base model that both sides of a comparison start from.

Takes a JSONL file of questions and answers and a folder; leaves there `base/` (weights of the 4M-parameter
model of `experiment=gsm8k` in fp32, initialised once, with its tokenizer, trained once; not where a
pretrained model is named) and `rows.jsonl` (a seeded sample). A folder that has them is used as it is.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import PROJECT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GSM8K = PROJECT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
MAX_LENGTH = 512
LEARNING_RATE = 1e-3
PRETRAINED_LEARNING_RATE = 2e-5
BETAS = (0.9, 0.95)
EPS = 1e-8
WARMUP_RATIO = 0.03
MIN_LR_RATIO = 0.1
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Workload:
    """Where both sides read."""

    base: Path  # a model's folder
    rows: Path  # JSONL with question and answer
    learning_rate: float = LEARNING_RATE


def prepare(folder: Path, data: Path, rows: int, seed: int = 0, model: Path | None = None) -> Workload:
    """Make what is missing. rows: how many; all fit `MAX_LENGTH` tokens, so that none is cut or dropped.

    model: a pretrained model's folder, which is used as it is.
    """
    workload = Workload(folder / "base", path := folder / f"rows_{rows}.jsonl")
    if model is not None:
        workload = Workload(model.resolve(), path, PRETRAINED_LEARNING_RATE)
    folder.mkdir(parents=True, exist_ok=True)
    if not (workload.base / "model.safetensors").is_file():
        save_base(workload.base, data, seed)
    if not workload.rows.is_file():
        chosen = sample(data, workload.base, rows, seed)
        workload.rows.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return workload


def sample(data: Path, base: Path, rows: int, seed: int) -> list[dict[str, str]]:
    """A seeded sample of the rows that fit; ValueError when there are too few."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    every = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines() if line.strip()]
    random.Random(seed).shuffle(every)
    chosen: list[dict[str, str]] = []
    for row in every:
        if len(chosen) == rows:
            break
        if len(tokens_of(row, tokenizer)) <= MAX_LENGTH:
            chosen.append({"question": row["question"], "answer": row["answer"]})
    if len(chosen) < rows:
        raise ValueError(f"{data} has {len(chosen)} rows of at most {MAX_LENGTH} tokens, not {rows}")
    return chosen


def tokens_of(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The whole conversation as token ids."""
    turns = [
        {"role": "user", "content": row["question"]},
        {"role": "assistant", "content": row["answer"]},
    ]
    encoded: Any = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)
    return encoded["input_ids"]


def optimizer_arguments(learning_rate: float = LEARNING_RATE) -> dict[str, Any]:
    """The optimizer and schedule of both sides as arguments of TRL's configs, warm-up apart."""
    return {
        "optim": "adamw_torch_fused",
        "learning_rate": learning_rate,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "adam_epsilon": EPS,
        "weight_decay": 0.0,
        "max_grad_norm": MAX_GRAD_NORM,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": MIN_LR_RATIO},
    }


def save_base(base: Path, data: Path, seed: int) -> None:
    """The model of `experiment=gsm8k`, initialised from the seed, and its tokenizer, trained on the rows."""
    import torch
    from omegaconf import OmegaConf

    from common.config import Dtype, ModelConfig, TokenizerConfig
    from common.model.loading import load_model
    from common.model.tokenizer import load_tokenizer

    fields = OmegaConf.to_container(OmegaConf.load(PROJECT / "conf" / "model" / "llama_4m.yaml"))
    assert isinstance(fields, dict)
    config = ModelConfig(
        config=fields["config"], tokenizer=TokenizerConfig(**fields["tokenizer"]), dtype=Dtype.fp32
    )
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines() if line.strip()]
    tokenizer = load_tokenizer(
        config, lambda: (text for row in rows for text in (row["question"], row["answer"]))
    )
    model = load_model(config, tokenizer, seed=seed, device=torch.device("cpu"))
    tokenizer.save_pretrained(base)
    model.save_pretrained(base)
