"""A hybrid of convolutions and attention through a whole step: its documents run one by one."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
import torch

from common.training import forecast
from pipeline.report import report
from tests.programs.live_logits import sft_with_live_logits
from tests.runs import Base, evaluation_lines, finish, training_lines

pytestmark = pytest.mark.slow  # whole runs

HYBRID = {
    "model_type": "lfm2", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "layer_types": ["conv", "full_attention"], "conv_L_cache": 3,
}  # fmt: skip


def run(base: Base, ranks: int, stage: int, checkpointing: bool) -> tuple[Path, str]:
    """Three steps over a whole epoch each, so that any packing holds the same documents."""
    job = base.job(max_steps=3, eval_every=3, save_every=0, global_batch_size=64)
    job.model.config, job.deepspeed.stage = dict(HYBRID), stage
    job.model.gradient_checkpointing, job.sft.sampling.num_prompts = checkpointing, 2
    run_dir = base.write(f"hybrid-{ranks}-{stage}", job)
    return run_dir, finish(run_dir, ranks, sft_with_live_logits)


def test_a_hybrid_trains_the_same_on_one_rank_and_partitioned_over_two(base: Base) -> None:
    from transformers import AutoModelForCausalLM

    alone, printed = run(base, 1, 1, checkpointing=False)
    shared, _ = run(base, 2, 3, checkpointing=True)
    assert_said_on_the_console_in_the_plan_and_in_the_report(alone, printed)
    for name in ("loss", "grad_norm"):
        first, second = ([line[name] for line in training_lines(run_dir)] for run_dir in (alone, shared))
        assert len(first) == 3
        assert second == pytest.approx(first, rel=1e-4)  # sums in another order, grown by two updates
    held_out = [[line["eval/loss"] for line in evaluation_lines(run_dir)] for run_dir in (alone, shared)]
    assert held_out[0] and held_out[1] == pytest.approx(held_out[0], rel=1e-4)
    live = torch.load(shared / "live_logits.pt")
    model = AutoModelForCausalLM.from_pretrained(shared / "sft" / "export").eval()
    with torch.no_grad():
        logits = model(live["probe"]).logits[0]
    assert float((logits - live["logits"]).abs().max() / logits.abs().max()) <= 1e-6


def assert_said_on_the_console_in_the_plan_and_in_the_report(run_dir: Path, printed: str) -> None:
    said = [line.partition("notice: ")[2] for line in printed.splitlines() if "notice: " in line]
    slower = [line for line in said if "model_type=lfm2" in line]
    assert slower[0].startswith("documents run one by one, not packed, since model_type=lfm2 has layers of")
    assert slower[1].startswith("responses are sampled without a key/value cache, since model_type=lfm2")
    answer = run_dir / "answer.json"
    assert forecast.main([str(answer), "sft", "step1_sft", str(run_dir / "resolved.yaml")]) == 0
    foreseen = json.loads(answer.read_text())["sft"]["notices"]
    assert [without_measure(line) for line in foreseen] == [without_measure(line) for line in said]
    page = html.unescape(report(run_dir).read_text())
    assert all(line in page for line in said)


def without_measure(line: str) -> str:
    """How far a small copy is off depends on its weights, which are not the run's."""
    return re.sub(r"off by \S+", "off", line)
