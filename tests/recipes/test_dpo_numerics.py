"""The same DPO, however it is spread over micro-batches, ranks, ZeRO stages and rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.config import LoraConfig
from step2_dpo.config import DPOJob
from tests.runs import Base, finish, write_job
from tests.spread import (
    FIRST_TOLERANCE,
    LOGIT_TOLERANCE,
    LORA,
    LOSS_TOLERANCE,
    MERGED_TOLERANCE,
    SPREAD,
    UNTIED,
    Point,
    assert_plain_logits,
)
from tests.step2_dpo.runs import dpo_with_live_logits, make_job, make_policy, series

pytestmark = pytest.mark.slow  # nine or so whole runs; one gradient at a time is compared in the suite


@pytest.fixture(scope="module")
def folder(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dpo_numerics")
    make_policy(folder / "tied", base.tokenizer)
    make_policy(folder / "untied", base.tokenizer, tie_word_embeddings=False)
    return folder


def job_of(folder: Path, point: Point) -> DPOJob:
    job = make_job(folder, folder / point.policy, max_steps=4, eval_every=1)
    job.dpo.train.micro_batch_size, job.dpo.data.packing = point.micro_batch_size, point.packing
    job.dpo.sft_weight, job.dpo.label_smoothing = 0.1, 0.1
    job.deepspeed.stage, job.model.gradient_checkpointing = point.stage, point.checkpointing
    job.model.lora = LoraConfig(enabled=point.lora, r=4, alpha=8)
    job.launch.sequence_parallel = point.sequence_parallel
    job.dpo.sampling.num_prompts = 2 if point in SPREAD else 0
    return job


@pytest.fixture(scope="module")
def run_of(folder: Path) -> Callable[[Point], Path]:
    """The finished run of a point; each is made once."""

    @functools.cache
    def run(point: Point) -> Path:
        run_dir = write_job(job_of(folder, point), folder / "runs" / point.name)
        finish(run_dir, point.ranks, dpo_with_live_logits)
        return run_dir

    return run


@pytest.mark.parametrize("point", SPREAD[1:], ids=lambda point: point.name)
def test_the_whole_runs_numbers_do_not_depend_on_how_it_is_spread(run_of: Any, point: Point) -> None:
    reference, other = run_of(SPREAD[0]), run_of(point)
    assert series(reference, "num_tokens") == series(other, "num_tokens")
    assert series(reference, "num_trained_tokens") == series(other, "num_trained_tokens")
    losses = series(reference, "loss")
    assert len(losses) == 4 and series(reference, "rewards/margins")[3] > 0.05
    assert series(other, "loss") == pytest.approx(losses, rel=LOSS_TOLERANCE)
    assert series(other, "loss")[0] == pytest.approx(losses[0], rel=FIRST_TOLERANCE)
    for name in ("rewards/margins", "rewards/accuracies", "logps/chosen", "entropy", "eval/loss"):
        expected = series(reference, name)
        assert series(other, name) == pytest.approx(expected, rel=LOSS_TOLERANCE)


@pytest.mark.parametrize("point", [*SPREAD, *UNTIED, *LORA], ids=lambda point: point.name)
def test_every_run_begins_at_its_reference(run_of: Any, point: Point) -> None:
    run_dir = run_of(point)
    # the first step's learning rate is 0: these are twice the same weights
    for name in ("rewards/margins", "rewards/chosen", "eval/rewards/margins"):
        assert series(run_dir, name)[0] == 0.0 != series(run_dir, name)[-1]
    assert series(run_dir, "rewards/accuracies")[0] == 0.5
    # with 0.9 log 2 + 0.1 log 2, rounded, and the SFT term
    nll = series(run_dir, "loss")[0] - math.log(2)
    assert nll == pytest.approx(0.1 * math.log(300), rel=0.1)


def test_samples_do_not_depend_on_ranks_or_stage(run_of: Any) -> None:
    texts = [(run_of(point) / "dpo" / "samples.jsonl").read_text() for point in (SPREAD[0], SPREAD[-1])]
    assert texts[0] == texts[1] and len(texts[0].splitlines()) == 10


@pytest.mark.parametrize("point", [*SPREAD, *UNTIED, *LORA], ids=lambda point: point.name)
def test_plain_transformers_gives_the_live_models_logits(run_of: Any, point: Point) -> None:
    tolerance = MERGED_TOLERANCE if point.lora else LOGIT_TOLERANCE
    assert_plain_logits(run_of(point), "dpo", tolerance=tolerance)


def test_untied_and_adapted_runs_do_not_depend_on_stage_or_ranks_either(run_of: Any) -> None:
    for one, *others in (UNTIED, LORA):
        losses, margins = series(run_of(one), "loss"), series(run_of(one), "rewards/margins")
        assert margins[3] > 1e-3
        for other in others:
            assert series(run_of(other), "loss") == pytest.approx(losses, rel=LOSS_TOLERANCE)
            # margins begin at 0: of log-probabilities of tens in fp32, beta times the difference has 1e-7
            close = pytest.approx(margins, rel=LOSS_TOLERANCE, abs=1e-7)
            assert series(run_of(other), "rewards/margins") == close
