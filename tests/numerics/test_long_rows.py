"""Layers recomputed in tiles, with their inputs put away, learn what whole ones learn, under ZeRO too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import forked
from tests.programs import gradients, long_rows
from tests.spread import GRADIENT_TOLERANCE, relative_error


@pytest.mark.parametrize(("ranks", "sequence_parallel"), [(1, 1), (2, 1), (2, 2)])
def test_gradient_is_that_of_whole_layers(tmp_path: Path, ranks: int, sequence_parallel: int) -> None:
    out = tmp_path / "gradients.pt"
    forked.run(long_rows.main, (str(out), sequence_parallel), ranks, tmp_path / "printed.txt")
    found = torch.load(out)
    reference = gradients.reference_gradient()
    for (stage, targets, tiled), gradient in found.items():
        learned = {name: value for name, value in gradient.items() if not targets or "lora_" in name}
        assert all(value.any() for value in learned.values()), (stage, targets)
        wanted = {f"model.{name}": value for name, value in reference.items()}
        if targets:
            wanted = {name: found[1, targets, False][name] for name in learned}
        assert relative_error(learned, wanted) < GRADIENT_TOLERANCE, (stage, targets, tiled)
