"""Loading a network in parts: the same numbers as whole, and no more of them than a rank's share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common.model.partition import Share, Stored
from tests.common.training.test_engine import runs
from tests.programs import partitioned, read_once


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models")
    partitioned.write(made)
    return made


def test_shares_divide_a_tensor_as_zero_does() -> None:
    tensor = torch.arange(1, 8).view(7, 1)
    parts = [Share(rank, 4).of(tensor).tolist() for rank in range(4)]
    assert parts == [[1, 2], [3, 4], [5, 6], [7]]
    assert [Share(rank, 5).bounds(6) for rank in range(5)] == [(0, 2), (2, 4), (4, 6), (6, 6), (6, 6)]


@pytest.mark.parametrize("shape", [(5, 3), (7, 2, 3), (4, 4)])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_a_part_is_read_from_a_file_without_the_rest(
    tmp_path: Path, shape: tuple[int, ...], ranks: int
) -> None:
    tensor = torch.randn(shape)
    save_file({"weight": tensor}, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        stored = Stored(Watched(file.get_slice("weight"))).to(dtype=torch.bfloat16)
        for rank in range(ranks):
            Watched.rows = 0
            part = stored.part(Share(rank, ranks))
            assert torch.equal(part, Share(rank, ranks).of(tensor.bfloat16())) and part.dtype == stored.dtype
            numbers = Watched.rows * tensor[0].numel()
            assert numbers < len(part) + 2 * tensor[0].numel()


class Watched:
    """A slice that counts the rows that are read of it."""

    rows = 0

    def __init__(self, slices: object) -> None:
        self.slices = slices

    def get_shape(self) -> list[int]:
        return self.slices.get_shape()  # type: ignore[attr-defined,no-any-return]

    def __getitem__(self, rows: slice) -> torch.Tensor:
        found: torch.Tensor = self.slices[rows]  # type: ignore[index]
        Watched.rows += len(found)
        return found


def test_what_is_computed_with_a_stored_tensor_reads_it_whole(tmp_path: Path) -> None:
    pair = {"a": torch.randn(4, 2), "b": torch.randn(4, 2)}
    save_file(pair, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        a, b = (Stored(file.get_slice(name)) for name in pair)
        assert torch.equal(torch.stack([a, b]), torch.stack(list(pair.values())))  # type: ignore[list-item]
        assert torch.equal(a.transpose(0, 1), pair["a"].T) and torch.equal(b[1:], pair["b"][1:])
        assert a[...] is a and a.shape == (4, 2) and a.dtype is torch.float32


def test_every_kind_of_network_has_the_same_numbers_in_parts(folder: Path, tmp_path: Path) -> None:
    runs(partitioned.same_parts, 3, tmp_path, str(folder))  # 3 divides few tensors: there is padding


@pytest.mark.parametrize(
    ("ranks", "names"), [(2, []), (4, ["sharded bf16", "experts fp32", "small_tied fp32"])]
)
def test_what_one_rank_of_a_machine_reads_for_the_others_are_the_same_bits(
    ranks: int, names: list[str], folder: Path, tmp_path: Path
) -> None:
    runs(read_once.same_networks, ranks, tmp_path, str(folder), 2, names)  # four are on two machines


def test_a_pass_holds_no_gathered_weights_for_its_backward_pass(folder: Path, tmp_path: Path) -> None:
    runs(partitioned.linear_keeps_no_whole_weight, 1, tmp_path, str(folder))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_losses_are_the_same_bits_whether_the_network_was_loaded_whole_or_in_parts(
    folder: Path, tmp_path: Path, ranks: int
) -> None:
    runs(partitioned.same_losses, ranks, tmp_path, str(folder))
