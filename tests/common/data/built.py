"""Data sets of tiny rows, built for tests of their files, cache and splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.config import DataConfig
from common.data.dataset import build
from common.data.dataset_types import DEMONSTRATIONS, PREFERENCES, DatasetType
from common.data.ledger import Ledger
from common.data.stored import PairDataset, TokenizedDataset
from tests.tiny import CHATML, tiny_tokenizer


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(first, first + count)]


class Said(list[str]):
    """What was reported."""

    def __call__(self, line: str) -> None:
        self.append(line)


def made(
    tmp_path: Path,
    tokenizer: Any = None,
    said: Said | None = None,
    seed: int = 0,
    kind: DatasetType[TokenizedDataset] = DEMONSTRATIONS,
    **options: Any,
) -> tuple[TokenizedDataset, TokenizedDataset | None, Ledger]:
    if "sources" not in options:
        options.setdefault("path", str(tmp_path / "rows.jsonl"))
    return build(
        DataConfig(**options),
        tiny_tokenizer(CHATML) if tokenizer is None else tokenizer,
        kind,
        seed=seed,
        cache_dir=tmp_path / "cache",
        report=Said() if said is None else said,
    )


def texts(documents: TokenizedDataset) -> list[str]:
    tokenizer = tiny_tokenizer()
    return [tokenizer.decode(documents[index].input_ids) for index in range(len(documents))]


def preferences(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"prompt": f"question {n}", "chosen": f"good {n}", "rejected": f"bad {n}", "margin": n / 4}
        for n in range(first, first + count)
    ]


def made_pairs(
    tmp_path: Path, said: Said | None = None, seed: int = 0, stage: str | None = None, **options: Any
) -> tuple[PairDataset, PairDataset | None, Ledger]:
    if "sources" not in options:
        options.setdefault("path", str(tmp_path / "rows.jsonl"))
    return build(
        DataConfig(**options),
        tiny_tokenizer(CHATML),
        kind=PREFERENCES,
        stage=stage,
        seed=seed,
        cache_dir=tmp_path / "cache",
        report=Said() if said is None else said,
    )


def prompts(pairs: PairDataset | None) -> set[str]:
    """The questions, without what the template writes around them."""
    assert pairs is not None
    every = (tiny_tokenizer().decode(pairs[index].chosen.input_ids) for index in range(len(pairs)))
    return {text.partition("user\n")[2].partition("<")[0] for text in every}
