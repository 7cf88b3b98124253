"""PPO's settings, and what judges a training, are checked before anything is launched."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from common.config import DataConfig, Quantize, SourceConfig
from common.errors import UserError
from common.fields import as_schema
from common.stage import Step
from common.training_config import Exported, OptimConfig, OptimizerName
from common.vllm_fit import SamplingEngine
from pipeline import checks
from pipeline.config import PipelineConfig
from pipeline.disk import SMALLEST_DISK
from step3_ppo.config import Estimator, RewardSourceConfig
from tests.pipeline.checking import LLAMA, config_in, error_of


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PipelineConfig:
    return config_in(tmp_path, monkeypatch)


@pytest.fixture
def ppo(config: PipelineConfig) -> PipelineConfig:
    """A chain with PPO that passes every check."""
    config.steps = [Step.sft, Step.reward, Step.ppo]
    config.reward.data = DataConfig(path="rows.jsonl", max_length=256)
    config.ppo.data = DataConfig(path="rows.jsonl", max_length=256)
    config.ppo.rollout.max_new_tokens = 32
    checks.check(config, ranks=2)
    return config


def artifact(folder: str, context: int) -> str:
    """What checks read of an artifact: the context and the size of its weights."""
    Path(folder).mkdir()
    Path(folder, "config.json").write_text(json.dumps({**LLAMA, "max_position_embeddings": context}))
    Path(folder, "model.safetensors").write_bytes(b"x" * 100)
    return folder


def test_ppo_without_prompts_names_the_missing_key(ppo: PipelineConfig) -> None:
    ppo.ppo.data = DataConfig(max_length=256)
    assert "ppo.data.path is missing" in error_of(ppo).message


def test_updates_and_demonstrations_have_a_row_for_each_group_of_ranks_that_share_rows(
    ppo: PipelineConfig,
) -> None:
    ppo.ppo.train.global_batch_size = ppo.ppo.ptx_batch_size = 2
    ppo.ppo.ptx_data, ppo.ppo.ptx_weight = DataConfig(path="rows.jsonl", max_length=256), 0.1
    ppo.launch.sequence_parallel = 2
    checks.check(ppo, ranks=4)
    ppo.ppo.ptx_batch_size = 1
    assert "ppo.ptx_batch_size=1 is less than the 2 ranks" in error_of(ppo, ranks=4).message
    ppo.ppo.ptx_batch_size, ppo.launch.sequence_parallel = 4, 1
    assert "ppo.train.global_batch_size=2 is less than the 4 ranks" in error_of(ppo, ranks=4).message


def test_ranks_that_share_rows_share_the_heads_of_the_reward_model_too(ppo: PipelineConfig) -> None:
    ppo.steps, ppo.launch.sequence_parallel = [Step.ppo], 4
    ppo.ppo.policy = artifact("policy", 256)
    ppo.ppo.reward_model = artifact("scorer", 256)
    checks.check(ppo, ranks=4)
    Path("scorer", "config.json").write_text(json.dumps({**LLAMA, "num_attention_heads": 6}))
    assert "does not divide the 6 attention heads" in error_of(ppo, ranks=4).message


def test_vllm_samples_from_no_policy_that_it_would_compute_otherwise(
    ppo: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ppo.ppo.rollout.engine = SamplingEngine.vllm
    checks.check(ppo, ranks=2)
    ppo.ppo.rollout.vllm.servers = ["http://127.0.0.1:8000"]
    checks.check(ppo, ranks=2)
    ppo.model.lora.enabled = True
    assert "are handed whole weights" in error_of(ppo).message
    ppo.ppo.rollout.vllm.servers, ppo.model.lora.dora = None, True
    assert "has no DoRA" in error_of(ppo).message
    ppo.model.lora.dora, ppo.model.quantize = False, Quantize.nf4
    monkeypatch.setattr(checks, "check_bitsandbytes", lambda *_: None)  # nf4 needs it
    assert "another policy than the one that is trained" in error_of(ppo).message


def test_an_update_of_more_responses_than_an_iteration_samples_is_refused(ppo: PipelineConfig) -> None:
    ppo.ppo.rollout.prompts, ppo.ppo.rollout.samples_per_prompt = 10, 4
    ppo.ppo.train.global_batch_size = 40
    checks.check(ppo, ranks=2)
    ppo.ppo.train.global_batch_size = 41
    error = error_of(ppo)
    assert "ppo.train.global_batch_size=41, but an iteration samples 40 responses" in error.message
    assert "ppo.train.global_batch_size=40 or less" in str(error.hint)
    ppo.ppo.train.global_batch_size = 1
    assert "ppo.train.global_batch_size=1 is less than the 2 ranks" in error_of(ppo, ranks=2).message


def test_a_reward_server_is_not_waited_for_longer_than_the_ranks_wait(ppo: PipelineConfig) -> None:
    ppo.ppo.rewards = [RewardSourceConfig(url="https://h/x", timeout=600.0)]
    checks.check(ppo, ranks=1)
    assert "may wait 5,415 s for scores" in error_of(ppo, ranks=2).message


def test_prompts_with_responses_fit_into_the_context_of_policy_and_reward_model(ppo: PipelineConfig) -> None:
    ppo.ppo.reward_model = artifact("short", context=128)
    error = error_of(ppo)
    assert "ppo.data.max_length=256, but the reward model's context is 128 tokens" in error.message
    ppo.ppo.data.max_length = 128
    checks.check(ppo, ranks=1)
    ppo.ppo.reward_model, ppo.ppo.data.max_length = None, 257
    assert "ppo.data.max_length=257, but the model's context is 256 tokens" in error_of(ppo).message


def test_demonstrations_are_mixed_in_exactly_when_they_have_a_weight(ppo: PipelineConfig) -> None:
    ppo.ppo.ptx_data = DataConfig(path="rows.jsonl", max_length=256)
    error = error_of(ppo)
    assert "ppo.ptx_data names rows.jsonl, which ppo.ptx_weight=0.0 leaves out" in error.message
    ppo.ppo.ptx_weight = 0.1
    checks.check(ppo, ranks=2)
    ppo.ppo.ptx_batch_size = 1
    assert "ppo.ptx_batch_size=1 is less than the 2 ranks" in error_of(ppo, ranks=2).message
    ppo.ppo.ptx_data.max_length = 257
    assert "ppo.ptx_data.max_length=257, but the model's context" in error_of(ppo).message
    ppo.ppo.ptx_data = DataConfig()
    assert "ppo.ptx_data.path is missing" in error_of(ppo).message


def test_both_optimizers_of_ppo_are_checked_and_that_of_a_critic_only_if_there_is_one(
    ppo: PipelineConfig,
) -> None:
    ppo.ppo.critic.optim = OptimConfig(name=OptimizerName.paged_adamw_8bit)
    assert "ppo.critic.optim.name=paged_adamw_8bit needs a GPU" in error_of(ppo).message
    ppo.ppo.critic.optim = OptimConfig(name=OptimizerName.muon)
    assert "ppo.critic.optim.name=muon with model.dtype=bf16" in error_of(ppo).message
    ppo.ppo.estimator, ppo.ppo.rollout.samples_per_prompt = Estimator.rloo, 2
    checks.check(ppo, ranks=1)
    ppo.ppo.optim = OptimConfig(name=OptimizerName.paged_adamw_8bit)
    assert "ppo.optim.name=paged_adamw_8bit needs a GPU" in error_of(ppo).message


def test_ppo_has_the_shares_of_the_steps_before_it(ppo: PipelineConfig) -> None:
    shares = {"sft": 2.0, "ppo": 4.0}
    ppo.sft.data.stage_split = shares
    assert "has a share for ppo, but ppo.data.stage_split is empty" in error_of(ppo).message
    ppo.ppo.data.stage_split = dict(shares)
    checks.check(ppo, ranks=1)
    ppo.ppo.data.stage_split = {"sft": 2.0, "reward": 4.0}
    assert "leaves no rows to ppo itself" in error_of(ppo).message


def test_the_critics_checkpoint_needs_its_part_of_the_disk(
    ppo: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ppo.steps = [Step.ppo]
    ppo.ppo.policy, ppo.ppo.reward_model = artifact("policy", 256), artifact("reward_model", 256)
    usage = namedtuple("usage", "total used free")
    for critic, needed in ((True, 800 + 700), (False, 800)):
        if not critic:
            ppo.ppo.estimator, ppo.ppo.rollout.samples_per_prompt = Estimator.rloo, 2
        free = SMALLEST_DISK + needed
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(0, 0, free))
        checks.check(ppo, ranks=1)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(0, 0, free - 1))
        assert "are free" in error_of(ppo).message


def test_reward_functions_are_not_imported_by_the_controller(ppo: PipelineConfig) -> None:
    ppo.ppo.rewards = [RewardSourceConfig(function="no.such.module:function")]
    ppo.steps = [Step.sft, Step.ppo]
    checks.check(ppo, ranks=1)


@pytest.mark.parametrize("judged", ["export=best", "stop_when.metric=eval/loss"])
def test_what_is_judged_needs_rows_and_several_evaluations(config: PipelineConfig, judged: str) -> None:
    train = config.sft.train
    if judged == "export=best":
        train.export = Exported.best
    else:
        train.stop_when.metric = "eval/loss"
    assert error_of(config).message == (
        f"sft.train.{judged} compares evaluations, and with sft.train.eval_every=0 there is one, at the end"
    )
    train.eval_every, config.sft.data.eval_fraction = 5, 0.0
    assert error_of(config).message == (
        f"sft.train.{judged} needs held-out rows, and sft.data.eval_fraction=0 leaves none"
    )


@pytest.mark.parametrize(
    ("step", "metric", "way_out"),
    [
        (Step.sft, "eval/los", "did you mean sft.train.stop_when.metric=eval/loss?"),
        (
            Step.sft,
            "accuracy",
            "measured are eval/loss, eval/perplexity, eval/mean_token_accuracy, eval/stop_rate",
        ),
        (Step.sft, "eval/rows/loss", "did you mean sft.train.stop_when.metric=eval/loss?"),  # of one source
        (Step.ppo, "eval/loss", "measured are eval/reward, eval/reward_se"),
        (Step.ppo, "eval/greedy/kl", "did you mean"),  # it is measured of sampled responses
    ],
)
def test_a_metric_that_no_evaluation_gives_is_refused_before_anything_starts(
    config: PipelineConfig, ppo: PipelineConfig, step: Step, metric: str, way_out: str
) -> None:
    made = config if step is Step.sft else ppo
    train = getattr(made, step.value).train
    train.eval_every, train.stop_when.metric = 1, metric
    error = error_of(made)
    assert error.message == f"{step.value}.train.stop_when.metric={metric} is not measured on held-out rows"
    assert str(error.hint).startswith(way_out)
    train.stop_when.metric = "eval/loss" if step is Step.sft else "eval/greedy/length"
    checks.check(made, ranks=1)


def test_the_loss_of_a_source_can_be_watched_where_rows_of_several_are_held_out(
    config: PipelineConfig,
) -> None:
    train, data = config.sft.train, config.sft.data
    train.eval_every, train.stop_when.metric = 1, "eval/words/loss"
    data.path, data.sources = None, [SourceConfig("rows.jsonl", "words"), SourceConfig("rows.jsonl")]
    checks.check(config, ranks=1)
    data.eval_path = "rows.jsonl"
    assert "eval/words/loss is not measured" in error_of(config).message


def test_ppo_has_no_best_step_and_watches_only_what_is_evaluated() -> None:
    with pytest.raises(UserError, match=r"ppo\.train\.export=best: PPO has no loss"):
        as_schema(PipelineConfig, {"ppo": {"train": {"export": "best"}}})
    watched = {"train": {"stop_when": {"metric": "eval/reward"}}, "evaluation": {"num_prompts": 0}}
    with pytest.raises(UserError, match=r"ppo\.train\.stop_when\.metric=eval/reward watches evaluations"):
        as_schema(PipelineConfig, {"ppo": watched})
