"""The numbers of each record (its length, its source, ...): columns of an Arrow file, mapped into memory.

A batch of the file is a part of the records: those to train on, those that are held out. Ranks of one machine
share its pages, and none holds a copy. Does not know what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

PARTS = ("train", "eval")
ROWS = "rows"
"""The column that says where each record of a part lies in the file of records: int64."""

_DTYPES = {"int8": np.int8, "int32": np.int32, "int64": np.int64, "uint32": np.uint32, "float": np.float32}


def write_index(path: Path, columns: Mapping[str, np.ndarray], parts: Mapping[str, np.ndarray]) -> None:
    """columns: of all records, by name. parts: int64, which records each of `PARTS` has, ascending."""
    import pyarrow

    types = {name: pyarrow.from_numpy_dtype(column.dtype) for name, column in columns.items()}
    schema = pyarrow.schema({**types, ROWS: pyarrow.int64()})
    with pyarrow.OSFile(str(path), "wb") as stream, pyarrow.ipc.new_file(stream, schema) as out:
        for part in PARTS:
            rows = np.asarray(parts[part], np.int64)
            values = [*(column[rows] for column in columns.values()), rows]
            arrays = [
                pyarrow.Array.from_buffers(each.type, len(rows), [None, pyarrow.py_buffer(value)])
                for each, value in zip(schema, values, strict=True)
            ]
            out.write_batch(pyarrow.record_batch(arrays, schema=schema))


def read_index(path: Path, part: str) -> dict[str, np.ndarray]:
    """The columns of a part, and `ROWS`: read-only views of the file."""
    import pyarrow

    reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
    batch = reader.get_batch(PARTS.index(part))
    return {
        name: np.frombuffer(column.buffers()[1], _DTYPES[str(column.type)], len(column))
        for name, column in zip(batch.schema.names, batch.columns, strict=True)
    }
