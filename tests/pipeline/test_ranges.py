"""Which values a key may have: one table of what is refused, and every number of the schema has a range."""

from __future__ import annotations

import math
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.config import load_resolved, to_plain
from common.errors import UserError
from common.fields import as_schema, fields_of, types_of, without_none
from pipeline import schema
from pipeline.compose import compose, prepare
from pipeline.config import PipelineConfig
from pipeline.state import write_resolved
from step1_sft.config import SFTConfig, SFTJob
from step3_ppo.config import PPOJob

JOB = ("model.path=org/name", "sft.data.path=rows.jsonl")
UP_TO_A_MILLION = "allowed: 1 to 1,000,000"

REFUSED = [  # what is written, the key and value that are named, and what is allowed
    ("seed=-1", "seed=-1", "allowed: 0 to 9,223,372,036,854,775,807"),
    ("sft.optim.eps=inf", "sft.optim.eps=inf", "allowed: above 0, up to 1"),
    ("sft.optim.weight_decay=inf", "sft.optim.weight_decay=inf", "allowed: 0 to 10"),
    ("sft.optim.lr=1e30", "sft.optim.lr=1e+30", "above 0, up to 10 (Muon takes larger ones"),
    ("sft.optim.lr=inf", "sft.optim.lr=inf", "above 0, up to 10"),
    ("sft.optim.lr=nan", "sft.optim.lr=nan", "above 0, up to 10"),
    ("dpo.optim.lr=0", "dpo.optim.lr=0.0", "above 0, up to 10"),
    ("ppo.optim.lr=-1", "ppo.optim.lr=-1.0", "above 0, up to 10"),
    ("ppo.critic.optim.lr=-1", "ppo.critic.optim.lr=-1.0", "above 0, up to 10"),
    ("sft.optim.betas=[0.9,1]", "sft.optim.betas[1]=1.0", "0 up to (not including) 1"),
    ("sft.optim.betas=[0.9]", "sft.optim.betas=[0.9]", "two numbers"),
    ("sft.data.max_length=1", "sft.data.max_length=1", "allowed: 2 to 10,000,000"),
    ("reward.data.max_length=1", "reward.data.max_length=1", "allowed: 2 to 10,000,000"),
    ("ppo.ptx_data.max_length=1", "ppo.ptx_data.max_length=1", "allowed: 2 to 10,000,000"),
    ("sft.data.stage_split={sft: 0}", "sft.data.stage_split.sft=0.0", "allowed: 1e-06 to 1,000,000"),
    ("sft.data.stage_split={reward: inf}", "sft.data.stage_split.reward=inf", "1e-06 to 1,000,000"),
    ("sft.data.sources=[{path: a, weight: inf}]", "sft.data.sources[0].weight=inf", "1e-06 to 1,000"),
    (
        "sft.data.sources=[{path: a}, {path: b, weight: 1e-300}]",
        "sft.data.sources[1].weight=1e-300",
        "1e-06 to 1,000",
    ),
    ("sft.train.micro_batch_size=99999999999", "sft.train.micro_batch_size=99999999999", UP_TO_A_MILLION),
    ("sft.train.epochs=inf", "sft.train.epochs=inf", "allowed: above 0, up to 10,000"),
    ("sft.train.epochs=1e15", "sft.train.epochs=1000000000000000.0", "allowed: above 0, up to 10,000"),
    ("sft.train.entropy_every=-1", "sft.train.entropy_every=-1", "allowed: 0 to 1,000,000,000"),
    ("sft.sampling.temperature=1e-320", "sft.sampling.temperature=1e-320", "0 (greedy), or 0.001 to 100"),
    ("sft.sampling.max_new_tokens=0", "sft.sampling.max_new_tokens=0", "allowed: 1 to 10,000,000"),
    ("sft.sampling.num_prompts=-1", "sft.sampling.num_prompts=-1", "allowed: 0 to 1,000,000"),
    ("reward.center_rewards_coefficient=-1", "reward.center_rewards_coefficient=-1.0", "allowed: 0 to 1,000"),
    ("dpo.beta=0", "dpo.beta=0.0", "allowed: above 0, up to 1,000"),
    ("dpo.label_smoothing=0.5", "dpo.label_smoothing=0.5", "allowed: 0 up to (not including) 0.5"),
    ("ppo.rollout.temperature=1e-320", "ppo.rollout.temperature=1e-320", "allowed: 0.001 to 100"),
    ("ppo.rollout.temperature=0", "ppo.rollout.temperature=0.0", "responses that were sampled"),
    ("ppo.rollout.slots=0", "ppo.rollout.slots=0", UP_TO_A_MILLION),
    (
        f"ppo.rollout.samples_per_prompt={2**63 - 1}",
        f"ppo.rollout.samples_per_prompt={2**63 - 1}",
        UP_TO_A_MILLION,
    ),
    ("ppo.reward_clip=inf", "ppo.reward_clip=inf", "allowed: above 0, up to 1,000,000"),
    ("ppo.kl.coef=1e300", "ppo.kl.coef=1e+300", "allowed: 0 to 1,000"),
    ("ppo.clip=1", "ppo.clip=1.0", "allowed: above 0, below 1"),
    ("ppo.rewards=[{model: true, weight: nan}]", "ppo.rewards[0].weight=nan", "-1,000,000 to 1,000,000"),
    ('ppo.rewards=[{model: true, name: " "}]', "ppo.rewards[0].name=' '", "a text that is not empty"),
    ("deepspeed.reduce_bucket_size=0", "deepspeed.reduce_bucket_size=0", "allowed: 1 to"),
    ("deepspeed.stage=0", "deepspeed.stage=0", "allowed: 1 to 3 (in stage 0 bf16 takes a wrong first step"),
    ("model.lora.alpha=-1", "model.lora.alpha=-1", "allowed: 1 to 65,536"),
    ("model.lora.targets=[]", "model.lora.targets=[]", "names of modules, or all-linear"),
    ("launch.slurm.cpus_per_task=-1", "launch.slurm.cpus_per_task=-1", "allowed: 1 to 65,536"),
    ("launch.slurm.gpus_per_node=-1", "launch.slurm.gpus_per_node=-1", "allowed: 0 to 1,024"),
    ("launch.k8s.gpus_per_node=-1", "launch.k8s.gpus_per_node=-1", "allowed: 0 to 1,024"),
    ("launch.node_rank=1", "launch.node_rank=1", "allowed: 0 to 0"),
    ("run_name='\udcff'", "run_name='\\udcff'", "allowed: text in UTF-8"),
    ("output_dir='a\udcff'", "output_dir='a\\udcff'", "allowed: text in UTF-8"),
    *(
        (f"{key}=''", f"{key}=''", "allowed: a text that is not empty")
        for key in (
            "run_name", "output_dir", "model.path", "model.tokenizer.path", "model.chat_template",
            "sft.data.path", "sft.data.eval_path", "sft.data.cache_dir", "dpo.policy", "ppo.reward_model",
            "launch.hostfile", "launch.k8s.workdir",
        )
    ),
]  # fmt: skip

