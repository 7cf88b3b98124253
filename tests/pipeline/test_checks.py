"""What cannot work is refused before anything is launched."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from common.config import (
    DataConfig,
    Dtype,
    Exported,
    ModelConfig,
    OptimConfig,
    OptimizerName,
    Quantize,
    SourceConfig,
    TokenizerConfig,
)
from common.errors import UserError
from common.fields import as_schema
from common.launch_config import LaunchConfig, Launcher, SlurmConfig
from common.stage import Step
from common.tracking_config import MirrorName
from launch import local
from pipeline import checks
from pipeline.config import PipelineConfig
from step3_ppo.config import Estimator, RewardSourceConfig

LLAMA = {"model_type": "llama", "max_position_embeddings": 256}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PipelineConfig:
    """A configuration that passes every check."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local, "count_gpus", lambda: 0)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    config = PipelineConfig(
        model=ModelConfig(config=dict(LLAMA), tokenizer=TokenizerConfig(None, 512), dtype=Dtype.bf16)
    )
    config.sft.data = DataConfig(path="rows.jsonl", max_length=256)
    checks.check(config, ranks=2)
    return config


def error_of(config: PipelineConfig, ranks: int = 1) -> UserError:
    with pytest.raises(UserError) as caught:
        checks.check(config, ranks)
    assert caught.value.hint
    return caught.value


