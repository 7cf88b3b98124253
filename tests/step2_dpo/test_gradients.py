"""The gradient of a step is that of the mean over its pairs, and a run begins at its reference, however
it is spread."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

from common.data.types import IGNORE
from step2_dpo.loss import ChosenRejected, Objective
from tests import forked
from tests.spread import GRADIENT_TOLERANCE, SHARING, relative_error
from tests.step2_dpo import gradients
from tests.step2_dpo.gradients import GRID, STARTS, Point, Start
from tests.step2_dpo.pairs import SomePairs, plain_logps, tiny_llama


@cache
def plain_loss(objective: Objective) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by transformers in float64, one document at a time, one backward pass over all."""
    model, pairs = tiny_llama("eager").double(), SomePairs()
    reference = gradients.other_reference().train
    preference, nll = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    tokens = 0
    for index in range(len(pairs)):
        pair = pairs[index]
        chosen, rejected = plain_logps(model, pair)
        lengths = [
            torch.tensor(float((side.labels != IGNORE).sum())) for side in (pair.chosen, pair.rejected)
        ]
        ratios = ChosenRejected(chosen - reference[index, 0], rejected - reference[index, 1])
        preference = preference + objective.losses(ratios, ChosenRejected(*lengths))
        nll = nll - chosen
        tokens += int(lengths[0])
    loss = preference / len(pairs) + objective.sft_weight * nll / tokens
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module", params=SHARING, ids=str)
def computed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("gradients") / "gradients.pt"
    forked.run(
        gradients.main,
        (str(out), request.param.sequence_parallel),
        request.param.ranks,
        out.with_suffix(".txt"),
    )
    return torch.load(out, weights_only=False)


def name_of(point: Point) -> str:
    words = [f"micro{point.micro_batch_size}", "packed" if point.packing else "single", f"zero{point.stage}"]
    objective = point.objective
    words += [objective.loss_type.value, f"smoothing{objective.label_smoothing:g}"]
    words += ["per_token"] * objective.length_normalized + ["prompts_twice"] * (not point.share_prefix)
    return "-".join(words)


@pytest.mark.parametrize("point", GRID, ids=name_of)
def test_gradient_is_that_of_the_mean_over_all_pairs(computed: dict, point: Point) -> None:
    loss, expected = plain_loss(point.objective)
    assert relative_error(computed["gradients"][point], expected) < GRADIENT_TOLERANCE
    assert computed["metrics"][point]["loss"] == pytest.approx(loss, rel=1e-6)


def test_metrics_do_not_depend_on_how_a_step_is_spread(computed: dict) -> None:
    first = computed["metrics"][GRID[0]]
    for point in GRID:
        if point.objective == GRID[0].objective:
            assert computed["metrics"][point] == pytest.approx(first, rel=1e-5)


def test_the_objectives_have_different_gradients() -> None:
    """Guards the comparison: label smoothing, lengths and the SFT term are all seen."""
    every = [gradients.EVERYTHING, *gradients.OTHERS]
    for number, one in enumerate(every):
        for other in every[number + 1 :]:
            assert relative_error(plain_loss(one)[1], plain_loss(other)[1]) > 1000 * GRADIENT_TOLERANCE


@pytest.mark.parametrize("start", STARTS, ids=lambda s: f"{'packed' if s.packing else 'single'}-zero{s.stage}"
                         f"{'-adapters' * s.adapters}")  # fmt: skip
def test_a_run_begins_with_a_loss_of_exactly_log_2_and_margins_of_exactly_0(
    computed: dict, start: Start
) -> None:
    metrics = computed["starts"][start]
    for part in ("", "eval/"):
        assert metrics[f"{part}loss"] == math.log(2)
        assert metrics[f"{part}rewards/margins"] == metrics[f"{part}rewards/chosen"] == 0.0
        assert metrics[f"{part}rewards/accuracies"] == 0.5
    # and it does move, away from there
    assert metrics["second loss"] < math.log(2)
