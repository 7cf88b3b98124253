"""The pairs of answers and the policy that both sides of a comparison start from.

Takes real pairs and a folder; leaves there `policy/`, an artifact that plain transformers loads too (the
4M-parameter model of `workload.py`), and `<kind>_<pairs>.jsonl`, a seeded sample as messages. Kinds:
`gsm8k`, a right and a wrong solution of each question by one of four models, with an explicit prompt; and
`hh`, transcripts of several turns whose prompt is what both sides begin with. A folder that has them is
used as it is.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import workload
from benchmarks.measure import PROJECT

if TYPE_CHECKING:
    from datasets import Dataset

    from common.config import ModelConfig

DATA = PROJECT.parent / "shared" / "data"
KINDS = ("gsm8k", "hh")
MAX_LENGTH = workload.MAX_LENGTH
WRITERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")

LEARNING_RATE = 1e-4
PRETRAINED_LEARNING_RATE = 1e-6

Turns = list[dict[str, str]]
Row = dict[str, Turns]


@dataclass(frozen=True)
class PairsWorkload:
    """Where both sides read."""

    policy: Path  # an artifact, which is a model's folder at the same time
    rows: Path  # JSONL of messages: prompt, chosen and rejected, or chosen and rejected alone
    learning_rate: float = LEARNING_RATE


def prepare(
    folder: Path, kind: str, pairs: int, seed: int = 0, *, data: Path = DATA, model: Path | None = None
) -> PairsWorkload:
    """Make what is missing. All sides of all pairs fit `MAX_LENGTH` tokens: none is cut or dropped.

    model: a pretrained model's folder, which is used as it is.
    """
    made = PairsWorkload(folder / "policy", path := folder / f"{kind}_{pairs}.jsonl")
    if model is not None:
        made = PairsWorkload(model.resolve(), path, PRETRAINED_LEARNING_RATE)
    folder.mkdir(parents=True, exist_ok=True)
    if model is None and not (made.policy / "manifest.json").is_file():
        if not (folder / "base" / "model.safetensors").is_file():
            workload.save_base(folder / "base", data / "gsm8k" / "train.jsonl", seed)
        _export_base(folder / "base", made.policy)
    if not made.rows.is_file():
        chosen = sample(list(pairs_of(kind, data)), made.policy, pairs, seed)
        made.rows.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return made


def _export_base(base: Path, policy: Path) -> None:
    from common.config import Dtype, ModelConfig
    from common.model.tokenizer import load_tokenizer

    model = ModelConfig(path=str(base), dtype=Dtype.fp32)
    export_as_policy(model, load_tokenizer(model), policy)


def export_as_policy(model: ModelConfig, tokenizer: Any, folder: Path, max_length: int = MAX_LENGTH) -> None:
    """The model as the policy artifact that the steps after SFT start from."""
    import torch

    from common.model.loading import load_model
    from common.model.packed import PackedCausalLM
    from common.model.probes import Shortcuts
    from common.training.export import ask_live, export_model

    live = load_model(model, tokenizer, seed=0, device=torch.device("cpu"), max_length=max_length)
    packed = PackedCausalLM(live.eval(), Shortcuts())
    probe = ask_live(packed, [torch.arange(3, 35) % len(tokenizer)])
    export_model(live, None, tokenizer, folder, probe, details={"parents": []})


def pairs_of(kind: str, data: Path) -> Iterator[Row]:
    """All pairs of a kind, in the file's order."""
    if kind == "gsm8k":
        for line in (data / "gsm8k" / "model_solutions.jsonl").read_text(encoding="utf-8").splitlines():
            yield from right_and_wrong(json.loads(line))
    else:
        with gzip.open(data / "hh_rlhf" / "harmless_a.jsonl.gz", "rt", encoding="utf-8") as lines:
            for line in lines:
                yield from transcripts(json.loads(line))


def right_and_wrong(row: dict[str, Any]) -> Iterator[Row]:
    """The first right and the first wrong solution of a question; nothing where one is missing."""
    solutions = [row[writer] for writer in WRITERS]
    right = [solution["solution"] for solution in solutions if solution["is_correct"]]
    wrong = [solution["solution"] for solution in solutions if not solution["is_correct"]]
    if right and wrong:
        yield {
            "prompt": [{"role": "user", "content": row["question"]}],
            "chosen": [{"role": "assistant", "content": right[0]}],
            "rejected": [{"role": "assistant", "content": wrong[0]}],
        }


def transcripts(row: dict[str, str]) -> Iterator[Row]:
    """Two transcripts as turns; nothing unless they differ in their last answer, which is not empty."""
    chosen, rejected = turns_of(row["chosen"]), turns_of(row["rejected"])
    ends = [side[-1] for side in (chosen, rejected) if side]
    answered = len(ends) == 2 and all(end["role"] == "assistant" and end["content"] for end in ends)
    if answered and len(chosen) > 1 and chosen[:-1] == rejected[:-1] and chosen != rejected:
        yield {"chosen": chosen, "rejected": rejected}


def turns_of(transcript: str) -> Turns:
    """The turns of a "Human: ... Assistant: ..." transcript."""
    parts = re.split(r"\n\n(Human|Assistant):", transcript)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": said.strip()}
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def sample(every: list[Row], policy: Path, pairs: int, seed: int) -> list[Row]:
    """A seeded sample of the pairs that fit; ValueError when there are too few."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(policy)
    random.Random(seed).shuffle(every)
    chosen: list[Row] = []
    for row in every:
        if len(chosen) == pairs:
            break
        if all(len(tokens_of(row, side, tokenizer)) <= MAX_LENGTH for side in ("chosen", "rejected")):
            chosen.append(row)
    if len(chosen) < pairs:
        raise ValueError(f"there are {len(chosen)} pairs of at most {MAX_LENGTH} tokens, not {pairs}")
    return chosen


def tokens_of(row: Row, side: str, tokenizer: Any) -> list[int]:
    """The prompt and one side's answer as token ids."""
    turns = [*row.get("prompt", []), *row[side]]
    return tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]


def load_for_trl(rows: str, *, with_lengths: bool = False) -> Dataset:
    """The rows as a data set. with_lengths: by characters, so that TRL's trainers can group by length."""
    from datasets import load_dataset

    dataset = load_dataset("json", data_files=rows, split="train")
    return dataset.map(lambda row: {"length": longest_side(row)}) if with_lengths else dataset


def longest_side(row: Row) -> int:
    """Characters of the longer side."""
    return max(
        sum(len(turn["content"]) for turn in [*row.get("prompt", []), *row[side]])
        for side in ("chosen", "rejected")
    )
