"""PPO with a vLLM server, started as a user starts one: the same policy, the same samples again."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import kill_resume
from benchmarks.pairs_workload import export_as_policy
from common.artifacts import verify
from common.config import Dtype, ModelConfig
from common.decoding.decoder import Decoder
from common.decoding.requests import SamplingParams
from common.decoding.vllm_server import VLLMServers
from common.errors import UserError
from common.model.tokenizer import load_tokenizer
from common.runtime.distributed import STOPPED_EXIT_CODE, World
from step3_ppo.config import PPOJob
from tests.runs import finish, write_job
from tests.step3_ppo.runs import (
    Artifacts,
    lines_of,
    ppo,
    ppo_interrupted,
    run_job,
    series,
    watched,
)
from tests.vllm.server import serving
from tests.vllm.test_ppo import CLOSE, UPDATES, job_of
from tests.vllm.test_vllm_decoder import TERMINATORS, loaded, requests, sampled, scored, weights_of, written

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("world")]

MAX_LENGTH = 64
CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)
FP32 = ("--dtype", "float32", "--logprobs-mode", "processed_logprobs", "--max-model-len", str(MAX_LENGTH))


@pytest.fixture(scope="module")
def untied(artifacts: Artifacts, folder: Path) -> Artifacts:
    """The same policy, with weights of its own for its output layer."""
    tied = AutoModelForCausalLM.from_pretrained(artifacts.policy, dtype=torch.float32)
    config = AutoConfig.from_pretrained(artifacts.policy, tie_word_embeddings=False)
    network = AutoModelForCausalLM.from_config(config)
    network.load_state_dict(tied.state_dict())
    network.save_pretrained(folder / "untied base")
    settings = ModelConfig(path=str(folder / "untied base"), dtype=Dtype.fp32)
    tokenizer = load_tokenizer(ModelConfig(path=str(artifacts.policy)))
    tokenizer.save_pretrained(folder / "untied base")
    export_as_policy(settings, tokenizer, folder / "untied", MAX_LENGTH)
    return Artifacts(folder / "untied", artifacts.reward_model)


@pytest.fixture(scope="module")
def server(untied: Artifacts, folder: Path) -> Iterator[str]:
    """It has the key of the environment."""
    with serving(untied.policy, folder / "server.log", *FP32) as url:
        yield url


def servers_of(
    url: str, policy: Path, folder: Path, max_length: int = MAX_LENGTH, **more: bool
) -> VLLMServers:
    model = ModelConfig(path=str(policy), dtype=Dtype.fp32)
    return VLLMServers([url], model, max_length, folder / "handover", ALONE, slots=3, timeout=300, **more)


@pytest.fixture(scope="module")
def servers(server: str, untied: Artifacts, folder: Path) -> VLLMServers:
    return servers_of(server, untied.policy, folder)


def job_with(server: str, folder: Path, untied: Artifacts) -> PPOJob:
    job = job_of(folder, untied)
    job.ppo.rollout.vllm.servers = [server]
    return job


@pytest.fixture(scope="module")
def whole(server: str, folder: Path, untied: Artifacts) -> Path:
    """A run that nobody touched."""
    run_job(job_with(server, folder, untied), folder / "runs" / "server")
    return folder / "runs" / "server"


def test_the_weights_that_are_handed_over_are_those_that_sample(
    servers: VLLMServers, untied: Artifacts, folder: Path
) -> None:
    """Also at the second hand-over, of other weights, with the same prompts in the server's cache."""
    params = SamplingParams(0.8, 12, TERMINATORS)
    for _ in range(2):
        network = loaded(ModelConfig(path=str(untied.policy), dtype=Dtype.fp32))
        found = sampled(servers, network, requests(), params)
        for request, completion in zip(requests(), found, strict=True):
            expected = scored(network, request, completion, 0.8)
            assert completion.logprobs == pytest.approx(expected, abs=CLOSE)
            assert (int(completion.tokens[-1]) in TERMINATORS) is completion.stopped
        assert not (folder / "handover").exists()
    assert found[0].tokens.tolist() != found[1].tokens.tolist()  # of one prompt, with other keys
    again = sampled(servers, network, requests()[3:], params)
    assert [each.tokens.tolist() for each in again] == [each.tokens.tolist() for each in found[3:]]
    ours = Decoder(network, slots=4).decode(requests(), SamplingParams(0.0, 12, TERMINATORS))
    greedy = sampled(servers, network, requests(), SamplingParams(0.0, 12, TERMINATORS))
    assert [each.tokens.tolist() for each in greedy] == [each.tokens.tolist() for each in ours or ()]


