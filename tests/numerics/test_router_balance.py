"""The gradient of a mixture's step, with the load-balancing loss of its routers, however it is computed.

Passes over short documents leave experts without a token; under ZeRO-3 ranks then have different ones, and
their gradients are reduced all the same.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import forked
from tests.programs import balanced, gradients
from tests.spread import GRADIENT_TOLERANCE, relative_error


def test_some_documents_cannot_reach_every_expert() -> None:
    """Or what is said of experts without tokens would not be tested below."""
    assert min(gradients.Documents.lengths) * balanced.CHOSEN < balanced.EXPERTS


@pytest.mark.parametrize(("ranks", "sequence_parallel"), [(1, 1), (2, 1), (2, 2)])
def test_gradient_is_that_of_the_whole_step(tmp_path: Path, ranks: int, sequence_parallel: int) -> None:
    """Of whatever micro-batches, ranks and slices the step is made of, and with recomputed layers, too."""
    out = tmp_path / "gradients.pt"
    forked.run(balanced.main, (str(out), sequence_parallel), ranks, tmp_path / "printed.txt")
    reference = {c: balanced.reference_gradient(c) for c in (0.0, balanced.COEFFICIENT)}
    computed = {balanced.Point(*point): found for point, found in torch.load(out).items()}
    errors = {point: relative_error(found, reference[point.coefficient]) for point, found in computed.items()}
    assert len(errors) == len(balanced.GRID) and max(errors.values()) < GRADIENT_TOLERANCE, errors


def test_counts_of_each_micro_batch_alone_would_be_noticed() -> None:
    """Guards the tolerance: without the loss, or with another weight, the gradient is far outside it."""
    expected = balanced.reference_gradient(balanced.COEFFICIENT)
    for coefficient in (0.0, balanced.COEFFICIENT * 1.001):
        wrong = balanced.reference_gradient(coefficient)
        assert relative_error(wrong, expected) > 5 * GRADIENT_TOLERANCE
