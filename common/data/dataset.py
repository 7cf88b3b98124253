"""Sources -> a tokenized data set on disk, split into training and held-out documents.

Takes a `DataConfig` and a tokenizer, gives two `TokenizedDataset`s and the ledger of what became of
each row. The rows lie in one memory-mapped Arrow file, in a folder named by a hash of everything that
decides them: the bytes of the sources, the tokenizer, the chat template, this code and the options. A
folder appears under its name only when it is whole. Memory stays flat however many rows there are
(a few numbers per row). Does not pack and does not make batches.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import socket
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.config import DataConfig, SourceConfig
from common.data import chat, formats, sources
from common.data.types import Conversation, Place, TokenizedExample
from common.errors import UserError

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerFast

CHUNK_ROWS = 1024
"""Rows tokenized and written at once."""

PLACES_KEPT = 5
"""Places of dropped rows named in the ledger, per reason."""

PROGRESS_SECONDS = 10.0
"""Between two lines of progress."""

IN_EVAL = "also in data.eval_path"

ROWS_FILE, INDEX_FILE, LEDGER_FILE, KEY_FILE = "rows.arrow", "index.npz", "ledger.json", "key.json"

Report = Callable[[str], None]


@dataclass
class Dropped:
    """Rows left out for one reason; the first few by place."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: Place) -> None:
        self.count += 1
        if len(self.places) < PLACES_KEPT:
            self.places.append(str(place))


@dataclass
class SourceLedger:
    """What became of the rows of one source. Tokens are counted over kept rows, held out or not."""

    name: str
    path: str
    format: str = ""
    rows_read: int = 0
    rows_kept: int = 0
    rows_held_out: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated: int = 0
    bad_rows: int = 0
    bad_examples: list[str] = field(default_factory=list)
    dropped: dict[str, Dropped] = field(default_factory=dict)


@dataclass
class Ledger:
    """The account of a whole data set, one entry per source."""

    sources: list[SourceLedger] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Ledger:
        """The inverse of `to_json`."""
        entries = []
        for entry in value["sources"]:
            dropped = {reason: Dropped(**drop) for reason, drop in entry["dropped"].items()}
            entries.append(SourceLedger(**{**entry, "dropped": dropped}))
        return cls(entries)

    def lines(self) -> list[str]:
        """A plain-text table, and below it why rows were dropped."""
        head = ("source", "format", "read", "kept", "held out", "tokens", "trained", "cut", "bad", "dropped")
        table = [head, *(_cells(entry) for entry in self.sources)]
        widths = [max(len(row[column]) for row in table) for column in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table
        ]
        for entry in self.sources:
            lines += [f"skipped from {entry.name}: {example}" for example in entry.bad_examples]
            for reason, drop in entry.dropped.items():
                more = ", ..." if drop.count > len(drop.places) else ""
                places = ", ".join(drop.places)
                lines.append(f"dropped from {entry.name}: {drop.count} × {reason} ({places}{more})")
        return lines


def _cells(entry: SourceLedger) -> tuple[str, ...]:
    numbers = (entry.rows_read, entry.rows_kept, entry.rows_held_out, entry.tokens, entry.trained_tokens)
    dropped = sum(drop.count for drop in entry.dropped.values())
    return (
        entry.name,
        entry.format,
        *(f"{n:,}" for n in (*numbers, entry.truncated, entry.bad_rows, dropped)),
    )


class TokenizedDataset:
    """Documents read from a memory-mapped file.

    lengths: int32 [D] tokens. trained: int32 [D] trained tokens. source_ids: int32 [D], indices into
    `sources`. fingerprint: hash of everything that decided the rows, and of which part this is.
    """

    def __init__(self, folder: Path, index: Mapping[str, np.ndarray], names: list[str], part: str) -> None:
        # a row of the file belongs to one part; `rows` says which rows are this part's
        rows = index[part]
        self.sources = names
        self.lengths = index["lengths"][rows]
        self.trained = index["trained"][rows]
        self.source_ids = index["source_ids"][rows]
        self.fingerprint = f"{folder.name}-{part}"
        self._numbers = index["numbers"]
        self._rows = rows
        self._file = folder / ROWS_FILE
        self._opened: _Columns | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> TokenizedExample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        if self._opened is None:
            self._opened = _Columns(self._file)
        ids, labels = self._opened[int(self._rows[index])]
        return TokenizedExample(ids, labels, self.sources[int(self.source_ids[index])])

    def place(self, index: int) -> str:
        """Where the document came from: source and row (line of a JSONL file), for messages."""
        return f"{self.sources[int(self.source_ids[index])]}:{self._numbers[self._rows[index]]}"


