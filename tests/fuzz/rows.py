"""Files of rows: every kind of file, for every kind of rows; a part of a row is changed, or the file damaged.

Each case is the preview of a step, which reads, tokenizes and shows the rows as a run would.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pyarrow
import pyarrow.parquet
import zstandard

from common.config import DataConfig, OnBadRow, SourceConfig
from common.data import dataset
from common.data.dataset_types import DEMONSTRATIONS, PREFERENCES, PROMPTS, DatasetType
from common.runtime.logs import open_rank_log, run_and_report
from pipeline.config import CONF
from step1_sft import dry_run as demonstrations
from step1_sft.config import SFTConfig, SFTJob
from step2_reward import dry_run as pairs
from step2_reward.config import RewardConfig, RewardJob
from step3_ppo import dry_run as questions
from step3_ppo.config import PPOConfig, PPOJob
from tests.fuzz import odd
from tests.fuzz.driver import Raw, Silent, refused_or, shown_by
from tests.tiny import tiny_tokenizer

ASK, SAY = {"role": "user", "content": "Name river #."}, {"role": "assistant", "content": "The Elbe."}
TOOL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"id": "a", **TOOL}]}
EXAMPLES: dict[str, dict[str, dict[str, Any]]] = {
    "demonstrations": {
        "messages": {"messages": [ASK, SAY, ASK, {**SAY, "weight": 0}, ASK, SAY]},
        "tools": {"messages": [ASK, CALL, {"role": "tool", "content": "3"}, SAY], "tools": [TOOL]},
        "conversations": {
            "conversations": [{"from": "human", "value": "a #"}, {"from": "gpt", "value": "b"}],
        },
        "instruction": {"instruction": "a #", "input": "b", "output": "c", "history": [["d", "e"]]},
        "prompt/completion": {"prompt": "a #", "completion": "b", "system": "c"},
        "prompt/response": {"prompt": [ASK], "response": [SAY]},
        "question/answer": {"question": "\n\nHuman: a #\n\nAssistant:", "answer": "b"},
        "text": {"text": "hello hello #"},
    },
    "preferences": {
        "prompted": {"prompt": "a #", "chosen": "b", "rejected": "c", "margin": 1},
        "transcripts": {
            "chosen": "\n\nHuman: a #\n\nAssistant: b", "rejected": "\n\nHuman: a #\n\nAssistant: c",
        },
        "turns": {"prompt": [ASK], "chosen": [SAY], "rejected": [{**SAY, "content": "No."}]},
        "graded": {
            "question": "a #", "one": {"is_correct": True, "solution": "b"},
            "two": {"is_correct": False, "solution": "c"},
        },
    },
    "prompts": {
        "prompt": {"prompt": "a #", "answer": "b", "tags": ["c", 1]},
        "messages": {"messages": [ASK], "answer": 3.5},
        "question": {"question": "a #", "chat_template_kwargs": {"b": True}},
        "instruction": {"instruction": "a #", "input": "b"},
    },
}  # fmt: skip
"""A row of each format by what reads it; # is the number of the row."""
JOBS: dict[str, tuple[Any, Any, DatasetType[Any]]] = {
    "demonstrations": (demonstrations, lambda data: SFTJob(sft=SFTConfig(data)), DEMONSTRATIONS),
    "preferences": (pairs, lambda data: RewardJob(reward=RewardConfig(data=data)), PREFERENCES),
    "prompts": (questions, lambda data: PPOJob(ppo=PPOConfig(data=data)), PROMPTS),
}
FILES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".csv", ".parquet", ".arrow", ".stream.arrow")
ROWS = 5


class Case(NamedTuple):
    """A file of rows."""

    kind: str
    suffix: str
    content: bytes
    skip: bool
    """bad rows"""
    columns: dict[str, str]
    kept: int | None
    """rows that are whole, and must be used; None where that is not known"""
    lost: int | None
    """rows that nothing can use"""


