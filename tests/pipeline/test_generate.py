"""What is typed after `generate` and `evaluate`: options, keys of data, and the jobs made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.fields import as_schema
from common.inference_config import EvaluateJob, GenerateJob
from common.stage import Role
from launch.local import Job
from launch.supervise import Outcome
from pipeline import generate, sources
from pipeline.__main__ import dispatch
from pipeline.evaluate import artifact_of_any
from tests.pipeline.fakes import artifact


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with a policy and a reward model, in the working directory."""
    monkeypatch.chdir(tmp_path)
    artifact(tmp_path / "first" / "sft" / "export")
    artifact(tmp_path / "first" / "reward" / "export", Role.reward_model)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    return Path("first")


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """The modules that were started, and what they were told."""
    told: list[tuple[str, Any]] = []

    def supervise(job: Job) -> Outcome:
        told.append((job.module, json.loads(Path(job.arguments[0]).read_text())))
        return Outcome(7)

    monkeypatch.setattr(generate, "supervise", supervise)
    return told


def test_generate_is_told_what_was_typed_and_ends_as_its_process(run: Path, jobs: list[Any]) -> None:
    typed = ["generate", "first", "--prompts", "prompts.jsonl", "--out", "out.jsonl", "--samples", "3"]
    assert dispatch([*typed, "--top-p", "0.9", "--system", "Be brief.", "data.on_bad_row=skip"]) == 7
    ((module, told),) = jobs
    job = as_schema(GenerateJob, told)
    assert module == "common.decoding.generate"
    assert (job.model, job.out, job.whole_context) == ("first/sft/export", "out.jsonl", True)
    assert job.system == "Be brief."
    assert (job.settings.samples, job.settings.top_p, job.settings.temperature) == (3, 0.9, 0.7)
    assert (job.data.path, job.data.on_bad_row.value) == ("prompts.jsonl", "skip")
    assert job.data.cache_dir == "runs/.cache/data"


def test_rows_can_be_named_by_the_keys_of_steps(run: Path, jobs: list[Any]) -> None:
    sources = "data.sources=[{path: prompts.jsonl, columns: {prompt: query}, max_rows: 5}]"
    dispatch(["generate", sources, "first", "--out", "out.jsonl", "data.max_length=99"])
    job = as_schema(GenerateJob, jobs[0][1])
    assert job.data.sources[0].columns == {"prompt": "query"} and job.data.path is None
    assert job.data.max_length == 99 and not job.whole_context


def test_evaluate_is_greedy_by_default_and_told_both_models_and_the_judge(run: Path, jobs: list[Any]) -> None:
    artifact(Path("second") / "dpo" / "export")
    typed = ["evaluate", "first", "--data", "prompts.jsonl", "--against", "second", "--reward-model", "first"]
    assert dispatch([*typed, "--functions", "a.b:c", "d:e", "--out", "out.json"]) == 7
    ((module, told),) = jobs
    job = as_schema(EvaluateJob, told)
    assert module == "evaluation"
    assert (job.model, job.against) == ("first/sft/export", "second/dpo/export")
    assert (job.reward_model, job.functions) == ("first/reward/export", ["a.b:c", "d:e"])
    assert job.settings.temperature == 0 and job.names == {
        "model": "first", "against": "second", "reward_model": "first",
    }  # fmt: skip


@pytest.mark.parametrize("verb", [["generate", "--prompts"], ["evaluate", "--data"]])
def test_cuda_graphs_can_be_switched_off(verb: list[str], run: Path, jobs: list[Any]) -> None:
    typed = [verb[0], "first", verb[1], "prompts.jsonl", "--out", "out"]
    dispatch(typed)
    dispatch([*typed, "--cuda-graphs", "false"])
    assert [told["settings"]["cuda_graphs"] for _, told in jobs] == [True, False]


def test_a_step_or_a_run_without_a_policy_means_its_reward_model(run: Path, jobs: list[Any]) -> None:
    artifact(Path("judges") / "reward" / "export", Role.reward_model)
    for named in ("first/reward", "judges"):
        dispatch(["evaluate", named, "--data", "prompts.jsonl"])
    assert [told["model"] for _, told in jobs] == ["first/reward/export", "judges/reward/export"]


def test_a_published_classifier_is_taken_as_a_reward_model(
    run: Path, jobs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = artifact(Path("imported"), Role.reward_model)
    asked: list[Role] = []

    def import_model(named: str, role: Role, *_: Any) -> Path:
        asked.append(role)
        return made

    monkeypatch.setattr(sources, "import_model", import_model)
    Path("published").mkdir()
    for heads in (["LlamaForSequenceClassification"], ["LlamaForCausalLM"], None, 3):
        (Path("published") / "config.json").write_text(json.dumps({"architectures": heads}))
        assert artifact_of_any("published", "MODEL", Path("models"), print) == str(made)
    assert asked == [Role.reward_model, Role.policy, Role.policy, Role.policy]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["generate", "first", "--out", "o"], "no rows are named: --prompts FILE"),
        (["generate", "first", "--prompts", "p"], "generate: the following arguments are required: --out"),
        (["generate", "first", "--prompts", "p", "--out", "o", "--samples", "0"], "samples=0 is not allowed"),
        (
            ["generate", "first", "--prompts", "p", "--out", "o", "--tmp", "1"],
            "unrecognized arguments",
        ),
        (
            ["generate", "first", "--prompts", "p", "--out", "o", "data.max_lenght=9"],
            "unknown key data",
        ),
        (
            ["generate", "first", "--prompts", "p", "--out", "o", "data.eval_path=x"],
            "data.eval_path says nothing here",
        ),
        (["generate", "first", "--prompts", "p", "--out", "o", "data.sources=[{path: q}]"], "are both set"),
        (["generate", "first", "--prompts", "p", "--out", "o", "data.columns={a"], "cannot be read"),
        (
            ["evaluate", "first", "--data", "p", "--engine", "vllm", "--cuda-graphs", "false"],
            "cuda_graphs=false has no effect with engine=vllm",
        ),
        (["generate", "none", "--prompts", "p", "--out", "o"], "none: no such folder"),
        (
            ["evaluate", "first", "--data", "p", "--out", "prompts.jsonl"],
            "exists, and nothing is overwritten",
        ),
        (["evaluate", "first"], "no rows are named: --data FILE"),
        (["evaluate", "first", "--data", "p", "--functions", "a.b"], "a.b does not name a function"),
        (["evaluate", "first", "--data", "p", "--reward-model", "nobody"], "nobody: no such folder"),
        (["evaluate", "first", "--data", "p", "--reward-model", "first/sft"], "is a policy"),
        (["evaluate", "first", "--data", "p", "--temperature", "-1"], "temperature=-1.0 is not allowed"),
    ],
)
def test_a_slip_is_said_with_a_way_out_before_anything_starts(
    typed: list[str], said: str, run: Path, jobs: list[Any]
) -> None:
    with pytest.raises(UserError, match=said) as error:
        dispatch(typed)
    assert error.value.hint and not jobs