class _Columns:
    """The two columns of the file as views into the mapped memory, without a copy."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
        self._batches = [
            tuple(
                (_numbers(column.offsets), _numbers(column.values))
                for column in reader.get_batch(number).columns
            )
            for number in range(reader.num_record_batches)
        ]

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        batch, within = divmod(row, CHUNK_ROWS)
        ids, labels = (
            values[offsets[within] : offsets[within + 1]] for offsets, values in self._batches[batch]
        )
        return ids, labels


def _numbers(array: pyarrow.Array) -> np.ndarray:
    """An int32 array as a view; pyarrow's own `to_numpy` imports pandas, half a second of every start."""
    return np.frombuffer(array.buffers()[1], np.int32, len(array), 4 * array.offset)


def build(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    cache_dir: Path | str,
    report: Report = print,
    wait: bool = False,
) -> tuple[TokenizedDataset, TokenizedDataset | None, Ledger]:
    """Training documents, held-out documents (None when there are none) and the ledger.

    Taken from the cache when all that decides them is unchanged; otherwise made, saying what changed.
    With `wait` this process does not build but waits for the one that does (see `wait_for`).
    Raises UserError for bad data, and when no row is left to train on.
    """
    if not data.all_sources():
        raise UserError("no data is named", hint="set data.path, or data.sources")
    root = Path(cache_dir)
    key = cache_key(data, tokenizer, seed=seed)
    folder = root / _digest(key)
    if wait:
        wait_for(folder, report=report)
    elif not _is_whole(folder):
        report(_why_missed(root, key))
        with _new_folder(folder) as unfinished:
            _write(data, tokenizer, unfinished, seed=seed, report=report)
            _seal(unfinished, key)
    train, held_out, ledger = load(folder)
    if data.eval_path is not None and held_out is None:
        raise UserError(
            f"data.eval_path={data.eval_path}: no row is left to evaluate on",
            hint="\n  ".join(["see what became of them:", *ledger.lines()]),
        )
    return train, held_out, ledger


def load(folder: Path) -> tuple[TokenizedDataset, TokenizedDataset | None, Ledger]:
    """What `build` left in its folder."""
    ledger = Ledger.from_json(json.loads((folder / LEDGER_FILE).read_text()))
    names = [entry.name for entry in ledger.sources]
    with np.load(folder / INDEX_FILE) as stored:
        index = {name: stored[name] for name in stored.files}
    train = TokenizedDataset(folder, index, names, "train")
    held_out = TokenizedDataset(folder, index, names, "eval")
    if not len(train):
        reasons = "; ".join(ledger.lines()[1 + len(ledger.sources) :]) or "all rows are held out"
        raise UserError(f"no row is left to train on: {reasons}", hint="see data.max_length, data.truncation")
    return train, held_out if len(held_out) else None, ledger


def wait_for(folder: Path, *, report: Report = print, silence: float = 1800.0, poll: float = 0.2) -> None:
    """Return once `folder` is whole, built by another process that shares the file system.

    No collective is involved, so nothing times out while a builder makes progress. Raises UserError
    when for `silence` seconds there was neither the folder nor a sign of a builder at work.
    """
    signs: set[tuple[str, int]] = set()
    last_sign = last_line = time.monotonic()
    while not _is_whole(folder):
        now = time.monotonic()
        seen = _signs(folder)
        if seen != signs:
            signs, last_sign = seen, now
        if now - last_sign > silence:
            raise UserError(
                f"{folder}: waited {silence:.0f} s for another process to tokenize the data, and none did",
                hint="see the log of the first rank on this machine; data.cache_dir must be shared",
            )
        if now - last_line > 60:
            report("waiting for another process to tokenize the data")
            last_line = now
        time.sleep(poll)


def conversations(
    data: DataConfig,
    *,
    seed: int,
    report: Report = print,
    ledger: Ledger | None = None,
    bad_rows: sources.BadRows | None = None,
) -> Iterator[tuple[Conversation, int, bool]]:
    """All usable rows, as (conversation, index into the ledger's sources, whether from eval_path).

    Those of `eval_path` come first, then the sources in order. Bad rows are treated as the
    configuration says; `ledger` gets its entries, and `bad_rows` counts.
    """
    ledger = Ledger() if ledger is None else ledger
    if bad_rows is None:
        bad_rows = sources.BadRows(data.on_bad_row, data.max_bad_rows, report)
    named = _named_sources(data)
    ledger.sources[:] = [SourceLedger(name, source.path) for name, source in named]
    count = len(data.all_sources())
    for number in [*range(count, len(named)), *range(count)]:
        name, source = named[number]
        entry = ledger.sources[number]
        for conversation in _understood(
            dataclasses.replace(source, name=name), bad_rows, entry, seed, report
        ):
            yield conversation, number, number >= count


