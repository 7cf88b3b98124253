"""Sources -> tokenized records on disk, split into training and held-out ones.

Takes a `DataConfig` and a tokenizer, gives two data sets and the ledger of what became of each row. The
records are documents, pairs of them when the rows are preferences, or prompts (`dataset_types.py`). They lie
in one memory-mapped Arrow file, in a folder of the cache (`cache.py`) that appears only when it is whole. The
rows are read in `reader.py`, the folder is filled in `writer.py`. Memory stays flat however many rows there
are (a few numbers per row). Does not pack and does not make batches.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common import limited
from common.config import DataConfig
from common.data import cache
from common.data import writer as writing
from common.data.dataset_types import DEMONSTRATIONS, DatasetType, Opened
from common.data.index import PARTS, read_index
from common.data.ledger import Ledger
from common.data.reader import Reader, named_sources
from common.data.splits import held_out, split_hash
from common.data.stages import StageSplit
from common.data.writer import IN_EVAL, Writer
from common.errors import UserError
from common.files import disk_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Report = Callable[[str], None]


def build(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    kind: DatasetType[Opened],
    *,
    stage: str | None = None,
    seed: int,
    cache_dir: Path | str,
    report: Report = print,
    show: Callable[[float], None] | None = None,
) -> tuple[Opened, Opened | None, Ledger]:
    """Training records, held-out records (None when there are none) and the ledger.

    The arguments are those of `prepare`. Raises UserError for bad data, and when no row is left to train on.
    """
    folder = prepare(
        data, tokenizer, kind, stage=stage, seed=seed, cache_dir=cache_dir, report=report, show=show
    )
    return records(folder, data, kind)


def prepare(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    kind: DatasetType[Opened],
    *,
    stage: str | None = None,
    seed: int,
    cache_dir: Path | str,
    report: Report = print,
    show: Callable[[float], None] | None = None,
) -> Path:
    """The folder with the records; reads all rows, and all that is in the cache of them.

    kind: DEMONSTRATIONS, PREFERENCES or PROMPTS. stage: the step's name, whose rows are wanted when
    `data.stage_split` shares them out. They are taken from the cache when the cache key is unchanged and the
    files still have their hashes; otherwise they are made, and a line says what changed. show: is told the
    share of rows that are tokenized, in place of lines. Raises UserError for bad data.
    """
    if not data.all_sources():
        raise UserError("no data is named", hint="set data.path, or data.sources")
    split = StageSplit(data.stage_split, stage, seed)
    root = Path(cache_dir)
    key = cache.cache_key(
        data,
        named_sources(data),
        tokenizer,
        kind=kind.name,
        room=kind.room,
        system=kind.system,
        stage=stage,
        seed=seed,
    )
    folder = root / cache.digest(key)
    reader = functools.partial(Reader, data, kind, split, seed, report)
    if not cache.is_intact(folder):
        report(cache.why_missed(root, key))
        _make(folder, key, lambda: Writer(reader(), tokenizer, cache.spool_of(folder), show), report)
    limited.end()  # in which the rows were rendered
    return folder


def records(
    folder: Path, data: DataConfig, kind: DatasetType[Opened]
) -> tuple[Opened, Opened | None, Ledger]:
    """What is in a folder that `prepare` gave, here or to another rank of this machine; reads no rows.

    Raises UserError when no row is left to train on, or none of `data.eval_path` to evaluate on.
    """
    train, held_out, ledger = load(folder, kind)
    if data.eval_path is not None and held_out is None:
        raise UserError(
            f"data.eval_path={data.eval_path}: no row is left to evaluate on",
            hint="\n  ".join(["see what became of them:", *ledger.lines()]),
        )
    return train, held_out, ledger


def _make(folder: Path, key: Mapping[str, Any], writer: Callable[[], Writer], report: Report) -> None:
    """Fill a folder of the cache, or help the builder on another machine that does."""
    with disk_errors(folder, "data.cache_dir=DIR"):
        is_first = writer().is_first()
        if not is_first:
            report("another process puts the rows together; this one tokenizes a share of them")
            writer().share()
    if not is_first:
        if cache.comes(folder, report=report, silence=writing.ELSEWHERE_SECONDS):
            cache.remove_spool(folder)
            return
        report("the other process is silent: the rows are put together here")
    with cache.new_folder(folder) as unfinished:
        writer().fill(unfinished)
        cache.seal(unfinished, key)
    cache.remove_spool(folder)


def build_whole(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    kind: DatasetType[Opened],
    *,
    cache_dir: Path | str,
    report: Report = print,
) -> tuple[Opened, Ledger]:
    """Every usable row of the sources, none held out: for inference. Otherwise as `build`."""
    data = dataclasses.replace(data, eval_fraction=0.0)
    try:
        rows, _, ledger = build(data, tokenizer, kind, seed=0, cache_dir=cache_dir, report=report)
    except UserError as error:
        raise UserError(error.message.replace(" to train on", ""), hint=error.hint) from error
    return rows, ledger


def load(folder: Path, kind: DatasetType[Opened]) -> tuple[Opened, Opened | None, Ledger]:
    """What `build` left in its folder."""
    ledger = Ledger.from_json(json.loads((folder / cache.LEDGER_FILE).read_text()))
    names = [entry.name for entry in ledger.sources]
    train, held_out = (
        kind.opened(folder, read_index(folder / cache.INDEX_FILE, part), names, part) for part in PARTS
    )
    if not len(train):
        reasons = "; ".join(ledger.reasons()) or "all rows are held out"
        raise UserError(f"no row is left to train on: {reasons}", hint=_way_out(reasons))
    return train, held_out if len(held_out) else None, ledger


def _way_out(reasons: str) -> str:
    """What to look at when there is nothing to train on."""
    if "max_length" in reasons or "truncation" in reasons:
        return "see data.max_length, data.truncation"
    if IN_EVAL in reasons:
        return "hold out other rows: another data.eval_path, or data.eval_fraction instead"
    if "stage_split" in reasons:
        return "see data.stage_split"
    return "look at the rows that are named, and at data.sources.columns"


def training_texts(
    data: DataConfig, *, stage: str | None = None, seed: int, report: Report = print
) -> Iterator[str]:
    """Contents and roles (templates write both) of all demonstrations that the step trains on, e.g. to train
    a tokenizer. Leaves out held-out rows and rows of other steps; reads the data twice."""
    split = StageSplit(data.stage_split, stage, seed)
    hashes, source_ids = array("Q"), array("i")
    eval_hashes: set[int] = set()
    for conversation, source, for_eval in Reader(data, DEMONSTRATIONS, split, seed, report).rows():
        row_hash = split_hash(conversation, seed)
        if for_eval:
            eval_hashes.add(row_hash)
        else:
            hashes.append(row_hash)
            source_ids.append(source)
    eval_hashes |= held_out(np.array(hashes), np.array(source_ids), data.held_out_fraction())
    for conversation, _, _ in Reader(data, DEMONSTRATIONS, split, seed, report=lambda line: None).rows():
        if split_hash(conversation, seed) not in eval_hashes:
            if conversation.text is not None:
                yield conversation.text
            for message in conversation.messages:
                yield from (message.role, message.content)


def source_weights(data: DataConfig) -> dict[str, float]:
    """`weight` of each source under the name it has in the ledger and in `TokenizedDataset.sources`."""
    return {name: source.weight for name, source in named_sources(data)}