INVALID = [  # the same for what has another type
    ("model.trust_remote_code=-1", "model.trust_remote_code: invalid value -1", "expected true or false"),
    ("model.trust_remote_code=2", "model.trust_remote_code: invalid value 2", "expected true or false"),
    ("ppo.rewards=[{model: -1}]", "ppo.rewards[0].model: invalid value -1", "expected true or false"),
    ("seed=???", "seed: invalid value '???'", "expected a whole number, 0 to"),
    ("run_name=???", "run_name: invalid value '???'", "expected text"),
    ("model.config.hidden_size=???", "model.config.hidden_size: invalid value '???'", "expected"),
    ("sft.data.max_length=null", "sft.data.max_length: invalid value null", "expected a whole number, 2 to"),
    ("sft.train.max_steps=1.5", "sft.train.max_steps: invalid value 1.5", "expected a whole number, 1 to"),
    ("dpo.train.entropy_every=0.5", "dpo.train.entropy_every: invalid value 0.5", "a whole number, 0 to"),
    ("sft.train.epochs=true", "sft.train.epochs: invalid value True", "expected a number, above 0"),
    ("launch.ssh_options=[1,[2]]", "launch.ssh_options[1]: invalid value [2]", "expected text"),
    ("model.lora.targets=[null]", "model.lora.targets[0]: invalid value null", "expected text"),
    ("model.lora.targets={a: b}", "model.lora.targets: cannot merge DictConfig with ListConfig", "a list"),
    ("model.lora=8", "model.lora: invalid value 8", "it has the keys enabled, r, alpha"),
]

SIZES = [
    ("hidden_size=0", "a whole number, 1 to 10,000,000"),
    ("num_hidden_layers=-1", "a whole number, 1 to 10,000,000"),
    ("vocab_size=1.5", "a whole number, 1 to 10,000,000"),
    ("n_head=0", "a whole number, 1 to 10,000,000"),
    ("hidden_size=30", "a multiple of model.config.num_attention_heads=4, or set model.config.head_dim"),
    ("num_attention_heads=3", "a multiple of model.config.num_key_value_heads=2"),
]


def refused(*overrides: str) -> UserError:
    with pytest.raises(UserError) as caught:
        compose(prepare([*JOB, *overrides]).overrides)
    return caught.value


@pytest.mark.parametrize(("override", "named", "allowed"), REFUSED)
def test_a_value_out_of_range_is_named_by_the_key_where_it_is_set(
    override: str, named: str, allowed: str
) -> None:
    error = refused(override)
    assert error.message == f"{named} is not allowed"
    assert allowed in (error.hint or "")


