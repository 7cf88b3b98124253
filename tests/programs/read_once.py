"""Ranks of two machines that load models, reading each for itself and one for its machine: the same bits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from common.model.loading import load_model
from common.model.partition import Share, Stored, part_of, share_of
from common.runtime.distributed import Node, all_reduce_sum, close_world, init_world, node_of
from tests.programs import partitioned
from tests.tiny import CHATML, tiny_tokenizer

READ = [0]
"""Bytes that this rank read of tensors in files."""


class Watched:
    """Slices of a file that note what is read of them."""

    def __init__(self, slices: Any) -> None:
        self.slices = slices

    def get_shape(self) -> Any:
        return self.slices.get_shape()

    def __getitem__(self, rows: Any) -> torch.Tensor:
        found: torch.Tensor = self.slices[rows]
        READ[0] += found.nbytes
        return found


def same_networks(folder: str, ranks_of_machine: int, names: list[str]) -> int:
    """Saved models, whole and in parts. names: of the cases; empty: all."""
    world = init_world()
    os.environ["LOCAL_RANK"] = str(world.rank % ranks_of_machine)
    node = node_of()
    assert node is not None and node == node_of()
    assert (node.first, node.size) == (world.rank - world.rank % ranks_of_machine, ranks_of_machine)
    _watch()
    for name, model, head in partitioned.cases(Path(folder)):
        if model.path is None or (names and name not in names):
            continue
        for share in (None, share_of(3)):
            loaded, read = [], []
            for reader in (None, node):
                READ[0] = 0
                loaded.append(
                    load_model(
                        model, tiny_tokenizer(CHATML), head,
                        seed=3, device=torch.device("cpu"), share=share, node=reader,
                    )
                )  # fmt: skip
                read.append(READ[0])
            _compare(name, *loaded)
            _count(name, node, share, *read)
    close_world()
    return 0


def _watch() -> None:
    make = Stored.__init__

    def making(self: Stored, slices: Any, dtype: Any = None, node: Any = None) -> None:
        make(self, slices if isinstance(slices, Watched) else Watched(slices), dtype, node)

    Stored.__init__ = making  # type: ignore[method-assign]


def _compare(name: str, alone: Any, handed: Any) -> None:
    pairs = zip(alone.state_dict().items(), handed.state_dict().items(), strict=True)
    for (key, expected), (found_key, found) in pairs:
        assert key == found_key and expected.dtype == found.dtype and expected.shape == found.shape, (
            name,
            key,
        )
    for (key, expected), found in zip(alone.named_parameters(), handed.parameters(), strict=True):
        parts = [part_of(each) for each in (expected, found)]
        assert (parts[0] is None) == (parts[1] is None), (name, key)
        whole = [each if part is None else part for each, part in zip((expected, found), parts, strict=True)]
        assert torch.equal(*whole), (name, key)


def _count(name: str, node: Node, share: Share | None, alone: int, handed: int) -> None:
    """The first rank reads for all of its machine, and the others nothing."""
    assert (handed > 0) == node.is_first, name
    machines = all_reduce_sum([handed])[0]
    if share is None:
        return  # alone it is transformers that reads, which is not watched
    total = all_reduce_sum([alone])[0]
    assert 0 < machines <= total, (name, machines, total)
