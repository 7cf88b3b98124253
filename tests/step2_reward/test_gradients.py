"""The gradient of a step is that of the mean over all its pairs, however it is computed."""

from __future__ import annotations

import pytest
import torch

from tests import forked
from tests.spread import GRADIENT_TOLERANCE, SHARING, relative_error
from tests.step2_reward import gradients
from tests.step2_reward.gradients import GRID, Found, Point
from tests.step2_reward.pairs import CENTERING, SomePairs, plain_scores, reference_gradient, tiny_scorer


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    return reference_gradient()


@pytest.fixture(scope="module")
def scores() -> torch.Tensor:
    with torch.no_grad():
        return plain_scores(tiny_scorer("eager").double(), SomePairs())


@pytest.fixture(scope="module", params=SHARING, ids=str)
def computed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("gradients") / "gradients.pt"
    forked.run(
        gradients.main,
        (str(out), request.param.sequence_parallel),
        request.param.ranks,
        out.with_suffix(".txt"),
    )
    return {point: Found(*found) for point, found in torch.load(out).items()}


def named(point: Point) -> str:
    words = [f"micro{point.micro_batch_size}", f"zero{point.stage}", "packed" if point.packing else "single"]
    words += ["ckpt"] * point.checkpointing + ["repeated-prompts"] * (not point.share_prefix)
    return "-".join(words)


@pytest.mark.parametrize("point", GRID, ids=named)
def test_gradient_is_that_of_the_mean_over_pairs(computed: dict, reference: dict, point: Point) -> None:
    assert relative_error(computed[point].gradient, reference) < GRADIENT_TOLERANCE


@pytest.mark.parametrize("point", GRID, ids=named)
def test_the_numbers_of_a_step_and_of_an_evaluation_are_those_of_plain_scores(
    computed: dict, scores: torch.Tensor, point: Point
) -> None:
    step, held_out = computed[point].metrics, computed[point].held_out
    chosen, rejected = scores[:, 0], scores[:, 1]
    margins = torch.tensor([SomePairs()[index].margin for index in range(7)]).double()
    losses = torch.log1p(torch.exp(margins - chosen + rejected)) + CENTERING * (chosen + rejected) ** 2
    for found, prefix in ((step, ""), (held_out, "eval/")):
        assert found[f"{prefix}loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
        assert found[f"{prefix}margin"] == pytest.approx(float((chosen - rejected).mean()), abs=1e-5)
        assert found[f"{prefix}mean_reward"] == pytest.approx(float(scores.mean()), abs=1e-5)
        assert found[f"{prefix}accuracy"] == float((chosen > rejected).double().mean())
    assert step["min_reward"] == pytest.approx(float(scores.min()), abs=1e-5)
    assert held_out["eval/std_reward"] == pytest.approx(float(scores.std(correction=0)), rel=1e-5)


def test_a_mean_of_micro_batch_means_would_be_noticed(reference: dict) -> None:
    """Guards the tolerance: of seven pairs in micro-batches of four, the last three would count too much."""
    model, pairs = tiny_scorer("eager").double(), SomePairs()
    scores = plain_scores(model, pairs)
    margins = torch.tensor([pairs[index].margin for index in range(7)]).double()
    losses = torch.log1p(torch.exp(margins - scores[:, 0] + scores[:, 1]))
    losses = losses + CENTERING * scores.sum(1) ** 2
    ((losses[:4].mean() + losses[4:].mean()) / 2).backward()
    wrong = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert relative_error(wrong, reference) > 1000 * GRADIENT_TOLERANCE