@pytest.mark.parametrize(("override", "message", "expected"), INVALID)
def test_a_value_of_another_type_is_told_what_the_key_takes(
    override: str, message: str, expected: str
) -> None:
    error = refused(override)
    assert error.message == message
    assert expected in (error.hint or "")


@pytest.mark.parametrize("every", [0, 5])
def test_a_reward_model_has_no_entropy_that_could_be_logged_less_often(every: int) -> None:
    error = refused(f"reward.train.entropy_every={every}")
    assert error.message.startswith(f"reward.train.entropy_every={every} has no effect: a reward model")
    assert error.hint == "leave it out"


def test_a_key_that_is_a_number_is_unknown_as_any_other() -> None:
    with pytest.raises(UserError, match=r"unknown key optim\.1"):
        as_schema(SFTConfig, {"optim": {1: 2}})


@pytest.mark.parametrize(("field", "allowed"), SIZES)
def test_sizes_that_no_network_has_are_refused(field: str, allowed: str) -> None:
    heads = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    name, _, value = field.partition("=")
    config = {"model_type": "llama", **heads, name: value}
    written = ", ".join(f"{key}: {each}" for key, each in config.items())
    with pytest.raises(UserError) as caught:
        compose(prepare([JOB[1], f"model.config={{{written}}}"]).overrides)
    assert caught.value.message == f"model.config.{field} is not allowed"
    assert allowed in (caught.value.hint or "")
    if "head_dim" in allowed:
        compose(prepare([JOB[1], f"model.config={{{written}, head_dim: 8}}"]).overrides)


@pytest.mark.parametrize(
    "override",
    [
        "model.trust_remote_code=1", "model.trust_remote_code=yes", "sft.optim.lr=null", "sft.optim.lr=10",
        "sft.sampling.temperature=0", "sft.optim.max_grad_norm=0", "sft.train.epochs=3", "sft.data.path=null",
        "launch.ssh_options=[-p,2222]", "launch.k8s.env={NCCL_DEBUG: ''}", "ppo.rewards=[{model: yes}]",
    ],
)  # fmt: skip
def test_what_is_at_the_end_of_a_range_or_only_written_in_another_way_passes(override: str) -> None:
    compose(prepare([*JOB, override]).overrides)


def test_a_rank_checks_its_job_in_the_same_way(tmp_path: Path) -> None:
    job: dict[str, Any] = to_plain(PPOJob(run_name="a"))
    path = tmp_path / "resolved.yaml"
    path.write_text(yaml.safe_dump(job))
    assert load_resolved(path, PPOJob) == PPOJob(run_name="a")
    job["ppo"]["critic"]["optim"]["lr"] = 1e30
    path.write_text(yaml.safe_dump(job))
    with pytest.raises(UserError, match=r"^ppo\.critic\.optim\.lr=1e\+30 is not allowed"):
        load_resolved(path, PPOJob)


def numbers(declared: Any) -> bool:
    """Whether a key holds numbers, also in a list or mapping."""
    inner = without_none(declared)
    return inner in (int, float) or any(item in (int, float) for item in typing.get_args(inner))


def test_every_number_of_the_schema_has_a_finite_range_that_holds_its_default() -> None:
    found = {name: (owner, field) for name, owner, field in schema.walk() if numbers(types_of(owner)[field])}
    assert {"seed", "sft.data.sources[].weight", "ppo.rewards[].retries", "ppo.optim.betas"} <= set(found)
    for name, (owner, field) in found.items():
        known = fields_of(owner)[field]
        allowed = known.metadata.get("range")
        assert allowed is not None, f"{name} says no range"
        assert math.isfinite(allowed.minimum) and math.isfinite(allowed.maximum), name
        assert not allowed.holds(math.inf) and not allowed.holds(math.nan), name
        default = known.default_factory() if callable(known.default_factory) else known.default
        values = default if isinstance(default, list) else [default]
        assert all(value is None or allowed.holds(value) for value in values if value != {}), name


@pytest.mark.parametrize("levels", [20, 21, 400])
def test_values_of_any_kind_are_not_nested_deeper_than_a_rank_can_read(levels: int, tmp_path: Path) -> None:
    value: Any = 1
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    written = {"sft": {"data": {"chat_template_kwargs": {"x": value}}}}
    if levels > 20:
        with pytest.raises(UserError, match="sft.data.chat_template_kwargs.x holds lists or mappings nested"):
            as_schema(PipelineConfig, written)
        return
    config = as_schema(PipelineConfig, written)
    job = load_resolved(write_resolved(config, tmp_path), SFTJob)
    assert job.sft.data.chat_template_kwargs == {"x": value}
