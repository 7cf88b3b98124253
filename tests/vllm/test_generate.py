"""`generate` and `evaluate` with vLLM: what the builtin decoder says, the same again, and gone on with."""

from __future__ import annotations

import dataclasses
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import DataConfig, Dtype
from common.decoding import generate as module
from common.decoding.generate import generate
from common.decoding.vllm_decoder import VLLMDecoder
from common.errors import UserError
from common.inference_config import EvaluateJob, EvaluationSettings, GenerateJob, ManySettings
from common.stage import Role
from common.vllm_fit import SamplingEngine
from evaluation.evaluate import evaluate
from pipeline.sources import artifact_of
from tests.pretrained.model import HOW_TO_GET_IT, find
from tests.step2_dpo.runs import write_rows
from tests.step3_ppo.runs import Artifacts
from tests.vllm.test_vllm_decoder import SIZE, written

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("world")]

CLOSE = 1e-4
"""Nats of a completion: sums in fp32 in another order, over its tokens."""
PROMPTS = [{"prompt": f"What is {a} + {b}?"} for a in range(4) for b in range(3)]
SETTINGS = ManySettings(
    temperature=1.0, max_new_tokens=12, samples=2, seed=5, slots=4, dtype=Dtype.fp32,
    engine=SamplingEngine.vllm,
)  # fmt: skip


def job(folder: Path, policy: str, name: str = "out.jsonl", **settings: Any) -> GenerateJob:
    write_rows(folder / "prompts.jsonl", PROMPTS)
    data = DataConfig(path=str(folder / "prompts.jsonl"), cache_dir=str(folder / "cache"))
    return GenerateJob(policy, data, dataclasses.replace(SETTINGS, **settings), str(folder / name))


def said(given: GenerateJob) -> list[dict[str, Any]]:
    """All completions of a new file."""
    assert generate(given) == 0
    lines = map(json.loads, Path(given.out).read_text().splitlines())
    return [each for line in lines for each in line["completions"]]


def compare_greedy(folder: Path, policy: str, **settings: Any) -> None:
    ours, theirs = (
        said(job(folder, policy, f"{engine.value}.jsonl", temperature=0.0, engine=engine, **settings))
        for engine in (SamplingEngine.builtin, SamplingEngine.vllm)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert other.pop("logprob") == pytest.approx(one.pop("logprob"), abs=CLOSE)
        assert one == other


def test_greedily_it_says_what_the_builtin_decoder_says(artifacts: Artifacts, tmp_path: Path) -> None:
    compare_greedy(tmp_path, str(artifacts.policy))


def test_a_real_model_says_the_same_greedily(tmp_path: Path) -> None:
    folder = find()
    if folder is None:
        pytest.skip(HOW_TO_GET_IT)
    policy = artifact_of(str(folder), Role.policy, "MODEL", tmp_path / "models", print)
    compare_greedy(tmp_path, policy, max_new_tokens=24, samples=1)


def test_samples_depend_on_the_seed_and_a_cut_file_ends_as_if_it_had_not_been(
    artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_REQUESTS", 10)
    given = job(tmp_path, str(artifacts.policy))
    first = said(given)
    whole = Path(given.out).read_bytes()
    assert whole.count(b"\n") == len(PROMPTS)
    assert sum(one["text"] != other["text"] for one, other in zip(first[::2], first[1::2], strict=True)) > 6
    assert said(job(tmp_path, str(artifacts.policy), "other.jsonl", seed=6)) != first
    for kept in (whole.index(b"\n") + 1, len(whole) // 2):
        Path(given.out).write_bytes(whole[:kept])
        generate(given)
        assert Path(given.out).read_bytes() == whole
    with pytest.raises(UserError, match=r"engine=.*builtin.*\(it was vllm\)"):
        generate(job(tmp_path, str(artifacts.policy), engine=SamplingEngine.builtin))


def test_two_policies_are_evaluated_one_after_the_other(artifacts: Artifacts, tmp_path: Path) -> None:
    """By a reward model, as with the builtin decoder."""
    data = job(tmp_path, "").data
    found = {}
    for engine in SamplingEngine:
        settings = EvaluationSettings(max_new_tokens=12, slots=4, dtype=Dtype.fp32, engine=engine)
        out, policy = tmp_path / f"{engine.value}.json", str(artifacts.policy)
        named = {"model": "a", "against": "b"}
        told = EvaluateJob(
            policy, policy, data, [], str(artifacts.reward_model), settings, str(out), names=named
        )
        assert evaluate(told) == 0
        found[engine] = json.loads(out.read_text())
    builtin, by_vllm = found[SamplingEngine.builtin], found[SamplingEngine.vllm]
    assert by_vllm["rows"] == builtin["rows"] and by_vllm["metrics"] == builtin["metrics"]
    assert {row["win_rate"] for row in by_vllm["rows"]} == {0.5}


def test_a_closed_engine_keeps_no_weights(tmp_path: Path) -> None:
    decoder = VLLMDecoder(written(tmp_path / "model"), SIZE, torch.device("cpu"), live=False)
    weights = decoder._engine.collective_rpc(lambda worker: weakref.ref(worker.model_runner.get_model()))
    assert weights[0]() is not None
    decoder.close()
    assert weights[0]() is None
