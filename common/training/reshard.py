"""Reshard a state that was written by other ranks, or at another ZeRO stage.

Takes the layout of the checkpoint, the shards that a rank has now, and a function that reads what one of the
former ranks wrote; returns the tensors of this rank. Elements are matched by the name of their parameter.
Every rank reads only the files that it needs. Nothing is written: the checkpoint stays as it is. Which ranks
hold which elements is known to `engine.Engine.layout`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common.errors import UserError
from common.training.snapshot import Open

LAYOUT = "layout.json"
WEIGHTS = "weights"
"""The name under which `read` gives the weights themselves, beside the optimizer's state."""
MOMENTUM = "momentum_buffer"
"""Muon's state, which may hold whole parameters (see `Shard.wholes`)."""

Held = Mapping[str, Any]


class Piece(NamedTuple):
    """A stretch of a parameter in a flat tensor."""

    name: str
    begin: int  # its first element in the flattened parameter
    offset: int  # and in the flat tensor
    length: int


@dataclass(frozen=True)
class Shard:
    """A flat tensor of one rank, with the optimizer's state for it."""

    size: int  # elements, with those that only fill it up
    first: str  # first parameter of those that the ranks share in such a tensor
    pieces: tuple[Piece, ...]
    wholes: tuple[Piece, ...] | None = None  # places in `momentum_buffer`, where it holds whole parameters

    def pieces_of(self, key: str) -> tuple[Piece, ...]:
        """Where things are in the flat tensor of that name."""
        return self.wholes if key == MOMENTUM and self.wholes is not None else self.pieces

    def size_of(self, key: str) -> int:
        if key == MOMENTUM and self.wholes is not None:
            return sum(piece.length for piece in self.wholes)
        return self.size

    def is_flat(self, key: str, value: object) -> bool:
        """Whether a value has one element for each element of the parameters, with or without padding.

        UserError for any other tensor that is more than a number.
        """
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return False
        lean = max((piece.offset + piece.length for piece in self.pieces_of(key)), default=0)
        if value.dim() != 1 or value.numel() not in (self.size_of(key), lean):
            raise UserError(
                f"the optimizer's {key} of a shard of {self.size} weights has the shape {list(value.shape)}: "
                "a state that is not kept element by element cannot be resharded",
                hint="resume with as many ranks and the same deepspeed settings as before",
            )
        return True


@dataclass(frozen=True)
class Layout:
    """How a state is divided: of each rank its shards, in order."""

    zero_stage: int
    ranks: tuple[tuple[Shard, ...], ...]

    def __str__(self) -> str:
        return f"ZeRO-{self.zero_stage} on {len(self.ranks)} rank{'s' if len(self.ranks) > 1 else ''}"

    @cached_property
    def names(self) -> list[set[str]]:
        """Of each shard the parameters that the ranks share in it."""
        return [
            {piece.name for shard in shards for piece in (*shard.pieces, *(shard.wholes or ()))}
            for shards in zip(*self.ranks, strict=True)
        ]

    def write(self, folder: Path, open_file: Open) -> None:
        ranks = [
            [[shard.size, shard.first, shard.pieces, shard.wholes] for shard in shards]
            for shards in self.ranks
        ]
        with open_file(folder / LAYOUT) as file:
            file.write(json.dumps({"zero_stage": self.zero_stage, "ranks": ranks}).encode())

    @classmethod
    def read(cls, folder: Path) -> Layout | None:
        """The layout that `write` wrote; None for a state of an earlier version."""
        if not (folder / LAYOUT).exists():
            return None
        stored = json.loads((folder / LAYOUT).read_text())
        return cls(stored["zero_stage"], tuple(tuple(map(_shard, shards)) for shards in stored["ranks"]))


def reshard(
    stored: Layout, own: Sequence[Shard], read: Callable[[int], Sequence[Held]]
) -> list[dict[str, Any]]:
    """The state of each shard in `own`, by name: flat tensors on the host, and numbers.

    read: returns what rank r wrote, shard by shard; called once for each rank that is needed. Padding is 0.
    UserError when a part of `own` was not stored or cannot be divided.
    """
    held: list[dict[str, Any]] = [{} for _ in own]
    missing = [sum(piece.length for piece in shard.pieces) for shard in own]
    for rank, shards in enumerate(stored.ranks):
        pairs = [
            (index, number)
            for index, target in enumerate(own)
            for number, source in enumerate(shards)
            if _concerns(target, source, stored.names[number], is_first=rank == 0)
        ]
        if not pairs:
            continue
        values = read(rank)
        for index, number in pairs:
            target, source = own[index], shards[number]
            _take(held[index], target, source, values[number])
            missing[index] -= sum(count for _, _, count in _overlaps(source.pieces, target.pieces))
    if any(missing):
        raise UserError(
            f"{sum(missing)} weights that are trained now are not in the checkpoint",
            hint="resume with the model's settings as they were, or start a new run_name",
        )
    return held


def _concerns(target: Shard, source: Shard, names: set[str], *, is_first: bool) -> bool:
    """Whether a rank's shard has elements of the target; a target without elements wants its numbers."""
    if not target.pieces:
        return is_first and target.first in names
    keys = {MOMENTUM, WEIGHTS}
    return any(True for key in keys for _ in _overlaps(source.pieces_of(key), target.pieces_of(key)))


def _take(held: dict[str, Any], target: Shard, source: Shard, values: Held) -> None:
    for key, value in values.items():
        if not source.is_flat(key, value):
            # its own: optimizers count in place, and what `read` gave is mapped from a file
            held.setdefault(key, value.clone() if isinstance(value, torch.Tensor) else value)
            continue
        if key not in held:
            held[key] = torch.zeros(target.size_of(key), dtype=value.dtype)
        for begin, to, count in _overlaps(source.pieces_of(key), target.pieces_of(key)):
            held[key][to : to + count].copy_(value[begin : begin + count])


def _overlaps(source: Sequence[Piece], target: Sequence[Piece]) -> Iterator[tuple[int, int, int]]:
    """Offset in the source, offset in the target and count of what both have."""
    by_name = {piece.name: piece for piece in source}
    for piece in target:
        if (other := by_name.get(piece.name)) is None:
            continue
        begin = max(piece.begin, other.begin)
        count = min(piece.begin + piece.length, other.begin + other.length) - begin
        if count > 0:
            yield other.offset + begin - other.begin, piece.offset + begin - piece.begin, count


def _shard(stored: Sequence[Any]) -> Shard:
    size, first, pieces, wholes = stored
    whole = None if wholes is None else tuple(Piece(*piece) for piece in wholes)
    return Shard(size, first, tuple(Piece(*piece) for piece in pieces), whole)
