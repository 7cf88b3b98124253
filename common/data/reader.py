"""Sources -> usable rows, in order, each in the nouns of `types.py` and with the run's settings.

Gives rows of one type (`dataset_types.py`) and notes in the ledger what became of the others. A source's
format is recognised once, from its first row. Knows nothing of tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from common.config import DataConfig, SourceConfig, TrainOn
from common.data import sources
from common.data.columns import rename
from common.data.dataset_types import DatasetType
from common.data.ledger import BadRows, Ledger, SourceLedger
from common.data.outcomes import RowError, RowUnused
from common.data.splits import question
from common.data.stages import OTHER_STAGE, StageSplit
from common.data.types import Conversation, Message, Preference, RawExample, Row
from common.download import origin_of
from common.errors import UserError

Report = Callable[[str], None]


def named_sources(data: DataConfig) -> list[tuple[str, SourceConfig]]:
    """The training sources, then eval_path if any, each with a name of its own."""
    every = data.all_sources()
    if data.eval_path is not None:
        every.append(_eval_source(data, data.eval_path))
    if data.streaming or any(isinstance(source, sources.StreamedSource) for source in every):
        every = [sources.streamed(source) for source in every]
    named: list[tuple[str, SourceConfig]] = []
    for source in every:
        name = sources.source_name(source)
        taken = {other for other, _ in named}
        numbered = (f"{name}-{number}" for number in range(2, len(every) + 2))
        named.append((name if name not in taken else next(n for n in numbered if n not in taken), source))
    return named


def _eval_source(data: DataConfig, path: str) -> SourceConfig:
    """The held-out rows, to be read as the training sources are when these are all read alike; of a hub data
    set that is trained on too, the same subset and revision."""
    first, *others = data.all_sources()
    same = next((source for source in (first, *others) if source.path == path), SourceConfig())
    source = SourceConfig(
        path=path, subset=same.subset, revision=same.revision, split=data.eval_split or "train"
    )
    if any((other.format, other.columns) != (first.format, first.columns) for other in others):
        return source
    return dataclasses.replace(source, format=first.format, columns=first.columns)


@dataclass
class Understanding:
    """How a source's rows are read: their format, and the `columns` by which they are renamed first."""

    format: Any = None
    names: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Reader:
    """The rows of all sources; what cannot be used is counted in `ledger`, and bad rows in `bad_rows` too."""

    data: DataConfig
    kind: DatasetType[Any]
    split: StageSplit
    seed: int
    report: Report = print
    ledger: Ledger = field(default_factory=Ledger)

    def __post_init__(self) -> None:
        self.bad_rows = BadRows(self.data.on_bad_row, self.data.max_bad_rows, self.report)

    def rows(self) -> Iterator[tuple[Any, int, bool]]:
        """All usable rows, as (row, index into the ledger's sources, whether from eval_path).

        The rows of `eval_path` come first, then the sources in order. `split` leaves out the rows of other
        steps.
        """
        for number, source, for_eval in self.each_source():
            entry = self.ledger.sources[number]
            bad_row = partial(self.bad_rows.add, entry)
            raws = sources.rows_of(source, bad_row, seed=self.seed)
            for row in self.understood(raws, source, entry, for_eval, Understanding()):
                yield row, number, for_eval

    def each_source(self) -> Iterator[tuple[int, SourceConfig, bool]]:
        """The sources in the order in which they are read, with their places in the ledger, which begins
        anew, and whether they are eval_path's."""
        named = named_sources(self.data)
        self.ledger.sources[:] = [
            SourceLedger(name, origin_of(source.path) or source.path) for name, source in named
        ]
        count = len(self.data.all_sources())
        for number in [*range(count, len(named)), *range(count)]:
            name, source = named[number]
            yield number, dataclasses.replace(source, name=name), number >= count

    def understood(
        self,
        raws: Iterable[RawExample],
        source: SourceConfig,
        entry: SourceLedger,
        for_eval: bool,
        known: Understanding,
    ) -> Iterator[Any]:
        """The usable rows among `raws`, which are the source's or some of them. known: filled in by the first
        row of a source."""
        bad_row = partial(self.bad_rows.add, entry)
        seen: set[str] = set()
        for raw in raws:
            try:
                if known.format is None:
                    found = (self._format_of_eval if for_eval else self._format)(raw, source)
                    known.format, known.names = found
                    entry.format = known.format.name
                    self.report(f"{entry.name}: format {entry.format} (columns {', '.join(raw.columns)})")
                if not seen.issuperset(raw.columns):
                    entry.not_used(known.format.unused(rename(raw.columns, known.names)))
                    seen.update(raw.columns)
                read = self.kind.read(raw, known.format, known.names)
            except RowUnused as reason:
                entry.drop(str(reason), raw.place)
            except RowError as error:
                bad_row(raw.place, str(error))
            else:
                rows = read if isinstance(read, list) else [read]
                entry.further_pairs += len(rows) - 1
                for row in rows:
                    if for_eval or self.split.has(question(row)):
                        yield with_options(row, self.data)
                    else:
                        entry.drop(OTHER_STAGE, row.place)

    def _format(
        self, raw: RawExample, source: SourceConfig, origin: str = ""
    ) -> tuple[Any, Mapping[str, str]]:
        """The format of a source whose first row is `raw`, and the `columns` by which it is renamed."""
        for ours, theirs in source.columns.items():
            if theirs not in raw.columns:
                raise UserError(
                    f"data.sources.columns reads {ours} from {theirs}, and {raw.place} has no such column "
                    f"(columns: {', '.join(raw.columns) or 'none'})",
                    hint="columns are written {our name: theirs}, e.g. {prompt: query}",
                )
        renamed = rename(raw.columns, source.columns)
        origin = origin or str(raw.place)
        return self.kind.recognise(renamed, name=source.format, origin=origin), source.columns

    def _format_of_eval(self, raw: RawExample, source: SourceConfig) -> tuple[Any, Mapping[str, str]]:
        """The same of data.eval_path: as the training sources are read, or else by its own columns."""
        with contextlib.suppress(RowError, UserError):
            return self._format(raw, source)
        try:
            return self._format(raw, SourceConfig(path=source.path), f"data.eval_path, {raw.place}")
        except UserError as error:
            hint = f"{error.hint}; data.eval_path is read by those too when all of data.sources have the same"
            raise UserError(error.message, hint=hint) from error


def with_options(row: Row, data: DataConfig) -> Row:
    """The row with the run's settings: template variables (the row's own take precedence), and which turns
    are trained."""
    if not data.chat_template_kwargs and data.train_on is TrainOn.all_turns:
        return row
    variables = {**data.chat_template_kwargs, **row.context.variables}
    changed: dict[str, Any] = {"context": dataclasses.replace(row.context, variables=variables)}
    if data.train_on is TrainOn.last_turn:
        if isinstance(row, Conversation):
            changed["messages"] = _last_alone(row.messages)
        elif isinstance(row, Preference):
            changed |= {"chosen": _last_alone(row.chosen), "rejected": _last_alone(row.rejected)}
    return dataclasses.replace(row, **changed)


def _last_alone(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns, with only the last assistant turn trained."""
    last = max((at for at, message in enumerate(messages) if message.role == "assistant"), default=-1)
    return tuple(
        dataclasses.replace(message, trained=message.trained and at == last)
        for at, message in enumerate(messages)
    )
