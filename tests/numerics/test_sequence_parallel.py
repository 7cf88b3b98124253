"""Where ranks share rows, the gradient of a step is that of the token mean over all its documents, too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import forked
from tests.programs import gradients
from tests.spread import GRADIENT_TOLERANCE, relative_error


@pytest.mark.parametrize(("ranks", "sequence_parallel"), [(2, 2), (4, 2), (4, 4)])
def test_gradient_is_that_of_the_token_mean(tmp_path: Path, ranks: int, sequence_parallel: int) -> None:
    """4 heads and 2 key heads: of 4 ranks two repeat each key head. Lengths do not divide by the ranks, some
    slices have no target, and a rank that runs out of rows has padding only."""
    out = tmp_path / "gradients.pt"
    forked.run(gradients.of_slices, (str(out), sequence_parallel), ranks, tmp_path / "printed.txt")
    reference, computed = gradients.reference_gradient(), torch.load(out)
    errors = {point: relative_error(found, reference) for point, found in computed.items()}
    assert len(errors) == 8 and max(errors.values()) < GRADIENT_TOLERANCE, errors
