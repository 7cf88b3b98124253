"""Data sets saved to disk with the `datasets` library, or on the hub -> their rows.

Pictures, sound and the like are left as they are stored. Files without that library are read in `files.py`.
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
    import datasets

    try:
        return datasets.load_dataset(
            source.path, name=source.subset, split=source.split, revision=source.revision
        )
    except Exception as error:  # the library raises a dozen kinds for "not there" and "no network"
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"data.path={source.path}: no such file here, and the hub data set could not be loaded: {reason}",
            hint="check the name, subset, revision and split; without a network, download it first and give"
            " data.path its folder",
        ) from error
