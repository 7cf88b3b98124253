"""What cannot work is refused before anything is launched."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from common.config import DataConfig, Dtype, ModelConfig, Quantize, SourceConfig
from common.errors import UserError
from common.launch_config import LaunchConfig, Launcher, SlurmConfig
from common.stage import Step
from common.tracking_config import MirrorName
from common.training_config import OptimConfig, OptimizerName
from launch import local
from pipeline import checks
from pipeline.config import PipelineConfig
from pipeline.disk import SMALLEST_DISK, disk_needed
from tests.pipeline.checking import LLAMA, config_in, error_of


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PipelineConfig:
    return config_in(tmp_path, monkeypatch)


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


def test_a_paged_optimizer_is_refused_without_a_gpu(
    config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_bitsandbytes(monkeypatch, "0.50.2")
    config.sft.optim.name = OptimizerName.paged_adamw_8bit
    error = error_of(config)
    assert "sft.optim.name=paged_adamw_8bit needs a GPU" in error.message
    assert error.hint == "sft.optim.name=adamw_8bit, adamw or adafactor"
    monkeypatch.setattr(local, "count_gpus", lambda: 1)
    checks.check(config, ranks=1)


def has_bitsandbytes(monkeypatch: pytest.MonkeyPatch, installed: str | None) -> None:
    """Whatever is installed here."""
    monkeypatch.setattr(checks, "find_spec", lambda name: installed)
    monkeypatch.setattr(checks, "version", lambda name: installed)


def test_four_and_eight_bits_are_refused_without_bitsandbytes_that_has_them(
    config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.model.lora.enabled, config.model.quantize = True, Quantize.nf4
    has_bitsandbytes(monkeypatch, None)
    assert "model.quantize=nf4 needs bitsandbytes, which is not installed" in error_of(config).message
    has_bitsandbytes(monkeypatch, "0.49.9")
    message = error_of(config).message
    assert message == "model.quantize=nf4 without a GPU needs bitsandbytes 0.50, and 0.49.9 is installed"
    monkeypatch.setattr(local, "count_gpus", lambda: 1)
    checks.check(config, ranks=1)
    monkeypatch.setattr(local, "count_gpus", lambda: 0)
    has_bitsandbytes(monkeypatch, "0.50.0")
    checks.check(config, ranks=1)
    config.model.quantize, config.sft.optim.name = Quantize.none, OptimizerName.adamw_8bit
    checks.check(config, ranks=1)
    has_bitsandbytes(monkeypatch, None)
    error = error_of(config)
    assert "sft.optim.name=adamw_8bit needs bitsandbytes" in error.message
    assert str(error.hint).endswith("or sft.optim.name=adamw or adafactor")


def test_what_other_machines_have_is_not_judged_by_this_one(
    config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_bitsandbytes(monkeypatch, None)
    config.model.lora.enabled, config.model.quantize = True, Quantize.nf4
    config.sft.optim.name = OptimizerName.adamw_8bit
    config.tracking.webhook = "env:SET_ON_THE_NODES_ALONE"
    for launch in (LaunchConfig(Launcher.slurm), LaunchConfig(Launcher.ssh), LaunchConfig(Launcher.k8s)):
        config.launch = launch
        checks.check(config, ranks=1)
    config.launch = LaunchConfig(Launcher.slurm, slurm=SlurmConfig(gpus_per_node=0))
    checks.check(config, ranks=1)
    config.sft.optim.name = OptimizerName.paged_adamw_8bit
    assert error_of(config).message.endswith("needs a GPU, and launch.slurm.gpus_per_node=0")
    config.launch = LaunchConfig(Launcher.slurm, node_rank=0)  # it takes part in the run
    assert "SET_ON_THE_NODES_ALONE is not set" in error_of(config).message
    config.tracking.webhook = None
    has_bitsandbytes(monkeypatch, "0.50.2")
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
    config.dpo.optim.name = OptimizerName.paged_adamw_8bit
    assert "dpo.optim.name=paged_adamw_8bit needs a GPU" in error_of(config).message
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
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, SMALLEST_DISK + 799))
    checks.check(config, ranks=1)
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(LLAMA))
    Path("model/model.safetensors").write_bytes(b"x" * 100)  # exported once, and 7 times in a checkpoint
    config.model = ModelConfig(path="model")
    assert disk_needed([config.model]) == SMALLEST_DISK + 800
    assert "are free" in error_of(config).message
    config.model.lora.enabled = True
    checks.check(config, ranks=1)
    assert disk_needed([config.model]) == SMALLEST_DISK + 100
    # what adapters are merged into lies beside the export, until that has been checked
    assert disk_needed([config.model], zero_stage=3) == SMALLEST_DISK + 200


def test_checks_of_a_step_that_does_not_run_are_not_made(config: PipelineConfig) -> None:
    config.reward.data = DataConfig()
    checks.check(config, ranks=1)
    config.steps = [Step.sft, Step.reward]
    assert "reward.data.path is missing" in error_of(config).message