def training_texts(data: DataConfig, *, seed: int, report: Report = print) -> Iterator[str]:
    """Contents of all rows that are not held out, e.g. to train a tokenizer on; reads the data twice."""
    hashes, source_ids = array("Q"), array("i")
    eval_hashes: set[int] = set()
    for conversation, source, for_eval in conversations(data, seed=seed, report=report):
        row_hash = content_hash(conversation, seed)
        if for_eval:
            eval_hashes.add(row_hash)
        else:
            hashes.append(row_hash)
            source_ids.append(source)
    eval_hashes |= held_out(np.array(hashes), np.array(source_ids), data.held_out_fraction())
    for conversation, _, _ in conversations(data, seed=seed, report=lambda line: None):
        if content_hash(conversation, seed) not in eval_hashes:
            if conversation.text is not None:
                yield conversation.text
            yield from (message.content for message in conversation.messages)


def source_weights(data: DataConfig) -> dict[str, float]:
    """`weight` of each source under the name it has in the ledger and in `TokenizedDataset.sources`."""
    return {name: source.weight for name, source in _named_sources(data)}


def content_hash(conversation: Conversation, seed: int) -> int:
    """64 bits of what the row says (not of where it stands), different for each seed."""
    turns = [(message.role, message.content, message.extra) for message in conversation.messages]
    said = json.dumps([conversation.text, turns], sort_keys=True, default=str).encode()
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


# from sources to documents


def _named_sources(data: DataConfig) -> list[tuple[str, SourceConfig]]:
    """The training sources, then eval_path if any, each with a name of its own."""
    every = data.all_sources()
    if data.eval_path is not None:
        every.append(SourceConfig(path=data.eval_path))
    named: list[tuple[str, SourceConfig]] = []
    for source in every:
        name = sources.source_name(source)
        taken = {other for other, _ in named}
        numbered = (f"{name}-{number}" for number in range(2, len(every) + 2))
        named.append((name if name not in taken else next(n for n in numbered if n not in taken), source))
    return named


def _understood(
    source: SourceConfig, bad_rows: sources.BadRows, entry: SourceLedger, seed: int, report: Report
) -> Iterator[Conversation]:
    format: formats.Format | None = None
    for raw in sources.rows_of(source, bad_rows, seed=seed):
        try:
            if format is None:
                renamed = formats.rename(raw.columns, source.columns)
                format = formats.recognise(renamed, name=source.format, origin=str(raw.place))
                entry.format = format.name
                report(f"{entry.name}: format {format.name} (columns {', '.join(raw.columns)})")
            yield formats.to_conversation(raw, format, source.columns)
        except sources.RowError as error:
            bad_rows.add(entry.name, raw.place, str(error))


@dataclass
class _Rows:
    """What is remembered of each document while its tokens go to disk: a few numbers."""

    hashes: array[int] = field(default_factory=lambda: array("Q"))
    source_ids: array[int] = field(default_factory=lambda: array("i"))
    lengths: array[int] = field(default_factory=lambda: array("i"))
    trained: array[int] = field(default_factory=lambda: array("i"))
    truncated: array[int] = field(default_factory=lambda: array("b"))
    for_eval: array[int] = field(default_factory=lambda: array("b"))
    numbers: array[int] = field(default_factory=lambda: array("i"))


def _write(
    data: DataConfig, tokenizer: PreTrainedTokenizerFast, folder: Path, *, seed: int, report: Report
) -> None:
    """Fill `folder` with rows, index and ledger."""
    import pyarrow

    ledger, rows = Ledger(), _Rows()
    column = pyarrow.list_(pyarrow.int32())
    schema = pyarrow.schema([("input_ids", column), ("labels", column)])
    documents = _documents(data, tokenizer, ledger, rows, seed=seed, report=report)
    path = str(folder / ROWS_FILE)
    with pyarrow.OSFile(path, "wb") as stream, pyarrow.ipc.new_file(stream, schema) as out:
        while chunk := list(islice(documents, CHUNK_ROWS)):
            columns = [_column([d.input_ids for d in chunk]), _column([d.labels for d in chunk])]
            out.write_batch(pyarrow.record_batch(columns, schema=schema))
    index = _index(rows, data.held_out_fraction())
    _count(ledger, index, rows)
    np.savez(folder / INDEX_FILE, allow_pickle=False, **index)
    (folder / LEDGER_FILE).write_text(json.dumps(ledger.to_json(), indent=1))


