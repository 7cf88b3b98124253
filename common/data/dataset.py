"""Sources -> tokenized records on disk, split into training and held-out ones.

Takes a `DataConfig` and a tokenizer, gives two data sets and the ledger of what became of each row. The
records are documents, pairs of them when the rows are preferences, or prompts (`kinds.py`). They lie in one
memory-mapped Arrow file, in a folder of the cache (`cache.py`) that appears only when it is whole. Memory
stays flat however many rows there are (a few numbers per row). Does not pack and does not make batches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, overload

import numpy as np

from common.config import DataConfig, SourceConfig, SpecialTokens
from common.data import cache, chat, control, sources
from common.data.columns import rename
from common.data.kinds import (
    DEMONSTRATIONS,
    PREFERENCES,
    PROMPTS,
    Kind,
    Opened,
    Record,
    Row,
    with_options,
)
from common.data.ledger import Ledger, SourceLedger
from common.data.preferences import RowUnused
from common.data.prompts import SAME
from common.data.stages import OTHER_STAGE, StageSplit
from common.data.stored import CHUNK_ROWS, ROWS_FILE, PairDataset, PromptDataset, TokenizedDataset
from common.data.types import Message, Place, RawExample
from common.errors import UserError

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "DEMONSTRATIONS",
    "PREFERENCES",
    "PROMPTS",
    "Ledger",
    "PairDataset",
    "PromptDataset",
    "TokenizedDataset",
    "build",
    "held_out",
    "load",
    "source_weights",
    "training_texts",
]

PROGRESS_SECONDS = 10.0
"""Between two lines of progress."""

IN_EVAL = "also in data.eval_path"

BECAME = {
    SpecialTokens.keep: "taken as the real token (data.special_tokens_in_content=keep)",
    SpecialTokens.text: "encoded as ordinary text",
    SpecialTokens.refuse: "refused",
}
"""What becomes of a control token inside a content."""

Report = Callable[[str], None]


@overload
def build(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    stage: str | None = ...,
    seed: int,
    cache_dir: Path | str,
    report: Report = ...,
    wait: bool = ...,
) -> tuple[TokenizedDataset, TokenizedDataset | None, Ledger]: ...


@overload
def build(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    kind: Kind[Any, Any, Opened],
    stage: str | None = ...,
    seed: int,
    cache_dir: Path | str,
    report: Report = ...,
    wait: bool = ...,
) -> tuple[Opened, Opened | None, Ledger]: ...


def build(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    kind: Kind[Any, Any, Any] = DEMONSTRATIONS,
    stage: str | None = None,
    seed: int,
    cache_dir: Path | str,
    report: Report = print,
    wait: bool = False,
) -> tuple[Any, Any, Ledger]:
    """Training records, held-out records (None when there are none) and the ledger.

    kind: DEMONSTRATIONS, PREFERENCES or PROMPTS. stage: the step's name, whose rows are wanted when
    `data.stage_split` shares them out. Taken from the cache when all that decides them is unchanged;
    otherwise made, saying what changed. With `wait` this process does not build but waits for the one
    that does (see `cache.wait_for`).
    Raises UserError for bad data, and when no row is left to train on.
    """
    if not data.all_sources():
        raise UserError("no data is named", hint="set data.path, or data.sources")
    split = StageSplit(data.stage_split, stage, seed)
    root = Path(cache_dir)
    key = cache.cache_key(
        data, _named_sources(data), tokenizer, kind=kind.name, room=kind.room, stage=stage, seed=seed
    )
    folder = root / cache.digest(key)
    if wait:
        cache.wait_for(folder, report=report)
    elif not cache.is_whole(folder):
        report(cache.why_missed(root, key))
        with cache.new_folder(folder) as unfinished:
            _Writer(data, tokenizer, kind, split, seed, report).fill(unfinished)
            cache.seal(unfinished, key)
    train, held_out, ledger = load(folder, kind)
    if data.eval_path is not None and held_out is None:
        raise UserError(
            f"data.eval_path={data.eval_path}: no row is left to evaluate on",
            hint="\n  ".join(["see what became of them:", *ledger.lines()]),
        )
    return train, held_out, ledger


def load(folder: Path, kind: Kind[Row, Record, Opened]) -> tuple[Opened, Opened | None, Ledger]:
    """What `build` left in its folder."""
    ledger = Ledger.from_json(json.loads((folder / cache.LEDGER_FILE).read_text()))
    names = [entry.name for entry in ledger.sources]
    with np.load(folder / cache.INDEX_FILE) as stored:
        index = {name: stored[name] for name in stored.files}
    train = kind.opened(folder, index, names, "train")
    held_out = kind.opened(folder, index, names, "eval")
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


def understood(
    data: DataConfig,
    kind: Kind[Row, Record, Opened],
    split: StageSplit,
    *,
    seed: int,
    report: Report = print,
    ledger: Ledger | None = None,
    bad_rows: sources.BadRows | None = None,
) -> Iterator[tuple[Row, int, bool]]:
    """All usable rows, as (row, index into the ledger's sources, whether from eval_path).

    Those of `eval_path` come first, then the sources in order, of which `split` leaves out the rows of
    other steps. Bad rows are treated as the configuration says; `ledger` gets its entries, and
    `bad_rows` counts.
    """
    ledger = Ledger() if ledger is None else ledger
    if bad_rows is None:
        bad_rows = sources.BadRows(data.on_bad_row, data.max_bad_rows, report)
    named = _named_sources(data)
    ledger.sources[:] = [SourceLedger(name, source.path) for name, source in named]
    count = len(data.all_sources())
    for number in [*range(count, len(named)), *range(count)]:
        entry = ledger.sources[number]
        source = dataclasses.replace(named[number][1], name=entry.name)
        for_eval = number >= count
        for row in _rows_of_source(source, kind, bad_rows, entry, seed, report, for_eval=for_eval):
            if not for_eval and not split.has(kind.question(row)):
                entry.drop(OTHER_STAGE, row.place)
            else:
                yield with_options(row, data), number, for_eval


def training_texts(
    data: DataConfig, *, stage: str | None = None, seed: int, report: Report = print
) -> Iterator[str]:
    """Contents of all demonstrations that the step trains on (those held out and those of other steps are
    not), e.g. to train a tokenizer on; reads the data twice."""
    kind, split = DEMONSTRATIONS, StageSplit(data.stage_split, stage, seed)
    hashes, source_ids = array("Q"), array("i")
    eval_hashes: set[int] = set()
    for conversation, source, for_eval in understood(data, kind, split, seed=seed, report=report):
        row_hash = content_hash(*kind.identity(conversation), seed)
        if for_eval:
            eval_hashes.add(row_hash)
        else:
            hashes.append(row_hash)
            source_ids.append(source)
    eval_hashes |= held_out(np.array(hashes), np.array(source_ids), data.held_out_fraction())
    for conversation, _, _ in understood(data, kind, split, seed=seed, report=lambda line: None):
        if content_hash(*kind.identity(conversation), seed) not in eval_hashes:
            if conversation.text is not None:
                yield conversation.text
            yield from (message.content for message in conversation.messages)


def source_weights(data: DataConfig) -> dict[str, float]:
    """`weight` of each source under the name it has in the ledger and in `TokenizedDataset.sources`."""
    return {name: source.weight for name, source in _named_sources(data)}


def content_hash(text: str | None, messages: Sequence[Message], seed: int) -> int:
    """64 bits of what a row says (not of where it stands), different for each seed."""
    turns = [(message.role, message.content, message.extra) for message in messages]
    said = json.dumps([text, turns], sort_keys=True, default=str).encode()
    digest = hashlib.blake2b(said, digest_size=8, key=str(seed).encode()[:64])
    return int.from_bytes(digest.digest(), "big")


def held_out(hashes: np.ndarray, source_ids: np.ndarray, fraction: float) -> set[int]:
    """Content hashes that go to the held-out part: `fraction` of each source's rows, at least one.

    hashes: uint64 [R] of all rows. Equal rows stay together, across sources too, so the part can be
    larger than asked for; a source whose rows are all equal gives none.
    """
    chosen: set[int] = set()
    for source in np.unique(source_ids) if fraction > 0 else ():
        values, counts = np.unique(hashes[source_ids == source], return_counts=True)
        wanted = max(1, round(fraction * int(counts.sum())))
        enough = int(np.searchsorted(np.cumsum(counts), wanted)) + 1
        chosen.update(values[: min(enough, len(values) - 1)].tolist())
    return chosen


# from sources to records


def _named_sources(data: DataConfig) -> list[tuple[str, SourceConfig]]:
    """The training sources, then eval_path if any, each with a name of its own."""
    every = data.all_sources()
    if data.eval_path is not None:
        every.append(_eval_source(data.eval_path, every))
    named: list[tuple[str, SourceConfig]] = []
    for source in every:
        name = sources.source_name(source)
        taken = {other for other, _ in named}
        numbered = (f"{name}-{number}" for number in range(2, len(every) + 2))
        named.append((name if name not in taken else next(n for n in numbered if n not in taken), source))
    return named


def _eval_source(path: str, training: Sequence[SourceConfig]) -> SourceConfig:
    """The held-out file, to be read as the training sources are when these are all read alike."""
    first, *others = training
    if any((other.format, other.columns) != (first.format, first.columns) for other in others):
        return SourceConfig(path=path)
    return SourceConfig(path=path, format=first.format, columns=first.columns)


def _rows_of_source(
    source: SourceConfig,
    kind: Kind[Row, Record, Opened],
    bad_rows: sources.BadRows,
    entry: SourceLedger,
    seed: int,
    report: Report,
    *,
    for_eval: bool,
) -> Iterator[Row]:
    format: Any = None
    names: Mapping[str, str] = {}
    seen: set[str] = set()
    for raw in sources.rows_of(source, bad_rows, seed=seed):
        try:
            if format is None:
                format, names = (_format_of_eval if for_eval else _format)(raw, source, kind)
                entry.format = format.name
                report(f"{entry.name}: format {format.name} (columns {', '.join(raw.columns)})")
            if not seen.issuperset(raw.columns):
                _name_unused(format.unused(rename(raw.columns, names)), entry, report)
                seen.update(raw.columns)
            found = kind.read(raw, format, names)
        except RowUnused as reason:
            entry.drop(str(reason), raw.place)
        except sources.RowError as error:
            bad_rows.add(entry.name, raw.place, str(error))
        else:
            entry.further_pairs += len(found) - 1
            yield from found


ALIASES = {"functions": "tools", "system_prompt": "system"}
"""What other programs call columns that are read here."""


def _name_unused(columns: Sequence[str], entry: SourceLedger, report: Report) -> None:
    """Say once of each column that nothing reads it."""
    new = [name for name in columns if name not in entry.unused_columns]
    entry.unused_columns += new
    if new:
        ours = ", ".join(f"{ALIASES[name]}: {name}" for name in new if name in ALIASES)
        way_out = f"; to read them: data.sources.columns={{{ours}}}" if ours else ""
        report(f"{entry.name}: columns not used: {', '.join(new)}{way_out}")


def _format(
    raw: RawExample, source: SourceConfig, kind: Kind[Any, Any, Any], origin: str = ""
) -> tuple[Any, Mapping[str, str]]:
    """The format of a source whose first row is `raw`, and its names of our columns."""
    for ours, theirs in source.columns.items():
        if theirs not in raw.columns:
            raise UserError(
                f"data.sources.columns reads {ours} from {theirs}, and {raw.place} has no such column "
                f"(columns: {', '.join(raw.columns) or 'none'})",
                hint="columns are written {our name: theirs}, e.g. {prompt: query}",
            )
    renamed = rename(raw.columns, source.columns)
    return kind.recognise(renamed, name=source.format, origin=origin or str(raw.place)), source.columns


def _format_of_eval(
    raw: RawExample, source: SourceConfig, kind: Kind[Any, Any, Any]
) -> tuple[Any, Mapping[str, str]]:
    """The same of data.eval_path: as the training sources are read, or else by its own columns."""
    with contextlib.suppress(sources.RowError, UserError):
        return _format(raw, source, kind)
    try:
        return _format(raw, SourceConfig(path=source.path), kind, f"data.eval_path, {raw.place}")
    except UserError as error:
        hint = f"{error.hint}; data.eval_path is read by those too when all of data.sources have the same"
        raise UserError(error.message, hint=hint) from error


class _Kept:
    """What is remembered of each record while its tokens go to disk: a few numbers."""

    def __init__(self, more: Mapping[str, str]) -> None:
        """more: columns beside the common ones, with their type codes.

        first: whether the record is the first of its row. control: whether the row's contents hold control
        tokens.
        """
        common = {"hashes": "Q", "source_ids": "i", "lengths": "i", "trained": "i", "numbers": "i"}
        codes = {**common, "truncated": "b", "for_eval": "b", "first": "b", "control": "b", **more}
        self._columns: dict[str, array[Any]] = {name: array(code) for name, code in codes.items()}

    def add(self, **values: float) -> None:
        """One number for each column."""
        for name, column in self._columns.items():
            column.append(values[name])

    def __getitem__(self, name: str) -> np.ndarray:
        # a view, not a copy: with a million rows these numbers are most of the memory in use
        column = self._columns[name]
        return np.frombuffer(column, {"Q": "u8", "i": "i4", "b": "i1", "f": "f4"}[column.typecode])


@dataclass
class _Writer(Generic[Row, Record, Opened]):
    """Turns the sources of a data set into the files of one folder."""

    data: DataConfig
    tokenizer: PreTrainedTokenizerFast
    kind: Kind[Row, Record, Opened]
    split: StageSplit
    seed: int
    report: Report
    ledger: Ledger = field(default_factory=Ledger)

    def __post_init__(self) -> None:
        self.kept = _Kept(self.kind.numbers)
        self.seen: set[int] = set()  # of kinds whose rows are kept once: hashes of those kept
        self.bad_rows = sources.BadRows(self.data.on_bad_row, self.data.max_bad_rows, self.report)

    def fill(self, folder: Path) -> None:
        """Write records, index and ledger."""
        import pyarrow

        tokens = pyarrow.list_(pyarrow.int32())
        texts = [(name, pyarrow.string()) for name in self.kind.texts]
        schema = pyarrow.schema([("input_ids", tokens), ("labels", tokens), *texts])
        records = self._records()
        path = str(folder / ROWS_FILE)
        with pyarrow.OSFile(path, "wb") as stream, pyarrow.ipc.new_file(stream, schema) as out:
            while chunk := list(islice(records, CHUNK_ROWS)):
                out.write_batch(pyarrow.record_batch(self._columns_of(chunk), schema=schema))
        for entry in self.ledger.sources:
            entry.bad_rows = self.bad_rows.count.get(entry.name, 0)
            entry.bad_examples = self.bad_rows.examples.get(entry.name, [])
        index = self._index()
        _count(self.ledger, index, self.kept["truncated"] != 0)
        np.savez(folder / cache.INDEX_FILE, allow_pickle=False, **index)
        (folder / cache.LEDGER_FILE).write_text(json.dumps(self.ledger.to_json(), indent=1))

    def _columns_of(self, chunk: Sequence[Record]) -> list[pyarrow.Array]:
        """Tokens, labels and texts of some records."""
        import pyarrow

        documents = [self.kind.documents(record) for record in chunk]
        texts = zip(*(self.kind.texts_of(record) for record in chunk), strict=True)
        return [
            _column([[document.input_ids for document in of_record] for of_record in documents]),
            _column([[document.labels for document in of_record] for of_record in documents]),
            *(pyarrow.array(column, pyarrow.string()) for column in texts),
        ]

    def _records(self) -> Iterator[Record]:
        """The records that are kept, in order, each noted in `kept`; the others go to the ledger."""
        usable = understood(
            self.data, self.kind, self.split,
            seed=self.seed, report=self.report, ledger=self.ledger, bad_rows=self.bad_rows,
        )  # fmt: skip
        eval_hashes: set[int] = set()
        done, last_line = 0, time.monotonic()
        while chunk := list(islice(usable, CHUNK_ROWS)):
            tokenized = self._tokenized([row for row, _, _ in chunk])
            for (row, source, for_eval), (result, tokens) in zip(chunk, tokenized, strict=True):
                row_hash = content_hash(*self.kind.identity(row), self.seed)
                if for_eval:
                    eval_hashes.add(row_hash)
                elif row_hash in eval_hashes:
                    result = chat.Drop(IN_EVAL, row.place)
                entry = self.ledger.sources[source]
                if isinstance(result, chat.Drop):
                    self._drop(result, entry)
                    continue
                entry.note_turns(result.split, result.untrained, row.place)
                entry.note_control(tokens, BECAME[self.data.special_tokens_in_content], row.place)
                entry.further_documents += len(result.records) - 1
                first = True
                for made in result.records:
                    record = self._first_of_its_kind(row, self._fitted(made, row.place))
                    if isinstance(record, chat.Drop):
                        self._drop(record, entry)
                        continue
                    self._note(
                        record, row.place,
                        hashes=row_hash, source_ids=source, for_eval=for_eval, first=first,
                        truncated=record is not made, control=bool(tokens),
                    )  # fmt: skip
                    first = False
                    yield record
            done += len(chunk)
            if time.monotonic() - last_line > PROGRESS_SECONDS:
                self.report(f"tokenized {done:,} rows")
                last_line = time.monotonic()

    def _tokenized(self, rows: Sequence[Row]) -> Iterator[tuple[chat.Made[Record] | chat.Drop, list[str]]]:
        """One result per row, with the control tokens inside its contents, which become what the run asks."""
        known, mode = control.control_tokens(self.tokenizer), self.data.special_tokens_in_content
        found = [known.found(row) for row in rows]
        refuse = bool if mode is SpecialTokens.refuse else known.is_reserved
        refused = [next(filter(refuse, tokens), None) for tokens in found]
        guarded = [
            known.guarded(row) if tokens and mode is SpecialTokens.text else row
            for row, tokens, token in zip(rows, found, refused, strict=True)
            if token is None
        ]
        results = iter(self.kind.tokenize(guarded, self.tokenizer))
        for row, tokens, token in zip(rows, found, refused, strict=True):
            reason = f"a content holds the control token {token}"
            yield (next(results) if token is None else chat.Drop(reason, row.place, faulty=True)), tokens

    def _fitted(self, record: Record, place: Place) -> Record | chat.Drop:
        return self.kind.fit(record, place, self.data, self.tokenizer.bos_token_id)

    def _first_of_its_kind(self, row: Row, record: Record | chat.Drop) -> Record | chat.Drop:
        """The record, unless one was kept that says what only one may say."""
        said = self.kind.kept_once(row)
        if said is None or isinstance(record, chat.Drop):
            return record
        seen = content_hash(None, said, self.seed)
        if seen in self.seen:
            return chat.Drop(SAME, row.place)
        self.seen.add(seen)
        return record

    def _drop(self, drop: chat.Drop, entry: SourceLedger) -> None:
        if drop.faulty:
            self.bad_rows.add(entry.name, drop.place, drop.reason)
        else:
            entry.drop(drop.reason, drop.place)

    def _note(self, record: Record, place: Place, **numbers: float) -> None:
        """numbers: of `_Kept`, as far as they are not the record's own."""
        documents = self.kind.documents(record)
        self.kept.add(
            lengths=sum(len(document.input_ids) for document in documents),
            trained=sum(document.trained for document in documents),
            numbers=place.row,
            **numbers,
            **dict(zip(self.kind.numbers, self.kind.numbers_of(record), strict=True)),
        )

    def _index(self) -> dict[str, np.ndarray]:
        """Per record of the file: its numbers; and which records are whose."""
        hashes, source_ids = self.kept["hashes"], self.kept["source_ids"]
        for_eval = self.kept["for_eval"] != 0
        rows = ~for_eval & (self.kept["first"] != 0)  # documents of one row count once
        chosen = held_out(hashes[rows], source_ids[rows], self.data.held_out_fraction())
        for_eval |= np.isin(hashes, np.array(sorted(chosen), np.uint64))
        stored = ("lengths", "trained", "source_ids", "numbers", "control", *self.kind.numbers)
        return {
            **{name: self.kept[name] for name in stored},
            "train": np.flatnonzero(~for_eval),
            "eval": np.flatnonzero(for_eval),
        }


def _column(records: list[list[np.ndarray]]) -> pyarrow.ListArray:
    """One list per record, its documents end to end."""
    import pyarrow

    offsets = np.zeros(len(records) + 1, np.int32)
    np.cumsum([sum(map(len, documents)) for documents in records], out=offsets[1:])
    every = [document for documents in records for document in documents]
    return pyarrow.ListArray.from_arrays(offsets, np.concatenate(every))


def _count(ledger: Ledger, index: Mapping[str, np.ndarray], truncated: np.ndarray) -> None:
    """Fill in what is only known once every row was seen."""
    held = np.zeros(len(index["lengths"]), bool)
    held[index["eval"]] = True
    for number, entry in enumerate(ledger.sources):
        of_source = index["source_ids"] == number
        entry.rows_kept = int(of_source.sum())
        dropped = sum(drop.count for drop in entry.dropped.values())
        further = entry.further_pairs + entry.further_documents
        entry.rows_read = entry.rows_kept + dropped + entry.bad_rows - further
        entry.rows_held_out = int((of_source & held).sum())
        entry.tokens = int(index["lengths"][of_source].sum())
        entry.trained_tokens = int(index["trained"][of_source].sum())
        entry.truncated = int(truncated[of_source].sum())