class Rows:
    """Previews of steps."""

    name, share = "rows", 300

    def __init__(self) -> None:
        self.tokenizer = tiny_tokenizer((CONF / "chat_template" / "chatml.jinja").read_text())

    def draw(self, draw: random.Random) -> Case:
        """A file of which a row is changed, or bytes, or nothing."""
        kind = draw.choice(sorted(EXAMPLES))
        example, suffix = EXAMPLES[kind][draw.choice(sorted(EXAMPLES[kind]))], draw.choice(FILES)
        rows = [json.loads(json.dumps(example).replace("#", str(number))) for number in range(ROWS)]
        act = draw.choice(("row", "row", "cell", "bytes", "none"))
        kept: int | None = ROWS
        lost: int | None = 0
        if act in ("row", "cell"):
            place = draw.randrange(1, ROWS)
            kept, lost = ROWS - 1, None
            if act == "row":
                rows[place] = odd.changed(draw, rows[place])
            else:
                column = next(name for name in rows[place] if name != "prompt" or kind != "preferences")
                rows[place] = {**rows[place], column: draw.choice((None, True, 3, -0.5, {"a": 1}))}
                lost = 1
        content, is_exact = written(rows, suffix)
        if not is_exact:
            kept = lost = None
        if act == "bytes":
            content, kept, lost = odd.damaged(draw, content), None, None
        columns = {draw.choice(odd.TEXTS): draw.choice(odd.TEXTS)} if draw.random() < 0.05 else {}
        return Case(kind, suffix, content, draw.random() < 0.8, columns, None if columns else kept, lost)

    def outcome(self, case: Case, folder: Path) -> str:
        """Whole rows are used, others counted; what is shown is text."""
        path = folder / f"rows{case.suffix}"
        path.write_bytes(case.content)
        program, job_of, kind = JOBS[case.kind]
        cache = folder / "cache"
        job = job_of(
            DataConfig(
                sources=[SourceConfig(path=str(path), columns=case.columns)],
                on_bad_row=OnBadRow.skip if case.skip else OnBadRow.error,
                cache_dir=str(cache),
                eval_fraction=0.0,
            )
        )
        with self._tokenizer_at_hand(), _logging_into(folder):
            status, printed = shown_by(
                lambda: run_and_report(lambda: program.preview(job, folder) or 0, folder)
            )
        if signs := odd.raw((folder / "rank_0.log").read_text()):
            raise Raw(f"{signs!r} in the log")
        outcome = refused_or("used", status, printed)
        if outcome == "refused":
            if case.kept == ROWS or (case.kept is not None and case.skip and case.suffix != ".json"):
                raise Silent(f"whole rows were refused: {printed}")
            return outcome
        (made,) = cache.iterdir()
        train, _, ledger = dataset.load(made, kind)
        (entry,) = ledger.sources
        self._judge(case, entry, len(train))
        return "skipped" if entry.bad_rows else outcome

    @staticmethod
    def _judge(case: Case, entry: Any, kept: int) -> None:
        if case.kept is not None and entry.rows_kept - entry.further_documents < case.kept:
            raise Silent(f"{case.kept} rows are whole, used are {entry.rows_kept}: {entry}")
        if case.lost and entry.bad_rows < case.lost:
            raise Silent(f"a row with a cell of another type was used: {entry}")
        if case.suffix == ".jsonl" and not kept > entry.rows_kept:
            content = case.content.removeprefix(b"\xef\xbb\xbf")
            lines = sum(bool(line.strip()) for line in content.split(b"\n"))
            if lines != entry.rows_read:
                raise Silent(f"{lines} lines, of which {entry.rows_read} were read: {entry}")

    @contextlib.contextmanager
    def _tokenizer_at_hand(self) -> Iterator[None]:
        """Reading one from a folder takes longer than the rows."""
        load = mock.Mock(return_value=self.tokenizer)
        with (
            mock.patch("step1_sft.dry_run.load_sft_tokenizer", load),
            mock.patch("common.training.preview.load_tokenizer", load),
            mock.patch("step3_ppo.dry_run.load_tokenizer", load),
        ):
            yield


@contextlib.contextmanager
def _logging_into(folder: Path) -> Iterator[None]:
    """As a rank does."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    open_rank_log(folder, 0)
    try:
        yield
    finally:
        root.handlers[0].close()
        root.handlers[:], root.level = before, level
        logging.captureWarnings(False)


def written(rows: Sequence[Any], suffix: str) -> tuple[bytes, bool]:
    """The rows as a file of this kind; and whether all of them are in it as they are."""
    lines = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    if suffix == ".jsonl.gz":
        return gzip.compress(lines, 1, mtime=0), True
    if suffix == ".jsonl.zst":
        return zstandard.compress(lines), True
    if suffix == ".json":
        return json.dumps(rows).encode(), True
    if suffix == ".csv":
        return _csv(rows), False
    if suffix == ".jsonl":
        return lines, True
    return _columns(rows, suffix)


def _csv(rows: Sequence[Any]) -> bytes:
    names = list(rows[0])
    cells = [[row.get(name) if isinstance(row, dict) else row for name in names] for row in rows]
    quoted = [[json.dumps(str(cell)).replace('\\"', '""') for cell in line] for line in [names, *cells]]
    return "\n".join(",".join(line) for line in quoted).encode("utf-8", "surrogatepass")


def _columns(rows: Sequence[Any], suffix: str) -> tuple[bytes, bool]:
    try:
        content = _table(list(rows), suffix)
        return content, _kinds(pyarrow.Table.from_pylist(list(rows)).to_pylist()) == _kinds(rows)
    except (pyarrow.ArrowException, OSError, TypeError, AttributeError, ValueError, OverflowError):
        return _table([{name: str(cell) for name, cell in rows[0].items()}], suffix), False


def _kinds(value: Any) -> Any:
    """The value with the kind of each part, without nulls. A column has one kind, and makes 1.0 of True."""
    if isinstance(value, dict):
        return {name: _kinds(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_kinds(inner) for inner in value]
    return type(value), repr(value)


def _table(rows: list[Any], suffix: str) -> bytes:
    table, out = pyarrow.Table.from_pylist(rows), pyarrow.BufferOutputStream()
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, out)
        pyarrow.parquet.ParquetFile(pyarrow.BufferReader(out.getvalue()))  # it writes deeper than it reads
    else:
        new = pyarrow.ipc.new_stream if suffix.startswith(".stream") else pyarrow.ipc.new_file
        with new(out, table.schema) as writer:
            writer.write_table(table)
    return bytes(out.getvalue().to_pybytes())
