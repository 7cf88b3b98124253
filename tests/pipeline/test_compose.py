"""What a user may type, and what is said when it is wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from common.config import Truncation
from common.errors import UserError
from common.stage import Step
from common.training_config import OptimizerName
from pipeline.compose import (
    compose,
    jobs_of,
    name_of_sweep_job,
    prepare,
    share_a_name,
    to_config,
)
from pipeline.config import PROJECT
from tests.pipeline.composing import JOB, composed, error_of


@pytest.mark.parametrize("text", ["steps=sft", "steps=[sft]", "steps=[ sft ]"])
def test_one_step_may_be_named_with_or_without_brackets(text: str) -> None:
    assert composed(*JOB, text).steps == [Step.sft]


def test_several_steps_may_be_named_with_or_without_brackets() -> None:
    assert composed(*JOB, "steps=sft,reward").steps == [Step.sft, Step.reward]


def test_with_a_sweep_commas_between_steps_separate_runs() -> None:
    assert prepare([*JOB, "steps=sft,dpo"], multirun=True).overrides[-1] == "steps=[sft],[dpo]"


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("sft.lrr=1", "sft.optim.lr"),
        ("+sft.lrr=1", "sft.optim.lr"),
        ("++sft.lrr=1", "sft.optim.lr"),
        ("lr=1e-3", "sft.optim.lr"),
        ("sft.train.global_batchsize=8", "sft.train.global_batch_size"),
        ("sft.data.max_len=8", "sft.data.max_length"),
        ("run_nam=x", "run_name"),
        ("+experimnt=demo", "experiment"),
        ("model.lora.rank=8", ""),
        ("dpo.bta=1", "dpo.beta"),
        ("reward.lr=1", "reward.optim.lr"),
        ("reward.polcy=x", "reward.policy"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest_known_one(text: str, near: str) -> None:
    message = error_of(*JOB, text)
    assert f"unknown key {text.lstrip('+').split('=')[0]} (in {text})" in message
    assert (
        (f"did you mean {near}?" in message) if near else ("known below model.lora: enabled, r," in message)
    )


def test_an_unknown_key_inside_a_value_is_found_too() -> None:
    message = error_of("model.path=org/name", "sft.data.sources=[{path: x, weigth: 2}]")
    assert "unknown key sft.data.sources[0].weigth" in message
    assert "did you mean weight?" in message


def test_an_unknown_key_in_a_file_is_answered_like_one_that_is_typed() -> None:
    with pytest.raises(UserError) as caught:
        to_config(OmegaConf.create({"sft": {"train": {"lr": 1}}}), [])
    assert str(caught.value) == "unknown key sft.train.lr\n  did you mean sft.optim.lr?"


@pytest.mark.parametrize(
    ("text", "way_out"),
    [
        ("ppo.rewards.function=a:b", "ppo.rewards is a list: 'ppo.rewards=[{function: …}]'"),
        ("+ppo.rewards.functoin=a:b", "'ppo.rewards=[{function: …}]'"),
        ("ppo.rewards.0.function=a:b", "'ppo.rewards=[{function: …}]'"),
        ("ppo.rewards[0].function=a:b", "'ppo.rewards=[{function: …}]'"),
        ("ppo.rewards.0.url=https://x", "'ppo.rewards=[{url: …}]'"),
        ("sft.data.sources.columns={prompt: text}", "'sft.data.sources=[{path: …, columns: …}]'"),
        ("ppo.rewards=a:b", "expected a list, e.g. 'ppo.rewards=[{…}]', whose entries have the keys model, "),
    ],
)
def test_a_key_of_an_entry_of_a_list_is_answered_with_the_list(text: str, way_out: str) -> None:
    message = error_of(*JOB, text)
    assert way_out in message
    assert "did you mean" not in message  # ppo.evaluation.functions is like it, and only looks


def test_a_wrong_enum_value_lists_what_is_allowed() -> None:
    assert (
        error_of(*JOB, "model.dtype=fp8")
        == "model.dtype: invalid value 'fp8'\n  allowed: auto, bf16, fp16, fp32"
    )
    assert "steps[0]: invalid value 'sftt'" in error_of(*JOB, "steps=[sftt]")


def test_a_wrong_type_says_what_was_expected() -> None:
    message = error_of(*JOB, "seed=abc")
    assert "seed" in message and "'abc'" in message and "expected a whole number" in message
    assert "expected a list" in error_of(*JOB, "model.lora.targets=q_proj")


def test_an_unknown_option_of_a_group_lists_the_options() -> None:
    message = error_of(*JOB, "deepspeed=zero9")
    assert "deepspeed=zero9 is unknown" in message
    assert "allowed: zero1, zero2, zero2_offload, zero3, zero3_hpz, zero3_offload" in message
    assert "did you mean experiment=gsm8k?" in error_of("experiment=gsm8")


@pytest.mark.parametrize(
    ("typed", "why"),
    [
        ("deepspeed=zero3_nvme", "resumes without AdamW's moments"),
        ("deepspeed.offload_optimizer=nvme", "resumes without AdamW's moments"),
        ("deepspeed.nvme_path=/nvme", "deepspeed=zero3_offload"),
        ("+deepspeed.zenflow.topk_ratio=0.1", "begins with other weights than the model's"),
        ("+deepspeed.super_offload=true", "learns nothing from steps of several passes"),
        ("deepspeed.bf16_optimizer_states=true", "optim.name=adamw_bf16"),
    ],
)
def test_what_deepspeed_has_and_no_run_takes_is_refused_with_the_reason(typed: str, why: str) -> None:
    message = error_of(*JOB, typed)
    assert why in message and typed.partition("=")[0].strip("+").partition(".")[0] in message
    assert len(message.splitlines()) == 2


def test_a_value_out_of_range_is_named_with_its_whole_key() -> None:
    message = error_of(*JOB, "sft.data.max_length=1")
    assert message == "sft.data.max_length=1 is not allowed\n  allowed: 2 to 10,000,000"
    assert "deepspeed.stage=0 is not allowed" in error_of(*JOB, "deepspeed.stage=0")


@pytest.mark.parametrize("value", ["12e45678", "1e5", "0x10", "true", "007", "1_000", "inf", "nan"])
def test_a_name_that_looks_like_a_number_stays_the_text_that_was_typed(value: str) -> None:
    assert composed(*JOB, f"run_name={value}").run_name == value


def test_null_is_no_name_and_quoted_text_is_text() -> None:
    assert composed(*JOB, "run_name=null").run_name is None
    assert composed(*JOB, 'run_name="null"').run_name == "null"


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("run_name=a=b", "'run_name=\"a=b\"'"),
        ("model.path=my(model)", "'model.path=\"my(model)\"'"),
        ("run_name=héllo", "'run_name=\"héllo\"'"),
        ('run_name=a"b=', '\'run_name="a\\"b="\''),
    ],
)
def test_a_grammar_error_prints_the_quoted_form_and_that_form_works(text: str, quoted: str) -> None:
    message = error_of(*JOB[1:], text)
    assert f"{text} cannot be read" in message
    assert f"quote the value: {quoted}" in message
    key, _, value = text.partition("=")
    in_words = quoted[1:-1]  # what is left when the shell has taken its quotes off
    result = composed("model.path=org/name", *JOB[1:], in_words)
    assert (result.run_name if key == "run_name" else result.model.path) == value


def test_a_url_in_a_list_that_cannot_be_read_is_to_be_quoted_inside_of_the_list() -> None:
    text = "ppo.rewards=[{url: https://h/x?a=b, weight: 2}]"
    message = error_of(*JOB, text)
    assert f"{text} cannot be read" in message
    mended = 'ppo.rewards=[{url: "https://h/x?a=b", weight: 2}]'
    assert message.endswith(f"quote the text inside of it: '{mended}'")
    (source,) = composed(*JOB, mended).ppo.rewards
    assert (source.url, source.weight) == ("https://h/x?a=b", 2.0)


def test_a_list_that_quotes_do_not_mend_is_not_to_be_quoted_as_a_whole() -> None:
    message = error_of(*JOB, "ppo.rewards=[{url: https://h/x?a=b")
    assert message.endswith("quote each text that holds other signs than letters, digits and . : / - _")


def test_something_without_an_equals_sign_is_no_override() -> None:
    assert "'seed' is not of the form key=value" in error_of("seed")


@pytest.mark.parametrize("text", ["dpo", "sft,dpo", "[sft,dpo]"])
def test_a_step_written_like_a_verb_is_shown_as_a_value_of_steps(text: str) -> None:
    assert error_of(text) == f"'{text}' is not of the form key=value\n  did you mean steps={text}?"
    assert "did you mean steps" not in error_of("sft,demo")


def test_several_paths_in_place_of_one_are_shown_as_sources() -> None:
    way_out = "expected one path; several go into 'reward.data.sources=[{path: FIRST}, {path: SECOND}]'"
    assert error_of(*JOB, "reward.data.path=[a.jsonl]").endswith(way_out)
    composed(*JOB, "reward.data.sources=[{path: FIRST}, {path: SECOND}]")
    assert error_of(*JOB, "run_name=[a]").endswith("expected text")


def test_a_path_below_the_home_folder_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    message = error_of("steps=[reward]", "reward.policy=~/x")
    assert message.endswith("~ is not expanded here; write reward.policy=/home/me/x")


def test_several_values_without_a_sweep_show_the_three_ways_to_mean_it() -> None:
    message = error_of(*JOB, "seed=1,2")
    assert "'seed=[1,2]'" in message and "'seed=\"1,2\"'" in message and "add -m" in message


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "-m", '" x"'])
def test_a_run_name_that_cannot_name_a_folder_is_refused(name: str) -> None:
    assert "cannot name a folder" in error_of(*JOB, f"run_name={name}")


def test_a_shared_group_may_be_chosen_by_its_short_name() -> None:
    for text in ("optim=muon", "sft.optim=muon", "optim@sft.optim=muon"):
        assert composed(*JOB, text).sft.optim.name is OptimizerName.muon
    assert composed(*JOB, "data=default").sft.data.truncation is Truncation.drop


def test_a_short_name_goes_to_the_one_step_of_the_run() -> None:
    muon, adamw = OptimizerName.muon, OptimizerName.adamw
    job = composed("experiment=demo", "steps=[dpo]", "dpo.policy=x", "optim=muon")
    assert (job.sft.optim.name, job.reward.optim.name, job.dpo.optim.name) == (adamw, adamw, muon)
    ppo = composed("steps=ppo", "ppo.policy=x", "ppo.reward_model=y", "optim=muon").ppo
    assert (ppo.optim.name, ppo.critic.optim.name) == (muon, adamw)
    job = composed("steps=reward", "reward.policy=x", "data=gsm8k_preferences")
    assert job.reward.data.path is not None and job.reward.data.path.endswith("model_solutions.jsonl")


@pytest.mark.parametrize(
    "named",
    [
        ["experiment=demo", "steps=[sft,dpo]"],
        ["experiment=demo", "steps=sft,dpo"],
        ["steps=[sft,dpo]"],
        ["experiment=hh"],
    ],
)
def test_a_short_name_is_not_guessed_for_a_run_of_several_steps(named: list[str]) -> None:
    second = "reward" if named == ["experiment=hh"] else "dpo"
    message = error_of(*named, "optim=muon")
    assert message == (f"optim=muon: for which step?\n  one or more of sft.optim=muon, {second}.optim=muon")
    job = composed(*named, "sft.optim=muon", f"{second}.optim=adafactor")
    assert job.sft.optim.name is OptimizerName.muon
    assert getattr(job, second).optim.name is OptimizerName.adafactor


def test_data_and_optimizers_beside_a_steps_first_are_chosen_and_replaced_alike() -> None:
    chain = ("experiment=demo", "steps=[sft,ppo]", "ppo.reward_model=r")
    job = composed(*chain, "ppo.critic.optim=adafactor", "ppo.ptx_data=gsm8k").ppo
    assert (job.critic.optim.name, job.optim.name) == (OptimizerName.adafactor, OptimizerName.adamw)
    assert str(job.ptx_data.path).endswith("gsm8k/train.jsonl")
    job = composed(*chain, "ppo.ptx_data=gsm8k", "ppo.ptx_data.sources=[{path: mine.jsonl}]").ppo
    assert [source.path for source in job.ptx_data.all_sources()] == ["mine.jsonl"]
    way_out = "several go into 'ppo.ptx_data.sources=[{path: FIRST}, {path: SECOND}]'"
    assert error_of(*chain, "ppo.ptx_data.path=[a.jsonl]").endswith(way_out)


def test_a_short_name_is_not_guessed_for_a_sweep_over_steps() -> None:
    overrides = ["experiment=demo", "dpo.policy=x", "steps=sft,dpo", "optim=muon"]
    with pytest.raises(UserError, match="for which step"):
        prepare(overrides, multirun=True)
    assert prepare(["experiment=demo", "steps=[sft]", "seed=1,2", "optim=muon"], multirun=True)


def test_fields_of_a_model_config_need_no_plus_sign() -> None:
    for sign in ("", "+", "++"):
        config = composed(f"{sign}model.config.model_type=llama", "sft.data.path=x.jsonl").model.config
        assert config == {"model_type": "llama"}


@pytest.mark.parametrize("text", ["~seed", "~sft.data", "~ppo.critic.optim.lr"])
def test_a_key_of_the_schema_is_set_and_not_deleted(text: str) -> None:
    assert error_of(*JOB, text) == f"{text}: a key of the schema cannot be deleted\n  set {text[1:]}"


def test_plus_before_a_known_key_is_forgiven() -> None:
    assert composed(*JOB, "+seed=3").seed == 3


def test_naming_both_forms_at_once_is_an_error() -> None:
    message = error_of("model.path=x", "sft.data.path=a", "sft.data.sources=[{path: b}]")
    assert "sft.data.path and sft.data.sources are both set" in message


def test_a_sweep_is_split_into_its_runs_and_each_gets_a_name_of_its_own() -> None:
    jobs = jobs_of(["experiment=demo", "seed=1,2"])
    assert jobs == [["experiment=demo", "seed=1"], ["experiment=demo", "seed=2"]]
    assert share_a_name([compose(job) for job in jobs])
    names = [name_of_sweep_job(compose(job)).run_name for job in jobs]
    assert len(set(names)) == 2 and all(name is not None and name.startswith("demo-") for name in names)


@pytest.mark.parametrize(
    ("overrides", "shared"),
    [
        (["run_name=a,b"], False),
        (["run_name=r_${seed}", "seed=1,2"], False),
        (["run_name=r_${seed}", "seed=1,2", "sft.optim.lr=1e-3,1e-4"], True),
        (["run_name=r", "seed=1,2"], True),
        (["seed=1"], True),  # more may follow
    ],
)
def test_names_of_a_sweep_that_differ_already_are_left_alone(overrides: list[str], shared: bool) -> None:
    assert share_a_name([compose(job) for job in jobs_of(["experiment=demo", *overrides])]) is shared


def test_composing_imports_neither_torch_nor_any_other_heavy_library() -> None:
    program = (
        "import sys\n"
        "from pipeline.compose import compose, prepare\n"
        "import pipeline.run, pipeline.verify\n"
        "compose(prepare([]).overrides)\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'datasets', 'wandb', 'peft', 'numpy', 'pyarrow'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_a_free_form_key_may_be_given_as_one_value() -> None:
    config = composed("model.config={model_type: gpt2, n_embd: 8}", "sft.data.path=a")
    assert config.model.config == {"model_type": "gpt2", "n_embd": 8}


def test_weights_are_never_paired_with_a_tokenizer_of_their_own_making() -> None:
    message = error_of("model.path=x", "sft.data.path=a", "model.tokenizer.train_vocab_size=300")
    assert "model.path=x" in message and "train_vocab_size=300" in message