def test_told_to_stop_it_returns_nothing_and_can_go_on(servers: VLLMServers) -> None:
    params = SamplingParams(1.0, 12, ())
    assert servers.decode(requests(), params, should_stop=lambda: True) is None
    assert len(servers.decode(requests(), params) or ()) == len(requests())


def test_a_run_samples_from_the_weights_that_are_trained(whole: Path) -> None:
    """In every iteration, after all updates before it, by the actor's own forward pass."""
    verify(whole / "ppo" / "export")
    assert max(series(whole, "rollout/logprob_drift_max")) < CLOSE
    assert [line["val/first_ratio_error"] for line in lines_of(whole)] == [0.0] * 3
    assert abs(series(whole, "objective/kl")[-1]) > 1e-3  # it learned
    assert not (whole / "ppo" / "handover").exists()


def test_two_ranks_sample_what_one_rank_samples(
    server: str, folder: Path, untied: Artifacts, whole: Path
) -> None:
    job = job_with(server, folder, untied)
    job.deepspeed.stage = 3
    run_job(job, folder / "runs" / "server of two", ranks=2)
    both = [watched(run)["experiences"] for run in (whole, folder / "runs" / "server of two")]
    for one, other in zip(*both, strict=True):
        for ours, theirs in zip(one.responses, other.responses, strict=True):
            assert ours.tokens.tolist() == theirs.tokens.tolist()
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=CLOSE)


def test_a_run_told_to_stop_asks_again_for_the_same_samples(
    server: str, folder: Path, untied: Artifacts, whole: Path
) -> None:
    run_dir = write_job(job_with(server, folder, untied), folder / "runs" / "server told")
    finish(run_dir, 1, ppo_interrupted, "update", 3, 0, signal.SIGTERM, code=STOPPED_EXIT_CODE)
    finish(run_dir, 1, ppo)
    assert kill_resume.state_differences(whole, run_dir, 3 * UPDATES, step_name="ppo") == []
    assert kill_resume.metric_differences(whole, run_dir, step_name="ppo") == []


def test_a_server_that_would_compute_otherwise_is_refused(
    server: str, untied: Artifacts, artifacts: Artifacts, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="logprobs_mode=processed_logprobs; raw_logprobs is expected"):
        servers_of(server, untied.policy, folder, filters=True)
    with pytest.raises(UserError, match="has room for 64 tokens"):
        servers_of(server, untied.policy, folder, max_length=65)
    with pytest.raises(UserError, match="goes on with the old output layer"):
        servers_of(server, artifacts.policy, folder)
    monkeypatch.setenv("VLLM_API_KEY", "of somebody else")
    with pytest.raises(UserError, match="answers 401") as caught:
        servers_of(server, untied.policy, folder).decode(requests(), SamplingParams(1.0, 4, ()))
    assert "VLLM_API_KEY" in str(caught.value.hint)


def test_a_server_of_another_model_takes_no_weights(servers: VLLMServers, tmp_path: Path) -> None:
    """The last test: it does not survive it."""
    network = loaded(written(tmp_path / "model", hidden_size=128, tie_word_embeddings=False))
    with pytest.raises(UserError, match="/collective_rpc answers 500") as caught:
        servers.holding(weights_of(network)).__enter__()
    assert "policy's model" in str(caught.value.hint)
