"""`preview`: each step is told its policy and its tokenizer, also before anything ran."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import preview
from pipeline.config import PipelineConfig
from tests.pipeline.fakes import DPO, PPO, REWARD, SFT, config, from_policy, go, make_policy, refused

pytestmark = pytest.mark.usefixtures("fake_steps")


def test_preview_passes_its_exit_status_on_and_makes_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    made = config()
    assert preview.preview(made) == 0
    monkeypatch.setenv("FAKE_STATUS", "2")
    assert preview.preview(made) == 2
    assert not Path("runs").exists()


def previewed(made: PipelineConfig, capfd: pytest.CaptureFixture[str]) -> str:
    """The line of the last step: which policy and which tokenizer it was told of."""
    assert preview.preview(made) == 0
    return capfd.readouterr().out.splitlines()[-1]


def test_a_preview_before_anything_ran_reads_with_the_tokenizer_that_sfts_preview_trained(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert previewed(config(SFT, REWARD), capfd) == "reward: policy None, tokenizer None"
    monkeypatch.setenv("FAKE_TRAINS_TOKENIZER", "1")
    told = previewed(config(SFT, REWARD), capfd)
    assert told.startswith("reward: policy None, tokenizer /") and told.endswith("/sft/tokenizer")


def test_a_preview_takes_the_policy_that_the_run_has_or_the_user_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_TRAINS_TOKENIZER", "1")
    go(config(SFT))
    capfd.readouterr()
    assert previewed(config(SFT, DPO), capfd) == "dpo: policy runs/a/sft/export, tokenizer None"
    make_policy("here")
    assert previewed(from_policy(DPO, "here"), capfd) == "dpo: policy here, tokenizer None"


def test_a_preview_of_ppo_alone_needs_no_reward_model_at_all(capfd: pytest.CaptureFixture[str]) -> None:
    make_policy("here")
    made = from_policy(PPO, "here")
    assert made.ppo.reward_model is None and refused(made).message == "ppo needs a reward_model"
    assert previewed(made, capfd) == "ppo: policy here, tokenizer None"


def test_a_preview_of_ppo_needs_no_reward_model_yet(capfd: pytest.CaptureFixture[str]) -> None:
    assert previewed(config(SFT, REWARD, PPO), capfd) == "ppo: policy None, tokenizer None"
    go(config(SFT))
    capfd.readouterr()
    assert previewed(config(SFT, REWARD, PPO), capfd) == "ppo: policy runs/a/sft/export, tokenizer None"
