"""Data sets saved to disk with the `datasets` library, or on the hub -> their rows.

Pictures, sound and the like are left as they are stored. Files without that library are read in `files.py`.
A data set of the hub is fetched whole, or (`streamed_records`) while its rows are read, a part of a file at a
time: the rows and their order are the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.config import SourceConfig
from common.data.files import Records, check_row, checked_columns, in_blocks
from common.data.types import Place
from common.errors import UserError
from common.hub_data import reason_of, unreachable


def saved_records(dataset: Any, name: str) -> Records:
    def rows() -> Iterator[tuple[Place, object]]:
        decoded = _undecoded(dataset)
        stored = decoded.with_format("arrow")

        def read(start: int, count: int) -> list[object]:
            checked_columns(stored[start : start + count])
            columns = decoded[start : start + count]
            return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]

        for index, row in enumerate(in_blocks(len(decoded), read), start=1):
            yield Place(name, index), row

    return Records(rows, check_row, columnar=True)


def _undecoded(dataset: Any) -> Any:
    """The data set with pictures, sound and the like left as stored: no text is made from them, and to decode
    them takes further libraries. JSON is decoded."""
    import datasets

    def stored(feature: Any) -> Any:
        if isinstance(feature, dict):
            return {name: stored(inner) for name, inner in feature.items()}
        if isinstance(feature, list):
            return [stored(inner) for inner in feature]
        if (of_list := getattr(feature, "feature", None)) is not None:
            return dataclasses.replace(feature, feature=stored(of_list))
        if getattr(feature, "decode", False) and not isinstance(feature, datasets.Json):
            return dataclasses.replace(feature, decode=False)
        return feature

    for name, feature in dataset.features.items():
        if stored(feature) != feature:
            dataset = dataset.cast_column(name, stored(feature))
    return dataset


def load_saved(path: Path, split: str) -> Any:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise UserError(
            f"{path}: not a readable saved data set: {error}", hint="correct data.path"
        ) from error
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if split not in loaded:
        raise UserError(f"{path}: no split {split}", hint=f"data.sources.split is one of {', '.join(loaded)}")
    return loaded[split]


def load_hub(source: SourceConfig) -> Any:
    """The data set, fetched whole."""
    return _asked_of_hub(source)


def _asked_of_hub(source: SourceConfig, **options: Any) -> Any:
    import datasets

    try:
        return datasets.load_dataset(
            source.path, name=source.subset, split=source.split, revision=source.revision, **options
        )
    except Exception as error:  # the library raises a dozen kinds for "not there" and "no network"
        raise unreachable(source.path, "data.path", error) from error


PART_ROWS = 1024
"""Rows of a streamed data set that are read at once."""


def streamed_records(source: SourceConfig) -> Records:
    """The rows of a hub data set, each file asked for when its first row is wanted. source: with its commit.

    UserError where it breaks off: the library asks again for some minutes before.
    """
    return Records(lambda: _streamed_rows(source), check_row, columnar=True)


def _streamed_rows(source: SourceConfig) -> Iterator[tuple[Place, object]]:
    dataset, count = _asked_of_hub(source, streaming=True), 0
    parts = _parts(dataset)
    while (part := _next(parts, source, count)) is not None:
        for _, row in saved_records(part, source.path).rows():
            count += 1
            yield Place(source.path, count), row
    known = (dataset.info.splits or {}).get(source.split)
    if known is not None and known.num_examples and known.num_examples != count:
        raise _broken_off(source, count, f"its card says {known.num_examples:,} rows")


def _next(parts: Iterator[Any], source: SourceConfig, count: int) -> Any:
    try:
        return next(parts, None)
    except Exception as error:  # of the network, of the hub, of a format: each of its own library
        raise _broken_off(source, count, reason_of(error)) from error


def _broken_off(source: SourceConfig, count: int, why: str) -> UserError:
    return UserError(
        f"data.path={source.path}: the hub data set ended after {count:,} rows: {why}",
        hint="the same command goes on from what is tokenized; data.streaming=false fetches all first",
    )


def _parts(dataset: Any) -> Iterator[Any]:
    """The rows as data sets in memory, of the types that the library gives all of them where it fetches them
    first: those it knows, or else those of the first rows."""
    import datasets
    from datasets.table import InMemoryTable, table_cast

    features = dataset.features
    # tables of unknown types may differ, and are not put together by the library
    tables = dataset.with_format("arrow").iter(PART_ROWS if features is not None else 1)
    for table in tables:
        features = features or datasets.Features.from_arrow_schema(table.schema)
        info = datasets.DatasetInfo(features=features)
        cast = InMemoryTable(table_cast(table, features.arrow_schema))
        yield datasets.Dataset(cast, info=info, fingerprint="part")
