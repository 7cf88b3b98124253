"""4-bit base weights and 8-bit AdamW by bitsandbytes, without a GPU: resume, stages, and the export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.kill_resume import metric_differences, state_differences
from common.artifacts import verify
from common.config import LoraConfig, Quantize
from common.training_config import OptimizerName
from step1_sft.config import SFTJob
from tests import runs
from tests.programs import killed
from tests.runs import Base, evaluation_lines, finish, training_lines
from tests.step2_dpo.runs import make_policy

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytestmark = pytest.mark.slow  # a whole run of each

STEPS = 6


@pytest.fixture(scope="module")
def policy(base: Base, folder: Path) -> Path:
    return make_policy(folder / "policy", base.tokenizer)


def four_bit(base: Base, policy: Path, stage: int = 1) -> SFTJob:
    job = base.job(max_steps=STEPS, save_every=2, eval_every=1)
    job.model.config, job.model.path, job.model.tokenizer.path = {}, str(policy), None
    job.model.lora = LoraConfig(enabled=True, r=4, alpha=8, targets=["all-linear"])
    job.model.quantize, job.deepspeed.stage, job.sft.optim.lr = Quantize.nf4, stage, 1e-2
    return job


def eight_bit(base: Base, stage: int) -> SFTJob:
    job = base.job(max_steps=STEPS, save_every=2)
    job.sft.optim.name, job.deepspeed.stage = OptimizerName.adamw_8bit, stage
    return job


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "sft" / "export" / "model.safetensors")


def assert_resumes(base: Base, name: str, job: SFTJob) -> Path:
    """A run that dies in its second save, and goes on, ends as one that did not."""
    whole = base.run(f"{name}-whole", job)
    other = base.write(f"{name}-killed", job)
    runs.dies(other, 1, 0, killed.sft_killed, "before retention", 0)
    assert "resuming from" in finish(other, 1)
    assert state_differences(whole, other, STEPS) == [] and metric_differences(whole, other) == []
    return whole


def test_adapters_on_four_bit_weights_learn_resume_and_are_merged(base: Base, policy: Path) -> None:
    run_dir = assert_resumes(base, "nf4", four_bit(base, policy))
    losses = [line["eval/loss"] for line in evaluation_lines(run_dir)]
    assert losses[-1] < losses[0] - 0.02
    verify(run_dir / "sft" / "export")
    before, after = load_file(policy / "model.safetensors"), weights(run_dir)
    assert before.keys() == after.keys()
    name = "model.embed_tokens.weight"
    assert torch.equal(before[name], after[name])  # neither quantized nor adapted
    # an adapter of rank 4 explains a part of the difference, what nf4 rounded away the rest
    changed = "model.layers.0.mlp.down_proj.weight"
    difference = torch.linalg.svdvals(after[changed] - before[changed])
    assert difference[4] > 1e-3 and (after[changed] - before[changed]).abs().max() < 1.0


@pytest.mark.parametrize(("stage", "ranks"), [(2, 1), (3, 1), (3, 2)])
def test_four_bit_weights_give_the_same_policy_at_every_stage(
    base: Base, policy: Path, stage: int, ranks: int
) -> None:
    first = base.write("nf4-whole", four_bit(base, policy))
    finish(first, 1)  # done already, where the test above has run
    other = base.run(f"nf4-{stage}-{ranks}", four_bit(base, policy, stage), ranks)
    # fp32: sums in another order
    ours, theirs = weights(first), weights(other)
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("stage", [1, 3])
def test_eight_bit_adamw_resumes_bit_for_bit_and_is_close_to_the_whole_one(base: Base, stage: int) -> None:
    run_dir = assert_resumes(base, f"adamw8-{stage}", eight_bit(base, stage))
    job = eight_bit(base, stage)
    job.sft.optim.name = OptimizerName.adamw
    plain = base.run(f"adamw32-{stage}", job)
    ours, theirs = ([line["loss"] for line in training_lines(each)] for each in (run_dir, plain))
    assert ours != theirs, "8 bits change nothing?"
    assert ours == pytest.approx(theirs, rel=0.05)