def _documents(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    ledger: Ledger,
    rows: _Rows,
    *,
    seed: int,
    report: Report,
) -> Iterator[TokenizedExample]:
    """The documents that are kept, in order, each noted in `rows`; the others go to the ledger."""
    bad_rows = sources.BadRows(data.on_bad_row, data.max_bad_rows, report)
    usable = conversations(data, seed=seed, report=report, ledger=ledger, bad_rows=bad_rows)
    eval_hashes: set[int] = set()
    done, last_line = 0, time.monotonic()
    while chunk := list(islice(usable, CHUNK_ROWS)):
        tokenized = chat.tokenize([conversation for conversation, _, _ in chunk], tokenizer)
        for (conversation, source, for_eval), result in zip(chunk, tokenized, strict=True):
            entry, row_hash = ledger.sources[source], content_hash(conversation, seed)
            if for_eval:
                eval_hashes.add(row_hash)
            elif row_hash in eval_hashes:
                result = chat.Drop(IN_EVAL, conversation.place)
            document = _fitted(result, conversation.place, data, tokenizer)
            if isinstance(document, chat.Drop):
                _drop(document, entry, bad_rows)
                continue
            rows.hashes.append(row_hash)
            rows.source_ids.append(source)
            rows.lengths.append(len(document.input_ids))
            rows.trained.append(document.trained)
            rows.truncated.append(document is not result)
            rows.numbers.append(conversation.place.row)
            rows.for_eval.append(for_eval)
            yield document
        done += len(chunk)
        if time.monotonic() - last_line > PROGRESS_SECONDS:
            report(f"tokenized {done:,} rows")
            last_line = time.monotonic()
    for entry in ledger.sources:
        entry.bad_rows = bad_rows.count.get(entry.name, 0)
        entry.bad_examples = bad_rows.examples.get(entry.name, [])


def _fitted(
    result: TokenizedExample | chat.Drop,
    place: Place,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
) -> TokenizedExample | chat.Drop:
    if isinstance(result, chat.Drop):
        return result
    return chat.fit(result, place, data.max_length, data.truncation, tokenizer.bos_token_id)


def _drop(drop: chat.Drop, entry: SourceLedger, bad_rows: sources.BadRows) -> None:
    if not drop.faulty:
        entry.dropped.setdefault(drop.reason, Dropped()).add(drop.place)
        return
    bad_rows.add(entry.name, drop.place, drop.reason)


def _column(arrays: list[np.ndarray]) -> pyarrow.ListArray:
    import pyarrow

    offsets = np.zeros(len(arrays) + 1, np.int32)
    np.cumsum([len(values) for values in arrays], out=offsets[1:])
    return pyarrow.ListArray.from_arrays(offsets, np.concatenate(arrays))


def _index(rows: _Rows, fraction: float) -> dict[str, np.ndarray]:
    """Per row of the file: lengths, trained tokens, source and row number there; which rows are whose."""
    # views, not copies: with a million rows these numbers are most of the memory in use
    hashes, source_ids = np.frombuffer(rows.hashes, np.uint64), np.frombuffer(rows.source_ids, np.int32)
    for_eval = np.frombuffer(rows.for_eval, np.int8) != 0
    chosen = held_out(hashes[~for_eval], source_ids[~for_eval], fraction)
    for_eval |= np.isin(hashes, np.array(sorted(chosen), np.uint64))
    return {
        "lengths": np.frombuffer(rows.lengths, np.int32),
        "trained": np.frombuffer(rows.trained, np.int32),
        "source_ids": source_ids,
        "numbers": np.frombuffer(rows.numbers, np.int32),
        "train": np.flatnonzero(~for_eval),
        "eval": np.flatnonzero(for_eval),
    }


