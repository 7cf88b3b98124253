"""Every file under conf/ composes into a configuration that its schema accepts."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from common.config import Offload, Truncation
from common.tracking_config import WandbMode
from common.training_config import OptimizerName
from pipeline import checks
from pipeline.config import CONF, PROJECT, PipelineConfig
from tests.pipeline.composing import composed

FILES = sorted(path.relative_to(CONF) for path in CONF.glob("*/*.yaml"))
EXPERIMENTS = [path for path in FILES if path.parent.name == "experiment"]
PER_STEP = ("data", "optim")


def choice(path: Path) -> list[str]:
    """Overrides that select a file of a group, in a job that admits it."""
    group, name = path.parent.name, path.stem
    if group == "experiment":
        return [f"experiment={name}"]
    if (group, name) == ("model", "qlora"):  # 4-bit weights are of a model that exists
        return ["model=qlora", "model.path=models/smollm2", "steps=[sft]", "sft.data.path=rows.jsonl"]
    key = f"{group}@sft.{group}" if group in PER_STEP else group
    return ["model=llama_4m" if group == "data" else "experiment=demo", f"{key}={name}"]


def test_all_groups_of_the_design_are_there() -> None:
    assert {path.parent.name for path in FILES} == {
        "model", "data", "deepspeed", "optim", "tracking", "launch", "experiment",
        "sft", "reward", "dpo", "ppo",
    }  # fmt: skip
    names = {path.stem for path in FILES if path.parent.name == "deepspeed"}
    assert names == {"zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "zero3_hpz"}
    assert {path.stem for path in FILES if path.parent.name == "optim"} == set(OptimizerName.__members__)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_yaml_composes(path: Path) -> None:
    assert isinstance(composed(*choice(path)), PipelineConfig)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_yaml_begins_with_a_comment_that_explains_it(path: Path) -> None:
    lines = (CONF / path).read_text().splitlines()
    assert [line for line in lines[:2] if line.startswith("# ") and "@package" not in line]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=str)
def test_every_experiment_begins_with_the_command_that_runs_it(path: Path) -> None:
    first = [line for line in (CONF / path).read_text().splitlines() if line != "# @package _global_"][0]
    assert first == f"# python -m pipeline run experiment={path.stem}"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=str)
def test_every_command_above_an_experiment_composes(path: Path) -> None:
    head = re.findall(
        r"^# (python -m pipeline run .*?)(?:   \(.*)?$", (CONF / path).read_text(), re.MULTILINE
    )
    assert head
    for command in head:
        assert composed(*shlex.split(command)[4:]).steps


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_yaml_value_became_a_boolean_where_a_name_was_meant(path: Path) -> None:
    values = yaml.safe_load((CONF / path).read_text()) or {}
    assert not isinstance(values.get("wandb"), bool)


def test_the_files_say_what_their_names_say() -> None:
    zero3 = composed("experiment=demo", "deepspeed=zero3_offload").deepspeed
    assert (zero3.stage, zero3.offload_optimizer, zero3.offload_param) == (3, Offload.cpu, Offload.cpu)
    zero2 = composed("experiment=demo", "deepspeed=zero2_offload").deepspeed
    assert (zero2.stage, zero2.offload_optimizer, zero2.offload_param) == (2, Offload.cpu, Offload.none)
    assert composed("experiment=demo", "tracking=off").tracking.wandb is WandbMode.off
    for name in OptimizerName:
        assert composed("experiment=demo", f"sft.optim={name.value}").sft.optim.name is name


def test_the_demo_needs_nothing_but_the_project() -> None:
    demo = composed()
    assert demo.run_name == "demo"
    assert demo.model.path is None and demo.model.config["model_type"] == "llama"
    sources = [Path(source.path) for source in demo.sft.data.all_sources()]
    assert sources and all(path.is_relative_to(PROJECT / "demo" / "data") for path in sources)
    checks.check_model(demo.model)
    checks.check_data(demo.sft.data, "sft.data")
    checks.check_length(demo.model, demo.sft.data.max_length, "sft.data.max_length")


@pytest.mark.parametrize("second", ["reward", "dpo"])
def test_the_demos_chains_need_nothing_but_the_project(second: str) -> None:
    demo = composed(f"steps=[sft,{second}]")
    data = getattr(demo, second).data
    assert Path(data.eval_path) == PROJECT / "demo" / "data" / "preferences_eval.jsonl"
    assert all(Path(source.path).is_relative_to(PROJECT / "demo") for source in data.all_sources())
    checks.check(demo, 1)


def test_the_demo_runs_ppo_on_prompts_that_are_not_held_out() -> None:
    demo = composed()
    assert [step.value for step in demo.steps] == ["sft", "reward", "ppo"]
    (source,) = demo.ppo.data.all_sources()
    training, held_out = Path(source.path).read_text(), Path(str(demo.ppo.data.eval_path)).read_text()
    assert training and 0 < len(held_out.splitlines()) <= demo.ppo.evaluation.num_prompts
    assert not set(training.splitlines()) & set(held_out.splitlines())
    checks.check(demo, 1)


@pytest.mark.parametrize("second", ["reward", "dpo"])
def test_hh_shares_its_rows_out_between_sft_and_the_steps_on_pairs(second: str) -> None:
    assert [step.value for step in composed("experiment=hh").steps] == ["sft", "reward"]
    job = composed("experiment=hh", f"steps=[sft,{second}]")
    data = getattr(job, second).data
    (demonstrations,), (pairs,) = job.sft.data.all_sources(), data.all_sources()
    assert demonstrations.path == pairs.path
    assert pairs.path.endswith("shared/data/hh_rlhf/harmless_a.jsonl.gz")
    assert (demonstrations.format, pairs.format) == ("chosen", None)
    assert job.sft.data.stage_split == data.stage_split == {"sft": 2.0, "reward": 4.0, "dpo": 4.0}
    assert (job.sft.data.truncation, data.truncation) == (Truncation.drop, Truncation.left)
    assert job.sft.data.max_length == data.max_length == 1024
    checks.check_stage_split(job)


@pytest.mark.parametrize("steps", ["[sft,reward]", "[sft,dpo]"])
def test_gsm8k_preferences_goes_on_from_the_policy_of_gsm8k(steps: str) -> None:
    job, sft = composed("experiment=gsm8k_preferences", f"steps={steps}"), composed("experiment=gsm8k")
    assert (job.sft, job.model) == (sft.sft, sft.model)
    solutions = str(PROJECT.parent / "shared" / "data" / "gsm8k" / "model_solutions.jsonl")
    assert job.reward.data.path == job.dpo.data.path == solutions
    assert job.run_name == "gsm8k_preferences"


@pytest.mark.parametrize("step", ["reward", "dpo"])
def test_steps_on_pairs_have_the_specifications_defaults(step: str) -> None:
    part = getattr(composed("model.path=x", f"{step}.data.path=x"), step)
    assert (part.train.global_batch_size, part.train.micro_batch_size, part.train.epochs) == (128, 1, 1.0)
    assert part.optim.lr is None  # the step's own: it depends on adapters
    assert part.policy is None


def test_the_template_for_pretrained_models_takes_rows_and_models_of_the_users() -> None:
    template = composed("experiment=smollm2")
    assert template.model.path == str(PROJECT / "models" / "smollm2") and not template.model.config
    assert [step.value for step in template.steps] == ["sft"]
    named = [f"{step}.data.path=mine.jsonl" for step in ("sft", "reward", "dpo", "ppo")]
    own = composed(
        "experiment=smollm2", "model=lora", "model.path=mine", *named, "steps=[sft,reward,dpo,ppo]"
    )
    assert (own.model.path, own.model.lora.enabled) == ("mine", True)
    for part in (own.sft, own.reward, own.dpo, own.ppo):
        assert [source.path for source in part.data.all_sources()] == ["mine.jsonl"]
        assert part.optim.lr is None  # the step's own: it depends on adapters


def test_the_template_needs_nothing_but_the_project_and_the_model() -> None:
    template = composed("experiment=smollm2")
    for part in (template.sft, template.reward, template.dpo, template.ppo):
        (source,) = part.data.all_sources()
        assert Path(source.path).is_relative_to(PROJECT / "demo" / "data") and Path(source.path).is_file()


def test_gsm8k_is_a_four_million_parameter_model_from_scratch_on_the_rows_beside_the_project() -> None:
    config = composed("experiment=gsm8k")
    llama = config.model.config
    hidden, layers, ffn = llama["hidden_size"], llama["num_hidden_layers"], llama["intermediate_size"]
    head = hidden // llama["num_attention_heads"]
    attention = 2 * hidden * hidden + 2 * hidden * head * llama["num_key_value_heads"]
    parameters = 4096 * hidden + layers * (attention + 3 * hidden * ffn + 2 * hidden) + hidden
    assert parameters == 3_950_848
    assert config.model.tokenizer.train_vocab_size == 4096
    assert config.sft.data.path == str(PROJECT.parent / "shared" / "data" / "gsm8k" / "train.jsonl")
    assert (config.sft.data.max_length, config.sft.data.eval_fraction) == (512, 0.05)
    assert config.sft.data.packing