def test_a_mirror_that_is_not_installed_is_named_before_anything_starts(
    config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.tracking.to = [MirrorName.wandb, MirrorName.tensorboard]
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    error = error_of(config)
    assert "tensorboard, which is not installed" in error.message and "pip install" in str(error.hint)
    monkeypatch.setattr(checks, "find_spec", lambda name: name)
    checks.check(config, ranks=1)


def test_a_webhook_whose_variable_is_not_set_is_named_before_anything_starts(
    config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.tracking.webhook = "env:OF_THE_TEST"
    assert "OF_THE_TEST is not set" in error_of(config).message
    monkeypatch.setenv("OF_THE_TEST", "https://chat.example/secret")
    checks.check(config, ranks=1)


def test_data_without_a_model_names_the_missing_key(config: PipelineConfig) -> None:
    config.model = ModelConfig()
    error = error_of(config)
    assert "model.path is missing" in error.message and "experiment=demo" in str(error)


def test_a_model_without_data_names_the_missing_key(config: PipelineConfig) -> None:
    config.sft.data = DataConfig(max_length=256)
    error = error_of(config)
    assert error.message.endswith("sft.data.path is missing")
    assert error.hint == "sft.data.path=FILE_OR_HUB_NAME, or experiment=demo"


def test_the_demo_is_not_offered_where_it_would_take_the_place_of_an_experiment(
    config: PipelineConfig,
) -> None:
    config.steps = [Step.sft, Step.dpo]
    error = error_of(config)
    assert error.message.endswith("dpo.data.path is missing")
    assert "experiment=demo" not in str(error) and "data@dpo.data=NAME" in str(error.hint)
    config.steps, config.dpo.policy = (
        [Step.dpo],
        "policy",
    )  # the experiment's data is for a step that does not run
    assert "experiment=demo" not in str(error_of(config))


def test_a_global_batch_smaller_than_the_number_of_ranks_is_refused(config: PipelineConfig) -> None:
    config.sft.train.global_batch_size = 3
    checks.check(config, ranks=3)
    assert "sft.train.global_batch_size=3 is less than the 4 ranks" in error_of(config, ranks=4).message


def test_a_missing_file_is_named_with_its_nearest_neighbour(config: PipelineConfig) -> None:
    config.sft.data = DataConfig(path="row.jsonl", max_length=256)
    error = error_of(config)
    assert error.message == "sft.data.path=row.jsonl: no such file or folder"
    assert error.hint == "did you mean rows.jsonl?"
    config.sft.data = DataConfig(sources=[SourceConfig("rows.jsonl"), SourceConfig("no/such/rows.csv")])
    config.sft.data.max_length = 256
    error = error_of(config)
    assert error.message.startswith("sft.data.sources[1].path=no/such/rows.csv")
    assert "there is no folder no/such" in str(error.hint)


def test_an_empty_file_and_a_missing_held_out_file_are_refused(config: PipelineConfig) -> None:
    Path("empty.jsonl").touch()
    config.sft.data = DataConfig(path="empty.jsonl", max_length=256)
    assert "sft.data.path=empty.jsonl is empty" in error_of(config).message
    config.sft.data = DataConfig(path="rows.jsonl", eval_path="held_out.jsonl", max_length=256)
    assert "sft.data.eval_path=held_out.jsonl: no such" in error_of(config).message


@pytest.mark.parametrize("name", ["gsm8k", "openai/gsm8k"])
def test_what_may_be_a_hub_name_passes(config: PipelineConfig, name: str) -> None:
    config.sft.data = DataConfig(path=name, max_length=256)
    config.model = ModelConfig(path=name)
    checks.check(config, ranks=1)


@pytest.mark.parametrize("path", ["./model", "/no/model", "../model", "a/b/c", "~/model"])
def test_what_can_only_be_a_local_folder_must_exist(config: PipelineConfig, path: str) -> None:
    config.model = ModelConfig(path=path)
    assert error_of(config).message == f"model.path={path}: no such folder"


def test_a_model_folder_without_a_config_is_refused(config: PipelineConfig) -> None:
    Path("model").mkdir()
    config.model = ModelConfig(path="model")
    assert error_of(config).message == "model.path=model has no config.json"
    config.model = ModelConfig(path="rows.jsonl")
    assert "is a file, not a folder" in error_of(config).message


def test_a_model_from_scratch_needs_a_type_and_a_tokenizer(config: PipelineConfig) -> None:
    config.model = ModelConfig(config={"hidden_size": 8})
    assert "model.config has no model_type" in error_of(config).message
    config.model = ModelConfig(config=dict(LLAMA))
    assert "no tokenizer is named" in error_of(config).message


def test_rows_longer_than_the_models_context_are_refused(config: PipelineConfig) -> None:
    config.sft.data.max_length = 257
    error = error_of(config)
    assert "sft.data.max_length=257, but the model's context is 256 tokens" in error.message
    assert error.hint == "sft.data.max_length=256 or less"


def test_the_context_of_a_local_model_is_read_from_its_folder(config: PipelineConfig) -> None:
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps({**LLAMA, "max_position_embeddings": 128}))
    config.model = ModelConfig(path="model")
    assert "context is 128 tokens" in error_of(config).message
    Path("model/config.json").write_text("{")
    assert "config.json cannot be read" in error_of(config).message


@pytest.mark.parametrize("name", [OptimizerName.adamw_8bit, OptimizerName.paged_adamw_8bit])
def test_an_optimizer_for_gpus_is_refused_without_one(
    config: PipelineConfig, name: OptimizerName, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.sft.optim.name = name
    assert f"sft.optim.name={name.value} needs a GPU" in error_of(config).message
    monkeypatch.setattr(local, "count_gpus", lambda: 1)
    checks.check(config, ranks=1)


def test_four_bit_weights_are_refused_without_a_gpu(
    config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.model.lora.enabled, config.model.quantize = True, Quantize.nf4
    assert "model.quantize=nf4 needs a GPU" in error_of(config).message
    monkeypatch.setattr(local, "count_gpus", lambda: 1)
    checks.check(config, ranks=1)


def test_what_other_machines_have_is_not_judged_by_this_one(config: PipelineConfig) -> None:
    config.model.lora.enabled, config.model.quantize = True, Quantize.nf4
    config.sft.optim.name = OptimizerName.adamw_8bit
    config.tracking.webhook = "env:SET_ON_THE_NODES_ALONE"
    for launch in (LaunchConfig(Launcher.slurm), LaunchConfig(Launcher.ssh), LaunchConfig(Launcher.k8s)):
        config.launch = launch
        checks.check(config, ranks=1)
    config.launch = LaunchConfig(Launcher.slurm, slurm=SlurmConfig(gpus_per_node=0))
    assert error_of(config).message.endswith("needs a GPU, and launch.slurm.gpus_per_node=0")
    config.launch = LaunchConfig(Launcher.slurm, node_rank=0)  # it takes part in the run
    assert "SET_ON_THE_NODES_ALONE is not set" in error_of(config).message
    config.tracking.webhook = None
    assert "this machine offers none" in error_of(config).message


@pytest.mark.parametrize(
    ("dtype", "stage", "works"),
    [("bf16", 1, False), ("bf16", 2, False), ("fp16", 2, False), ("bf16", 3, True), ("fp32", 1, True)],
)
def test_muon_is_refused_where_deepspeed_does_not_compute_it(
    config: PipelineConfig, dtype: str, stage: int, works: bool
) -> None:
    config.sft.optim = OptimConfig(name=OptimizerName.muon, max_grad_norm=0)
    config.model.dtype, config.deepspeed.stage = Dtype(dtype), stage
    if works:
        return checks.check(config, ranks=1)
    error = error_of(config)
    assert f"sft.optim.name=muon with model.dtype={dtype}" in error.message
    assert error.hint == "deepspeed=zero3, or model.dtype=fp32"


def test_muons_update_is_not_clipped(config: PipelineConfig) -> None:
    config.sft.optim = OptimConfig(name=OptimizerName.muon)
    config.deepspeed.stage = 3
    assert "sft.optim.max_grad_norm=1.0 would clip" in error_of(config).message


@pytest.mark.parametrize(
    ("sft", "reward", "said"),
    [
        ({"sft": 3, "reward": 7}, {"sft": 3, "reward": 7}, None),
        ({"sft": 3, "reward": 7}, {"reward": 7, "sft": 3}, None),
        ({}, {"reward": 7, "ppo": 3}, None),  # other data, not shared out
        ({"sft": 2, "ppo": 4}, {}, None),  # ppo does not run
        ({"sft": 1, "reward": 1}, {}, "has a share for reward, but reward.data.stage_split is empty"),
        ({}, {"sft": 3, "reward": 7}, "reward.data.stage_split has a share for sft, but sft.data"),
        ({"sft": 3, "reward": 7}, {"sft": 5, "reward": 5}, "their parts could overlap"),
        ({"reward": 7}, {}, "leaves no rows to sft itself"),
        ({"sft": 1, "rward": 1}, {}, "sft.data.stage_split: rward is not a step"),
    ],
)
def test_steps_that_share_out_the_rows_of_a_data_set_agree_on_the_shares(
    config: PipelineConfig, sft: dict[str, float], reward: dict[str, float], said: str | None
) -> None:
    config.steps = [Step.sft, Step.reward]
    config.reward.data = DataConfig(path="rows.jsonl", max_length=256, stage_split=reward)
    config.sft.data.stage_split = sft
    if said is None:
        return checks.check(config, ranks=1)
    error = error_of(config)
    assert said in error.message
    assert "rward" not in error.message or error.hint == "did you mean reward?"


def test_a_share_for_a_step_that_does_not_run_asks_nothing_of_it(config: PipelineConfig) -> None:
    config.sft.data.stage_split = {"sft": 1, "reward": 1}
    checks.check(config, ranks=1)


def test_every_step_of_a_chain_is_checked_under_its_own_name(config: PipelineConfig) -> None:
    config.steps = [Step.sft, Step.dpo]
    config.dpo.data = DataConfig(path="rows.jsonl", max_length=257)
    assert "dpo.data.max_length=257" in error_of(config).message
    config.dpo.data.max_length = 256
    config.dpo.train.global_batch_size = 1
    assert "dpo.train.global_batch_size=1 is less than the 2 ranks" in error_of(config, ranks=2).message
    config.dpo.optim.name = OptimizerName.adamw_8bit
    assert "dpo.optim.name=adamw_8bit needs a GPU" in error_of(config).message
    config.dpo.data = DataConfig(path="rows.jsonl", eval_path="no.jsonl", max_length=256)
    assert "dpo.data.eval_path=no.jsonl: no such" in error_of(config).message


def test_a_secondary_partition_must_divide_the_ranks(config: PipelineConfig) -> None:
    config.deepspeed.stage, config.deepspeed.hpz_partition_size = 3, 2
    checks.check(config, ranks=4)
    assert "hpz_partition_size=2 does not divide the 3 rank(s)" in error_of(config, ranks=3).message
    checks.check(config, ranks=6, on_each=[4, 2])
    with pytest.raises(UserError, match=r"does not divide the 3 rank\(s\) of this machine"):
        checks.check(config, ranks=6, on_each=[3, 3])


def test_an_output_folder_below_a_file_is_refused(config: PipelineConfig) -> None:
    config.output_dir = "rows.jsonl/runs"
    assert "is not a folder" in error_of(config).message


def test_an_output_folder_that_cannot_be_written_is_refused(
    config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What access() answers on a read-only mount; permissions alone do not stop root.
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    assert "cannot be written (read-only, or not yours)" in error_of(config).message


def test_a_disk_too_full_for_the_export_and_a_checkpoint_is_refused(
    config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, checks.SMALLEST_DISK + 799))
    checks.check(config, ranks=1)
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(LLAMA))
    Path("model/model.safetensors").write_bytes(b"x" * 100)  # exported once, and 7 times in a checkpoint
    config.model = ModelConfig(path="model")
    assert checks.disk_needed([config.model]) == checks.SMALLEST_DISK + 800
    assert "are free" in error_of(config).message
    config.model.lora.enabled = True
    checks.check(config, ranks=1)


def test_checks_of_a_step_that_does_not_run_are_not_made(config: PipelineConfig) -> None:
    config.reward.data = DataConfig()
    checks.check(config, ranks=1)
    config.steps = [Step.sft, Step.reward]
    assert "reward.data.path is missing" in error_of(config).message


# --- PPO -------------------------------------------------------------------------------------------


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
    ppo.ppo.critic.optim = OptimConfig(name=OptimizerName.adamw_8bit)
    assert "ppo.critic.optim.name=adamw_8bit needs a GPU" in error_of(ppo).message
    ppo.ppo.critic.optim = OptimConfig(name=OptimizerName.muon)
    assert "ppo.critic.optim.name=muon with model.dtype=bf16" in error_of(ppo).message
    ppo.ppo.estimator, ppo.ppo.rollout.samples_per_prompt = Estimator.rloo, 2
    checks.check(ppo, ranks=1)
    ppo.ppo.optim = OptimConfig(name=OptimizerName.adamw_8bit)
    assert "ppo.optim.name=adamw_8bit needs a GPU" in error_of(ppo).message


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
        free = checks.SMALLEST_DISK + needed
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