def _count(ledger: Ledger, index: Mapping[str, np.ndarray], rows: _Rows) -> None:
    """Fill in what is only known once every row was seen."""
    held = np.zeros(len(index["lengths"]), bool)
    held[index["eval"]] = True
    truncated = np.frombuffer(rows.truncated, np.int8) != 0
    for number, entry in enumerate(ledger.sources):
        of_source = index["source_ids"] == number
        entry.rows_kept = int(of_source.sum())
        dropped = sum(drop.count for drop in entry.dropped.values())
        entry.rows_read = entry.rows_kept + dropped + entry.bad_rows
        entry.rows_held_out = int((of_source & held).sum())
        entry.tokens = int(index["lengths"][of_source].sum())
        entry.trained_tokens = int(index["trained"][of_source].sum())
        entry.truncated = int(truncated[of_source].sum())


# the cache


def cache_key(data: DataConfig, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> dict[str, Any]:
    """Everything that decides the tokenized rows, part by part, as JSON values."""
    named = _named_sources(data)
    reading = {
        name: {
            "split": source.split,
            "revision": source.revision,
            "max_rows": source.max_rows,
            "format": source.format,
            "columns": dict(source.columns),
        }
        for name, source in named
    }
    options = {
        "seed": seed,
        "max_length": data.max_length,
        "truncation": data.truncation.value,
        "eval_fraction": data.held_out_fraction(),
        "eval_path": data.eval_path is not None,
        "on_bad_row": data.on_bad_row.value,
        "max_bad_rows": data.max_bad_rows,
        "sources": reading,
    }
    return {
        "rows": {name: sources.content_hash(source) for name, source in named},
        "tokenizer": chat.tokenizer_hash(tokenizer),
        "chat_template": chat.template_hash(tokenizer),
        "code": _code_version(),
        "options": options,
    }


def _code_version() -> str:
    """Hash of the modules that turn rows into tokens: a change of code is a miss, with no number to bump."""
    total = hashlib.blake2b(digest_size=16)
    for module in (chat, formats, sources):
        total.update(Path(str(module.__file__)).read_bytes())
    total.update(Path(__file__).read_bytes())
    return total.hexdigest()


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=12).hexdigest()


def _is_whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / KEY_FILE).read_text())["bytes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _seal(folder: Path, key: Mapping[str, Any]) -> None:
    sizes = {name: (folder / name).stat().st_size for name in (ROWS_FILE, INDEX_FILE, LEDGER_FILE)}
    (folder / KEY_FILE).write_text(json.dumps({"key": key, "bytes": sizes}, indent=1))


def _why_missed(root: Path, key: Mapping[str, Any]) -> str:
    """Which parts of the key differ from the newest data set in the cache."""
    entries = sorted(root.glob(f"*/{KEY_FILE}"), key=lambda path: path.stat().st_mtime_ns)
    for path in reversed(entries):
        try:
            before = _flat(json.loads(path.read_text())["key"])
        except (OSError, ValueError, KeyError):
            continue
        now = _flat(key)
        names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        if not names:
            return "tokenizing; the cached rows are damaged"
        changes = [
            f"{name} {before.get(name)} -> {now.get(name)}" if name.startswith("options.") else name
            for name in names
        ]
        return "tokenizing; changed since the last time: " + "; ".join(changes)
    return f"tokenizing; nothing is cached yet in {root}"


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            flat |= _flat(inner, f"{prefix}{key}.")
        else:
            flat[prefix + key] = inner
    return flat


def _signs(folder: Path) -> set[tuple[str, int]]:
    """What grows while a builder is at work."""
    signs = set()
    for path in _unfinished(folder):
        with suppress(OSError):  # it may be renamed while we look
            signs.add((path.name, (path / ROWS_FILE).stat().st_size))
    return signs


def _unfinished(folder: Path) -> list[Path]:
    return list(folder.parent.glob(f"{folder.name}.tmp-*"))


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when the block ends well and vanishes when it does not."""
    here = f"{socket.gethostname()}-"
    unfinished = folder.parent / f"{folder.name}.tmp-{here}{os.getpid()}"
    try:
        for left in _unfinished(folder):  # by builders on this machine that were killed
            owner = left.name.rpartition("-")[2]
            if f".tmp-{here}" in left.name and owner.isdigit() and not Path(f"/proc/{owner}").exists():
                shutil.rmtree(left, ignore_errors=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        if folder.exists() and not _is_whole(folder):
            shutil.rmtree(folder)
        try:
            os.rename(unfinished, folder)
        except OSError:
            if not _is_whole(folder):  # else another process was faster, with the same rows
                raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"data.cache_dir={folder.parent}: tokenized rows cannot be written: {reason}",
            hint="make room or choose another folder with data.cache_dir",
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
