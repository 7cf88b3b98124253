"""The gradient of a step is that of the token mean over all its documents, however it is computed."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests import forked
from tests.programs import gradients
from tests.spread import GRADIENT_TOLERANCE, relative_error

GRID = [
    *((*point, False) for point in itertools.product(
        gradients.MICRO_BATCH_SIZES, gradients.PACKINGS, gradients.ZERO_STAGES
    )),
    *((2, True, stage, True) for stage in gradients.ZERO_STAGES),
]  # fmt: skip


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    return gradients.reference_gradient()


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def computed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("gradients") / "gradients.pt"
    forked.run(gradients.main, (str(out),), request.param, out.with_suffix(".txt"))
    return torch.load(out)


@pytest.mark.parametrize(
    "point", GRID, ids=lambda p: f"micro{p[0]}-{'packed' if p[1] else 'single'}-zero{p[2]}{'-ckpt' * p[3]}"
)
def test_gradient_is_that_of_the_token_mean(computed: dict, reference: dict, point: tuple) -> None:
    assert relative_error(computed[point], reference) < GRADIENT_TOLERANCE


def test_a_mean_of_micro_batch_means_would_be_noticed(reference: dict) -> None:
    """Guards the tolerance: the usual mistake is far outside it."""
    model, documents = gradients.tiny_llama("eager").double(), gradients.Documents()
    for index in range(len(documents)):
        example = documents[index]
        ids, labels = (torch.from_numpy(a.astype("int64")) for a in (example.input_ids, example.labels))
        (torch.nn.functional.cross_entropy(model(ids[None]).logits[0], labels) / len(documents)).backward()
    wrong = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert relative_error(wrong, reference) > 1000 * GRADIENT_TOLERANCE
