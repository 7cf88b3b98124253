"""The same training, however it is spread over micro-batches, ranks, ZeRO stages and rows.

In these runs a step is a whole epoch, so that packed and unpacked rows hold the same documents.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import LoraConfig
from step1_sft.config import SFTJob
from tests.programs.live_logits import sft_with_live_logits
from tests.runs import Base, evaluation_lines, finish, training_lines
from tests.spread import (
    FIRST_TOLERANCE,
    HPZ,
    LOGIT_TOLERANCE,
    LORA,
    LOSS_TOLERANCE,
    MERGED_TOLERANCE,
    SPREAD,
    UNTIED,
    Point,
    assert_plain_logits,
)

pytestmark = pytest.mark.slow  # nine or so whole runs; one gradient at a time is compared in the suite


def job_of(base: Base, point: Point) -> SFTJob:
    job = base.job(max_steps=4, eval_every=1, save_every=0, global_batch_size=64)
    job.sft.train.micro_batch_size, job.sft.data.packing = point.micro_batch_size, point.packing
    job.deepspeed.stage, job.model.gradient_checkpointing = point.stage, point.checkpointing
    job.deepspeed.hpz_partition_size = point.hpz
    job.model.config["tie_word_embeddings"] = point.policy == "tied"
    job.model.lora = LoraConfig(enabled=point.lora, r=4, alpha=8)
    job.launch.sequence_parallel, job.sft.sampling.num_prompts = point.sequence_parallel, 2
    if point not in SPREAD:  # what is compared here comes from the end
        job.sft.train.eval_every, job.sft.sampling.num_prompts = 0, 0
    return job


@pytest.fixture(scope="module")
def run_of(base: Base) -> Callable[[Point], Path]:
    """The finished run of a point; each is made once."""

    @functools.cache
    def run(point: Point) -> Path:
        run_dir = base.write(f"numerics-{point.name}", job_of(base, point))
        finish(run_dir, point.ranks, sft_with_live_logits)
        return run_dir

    return run


def series(run_dir: Path, name: str) -> list[float]:
    lines = evaluation_lines(run_dir) if name.startswith("eval/") else training_lines(run_dir)
    return [line[name] for line in lines]


@pytest.mark.parametrize("point", [*SPREAD[1:], *HPZ], ids=lambda point: point.name)
def test_the_whole_runs_numbers_do_not_depend_on_how_it_is_spread(run_of: Any, point: Point) -> None:
    reference, other = run_of(SPREAD[0]), run_of(point)
    assert series(reference, "num_tokens") == series(other, "num_tokens")
    assert series(reference, "learning_rate") == series(other, "learning_rate")
    losses = series(reference, "loss")
    assert len(losses) == 4 and losses[3] < losses[1]
    assert series(other, "loss") == pytest.approx(losses, rel=LOSS_TOLERANCE)
    assert series(other, "loss")[0] == pytest.approx(losses[0], rel=FIRST_TOLERANCE)
    assert series(other, "entropy") == pytest.approx(series(reference, "entropy"), rel=LOSS_TOLERANCE)
    norms = series(reference, "grad_norm")
    assert series(other, "grad_norm") == pytest.approx(norms, rel=10 * LOSS_TOLERANCE)


@pytest.mark.parametrize("point", SPREAD[1:], ids=lambda point: point.name)
def test_evaluation_does_not_depend_on_micro_batch_packing_or_ranks(run_of: Any, point: Point) -> None:
    reference, other = run_of(SPREAD[0]), run_of(point)
    for name in ("eval/loss", "eval/sums/loss", "eval/words/loss", "eval/perplexity"):
        assert len(series(reference, name)) == 5
        assert series(other, name) == pytest.approx(series(reference, name), rel=LOSS_TOLERANCE)
        # before the first step: these are still the same weights
        first = series(reference, name)[0]
        assert series(other, name)[0] == pytest.approx(first, rel=10 * FIRST_TOLERANCE)


def test_samples_do_not_depend_on_ranks_or_stage(run_of: Any) -> None:
    texts = [(run_of(point) / "sft" / "samples.jsonl").read_text() for point in (SPREAD[0], SPREAD[-1])]
    assert texts[0] == texts[1] and len(texts[0].splitlines()) == 10


@pytest.mark.parametrize("point", [*SPREAD, *UNTIED, *LORA], ids=lambda point: point.name)
def test_plain_transformers_gives_the_live_models_logits(run_of: Any, point: Point) -> None:
    tolerance = MERGED_TOLERANCE if point.lora else LOGIT_TOLERANCE
    assert_plain_logits(run_of(point), "sft", tolerance=tolerance)


def test_tied_embeddings_stay_tied_and_untied_ones_differ(run_of: Any) -> None:
    from safetensors.torch import load_file

    tied = load_file(run_of(SPREAD[0]) / "sft" / "export" / "model.safetensors")
    assert "lm_head.weight" not in tied
    for point in UNTIED:
        untied = load_file(run_of(point) / "sft" / "export" / "model.safetensors")
        assert not torch.equal(untied["lm_head.weight"], untied["model.embed_tokens.weight"])


def test_untied_and_adapted_runs_do_not_depend_on_stage_or_ranks_either(run_of: Any) -> None:
    for one, *others in (UNTIED, LORA):
        losses = series(run_of(one), "loss")
        for other in others:
            assert series(run_of(other), "loss") == pytest.approx(losses, rel=LOSS_TOLERANCE)


@pytest.mark.parametrize("point", LORA, ids=lambda point: point.name)
def test_adapters_lie_beside_the_merged_weights_and_give_the_same_logits(run_of: Any, point: Point) -> None:
    import peft
    from transformers import AutoConfig, AutoModelForCausalLM

    export = run_of(point) / "sft" / "export"
    live = torch.load(run_of(point) / "live_logits.pt")
    merged = AutoModelForCausalLM.from_pretrained(export).eval()
    assert not any("lora" in name for name in merged.state_dict())
    # the base is the merged model less what the adapters say
    weights = peft.load_peft_weights(str(export / "adapter"))
    settings = json.loads((export / "adapter" / "adapter_config.json").read_text())
    assert settings["r"] == 4 and settings["lora_alpha"] == 8
    assert any(float(value.abs().max()) > 0 for name, value in weights.items() if "lora_B" in name)
    base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(export)).eval()
    base.load_state_dict(merged.state_dict())
    for name, parameter in base.named_parameters():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in weights:
            update = weights[f"{stem}.lora_B.weight"] @ weights[f"{stem}.lora_A.weight"]
            parameter.data -= 8 / 4 * update
    adapted = peft.PeftModel.from_pretrained(base, str(export / "adapter")).eval()
    with torch.no_grad():
        logits = adapted(live["probe"]).logits[0]
    assert float((logits - live["logits"]).abs().max() / logits.abs().max()) <= MERGED_TOLERANCE
