"""The same reward model, however its training is spread over micro-batches, ranks, ZeRO stages and rows; and
plain transformers gives the rewards of the live one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.artifacts import read_manifest
from common.config import LoraConfig
from tests.runs import Base
from tests.spread import FIRST_TOLERANCE, LORA, LOSS_TOLERANCE, MERGED_TOLERANCE, SPREAD, Point
from tests.step2_dpo.runs import make_policy
from tests.step2_reward.runs import make_job, reward_with_live_scores, run_job, series

pytestmark = pytest.mark.slow  # nine or so whole runs; one gradient at a time is compared in the suite

# rewards of size 1 to 5, which are sums of 32 products: the same kernels on the same weights
SCORE_TOLERANCE = 1e-5


OTHER_BASES = [Point(1, 8, True, 2, policy="untied"), Point(1, 8, True, 2, policy="pad is eos")]


@pytest.fixture(scope="module")
def folder(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("numerics")
    make_policy(folder / "tied", base.tokenizer)
    make_policy(folder / "untied", base.tokenizer, tie_word_embeddings=False)
    make_policy(folder / "pad is eos", tokenizer_with_one_end(base.tokenizer, folder / "tokenizer"))
    return folder


def tokenizer_with_one_end(tokenizer: Path, folder: Path) -> Path:
    """A tokenizer whose eos is what ends a turn, and whose pad is the same, as many are published."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.eos_token = loaded.pad_token = "<|im_end|>"
    loaded.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run_of(folder: Path) -> Callable[[Point], Path]:
    """The finished run of a point; each is made once."""

    @functools.cache
    def run(point: Point) -> Path:
        job = make_job(folder, folder / point.policy, max_steps=4, eval_every=1, global_batch_size=16)
        job.reward.train.micro_batch_size = point.micro_batch_size
        job.reward.data.packing, job.deepspeed.stage = point.packing, point.stage
        job.launch.sequence_parallel = point.sequence_parallel
        job.model.gradient_checkpointing = point.checkpointing
        job.model.lora = LoraConfig(enabled=point.lora, r=4, alpha=8)
        job.reward.center_rewards_coefficient = 0.01
        run_job(job, folder / "runs" / point.name, point.ranks, program=reward_with_live_scores)
        return folder / "runs" / point.name

    return run


@pytest.mark.parametrize("point", SPREAD[1:], ids=lambda point: point.name)
def test_the_whole_runs_numbers_do_not_depend_on_how_it_is_spread(run_of: Any, point: Point) -> None:
    reference, other = run_of(SPREAD[0]), run_of(point)
    for name in ("num_tokens", "learning_rate", "epoch", "accuracy"):
        assert series(reference, name) == series(other, name)
    losses = series(reference, "loss")
    assert len(losses) == 4 and losses[3] < losses[1]
    assert series(other, "loss") == pytest.approx(losses, rel=LOSS_TOLERANCE)
    assert series(other, "loss")[0] == pytest.approx(losses[0], rel=FIRST_TOLERANCE)
    norms = series(reference, "grad_norm")
    assert series(other, "grad_norm") == pytest.approx(norms, rel=10 * LOSS_TOLERANCE)
    for name in ("margin", "min_reward", "max_reward", "reward_length_correlation"):
        assert series(other, name) == pytest.approx(series(reference, name), abs=10 * LOSS_TOLERANCE)


@pytest.mark.parametrize("point", SPREAD[1:], ids=lambda point: point.name)
def test_evaluation_does_not_depend_on_micro_batch_packing_or_ranks(run_of: Any, point: Point) -> None:
    reference, other = run_of(SPREAD[0]), run_of(point)
    for name in ("loss", "accuracy", "std_reward", "expected_calibration_error", "reward_length_correlation"):
        expected = series(reference, f"eval/{name}")
        assert len(expected) == 5  # before the first step, and after each of four
        found = series(other, f"eval/{name}")
        assert found == pytest.approx(expected, rel=10 * LOSS_TOLERANCE, abs=LOSS_TOLERANCE)
        # the first step's learning rate is 0: these are still the same weights
        assert found[:2] == pytest.approx(expected[:2], rel=10 * FIRST_TOLERANCE, abs=FIRST_TOLERANCE)


def test_adapters_do_not_depend_on_stage_or_ranks_either(run_of: Any) -> None:
    one, *others = LORA
    for other in others:
        assert series(run_of(other), "loss") == pytest.approx(series(run_of(one), "loss"), rel=LOSS_TOLERANCE)


@pytest.mark.parametrize("point", [*SPREAD, *LORA, *OTHER_BASES], ids=lambda point: point.name)
def test_plain_transformers_gives_the_live_models_rewards_in_a_padded_batch(
    run_of: Any, point: Point
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    run_dir = run_of(point)
    live, export = torch.load(run_dir / "live_scores.pt"), run_dir / "reward" / "export"
    model = AutoModelForSequenceClassification.from_pretrained(export).eval()
    tokenizer = AutoTokenizer.from_pretrained(export, padding_side="right")
    batch = tokenizer.pad({"input_ids": [ids.tolist() for ids in live["probe"]]}, return_tensors="pt")
    assert (batch["attention_mask"] == 0).any() and model.dtype is torch.float32
    with torch.no_grad():
        scores = model(**batch).logits[:, 0]
    tolerance = MERGED_TOLERANCE if point.lora else SCORE_TOLERANCE
    assert len(scores) == 8 and live["scores"].std() > 0.05
    assert torch.allclose(scores, live["scores"], rtol=0, atol=tolerance)


def test_a_base_whose_pad_is_its_eos_gets_a_pad_of_its_own(run_of: Any) -> None:
    details = read_manifest(run_of(OTHER_BASES[1]) / "reward" / "export").details
    (end,) = details["terminators"]
    assert details["eos_token_id"] == end != details["pad_token_id"]
    live = torch.load(run_of(OTHER_BASES[1]) / "live_scores.pt")
    # an eos also ends the turn of the user: the last one of the document is meant
    assert all(int((ids == end).sum()) == 2 and int(ids[-1]) == end for ids in live["probe"])
