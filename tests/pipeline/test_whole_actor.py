"""An actor that no GPU holds whole is refused before anything starts, or sampled where it is divided."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.errors import UserError
from common.stage import Step
from pipeline import run
from pipeline.compose import compose, prepare
from pipeline.config import PipelineConfig
from pipeline.planning import memory
from pipeline.planning.fitting import Room, ways_out_of
from pipeline.planning.whole import SERVERS, refuse_whole_actor
from pipeline.planning.workload import workload_of

SIZES = {
    "70B": "hidden_size: 8192, intermediate_size: 28672, num_hidden_layers: 80, num_attention_heads: 64",
    "8B": "hidden_size: 4096, intermediate_size: 14336, num_hidden_layers: 32, num_attention_heads: 32",
}
H100 = 80_000_000_000
BY_SERVERS = ("ppo.rollout.engine=vllm", "ppo.rollout.vllm.servers=[http://127.0.0.1:8000]")


def config_of(size: str, *overrides: str, zero: str = "zero3") -> PipelineConfig:
    fields = f"model_type: llama, {SIZES[size]}, num_key_value_heads: 8, vocab_size: 128256"
    typed = [
        "steps=[sft,reward,ppo]", f"model.config={{{fields}}}", f"deepspeed={zero}", "model.dtype=bf16",
        *(f"{step}.data.path=x" for step in ("sft", "reward", "ppo")), *overrides,
    ]  # fmt: skip
    return compose(prepare(typed).overrides)


@pytest.mark.parametrize("overrides", [(), ("ppo.rollout.engine=vllm",)])
def test_a_copy_that_is_larger_than_the_gpu_is_refused_with_the_ways_out(overrides: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        refuse_whole_actor(config_of("70B", *overrides), H100)
    assert "141.1 GB of weights, and a GPU here has 80.0 GB" in caught.value.message
    assert SERVERS in str(caught.value.hint) and "gather_parameters=false" in str(caught.value.hint)


def test_what_has_no_whole_copy_or_fits_is_not_refused() -> None:
    refuse_whole_actor(config_of("70B", *BY_SERVERS), H100)
    refuse_whole_actor(config_of("70B", "ppo.rollout.gather_parameters=false"), H100)
    refuse_whole_actor(config_of("70B"), 2 * H100)
    refuse_whole_actor(config_of("70B"), None)
    refuse_whole_actor(config_of("8B"), H100)
    refuse_whole_actor(replace(config_of("70B"), steps=[Step.sft]), H100)


def test_servers_are_no_way_out_of_adapters() -> None:
    with pytest.raises(UserError) as caught:
        refuse_whole_actor(config_of("70B", "model.lora.enabled=true"), H100)
    assert SERVERS not in str(caught.value.hint) and "gather_parameters=false" in str(caught.value.hint)


def test_a_run_refuses_it_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("70B")
    config.launch.check_memory = False  # all that a rank holds is another question
    monkeypatch.setattr("pipeline.planning.gpu_memory", lambda: H100)
    monkeypatch.setattr(run, "count_gpus", lambda: 0)
    run.refuse_what_cannot_fit(config, 8, 8)
    monkeypatch.setattr(run, "count_gpus", lambda: 8)
    with pytest.raises(UserError, match="PPO holds the whole actor"):
        run.refuse_what_cannot_fit(config, 8, 8)


def test_70b_on_64_gpus_fits_with_servers_and_plan_says_so() -> None:
    config = config_of("70B", "model.gradient_checkpointing=true", "ppo.train.micro_batch_size=1")
    work = workload_of(config, Step.ppo, 64, gpu=True)
    assert work is not None and memory.estimate(work).device > H100
    ways = ways_out_of(work, Step.ppo, config, Room(H100))
    assert any(way.startswith(f"{SERVERS}: about ") for way in ways), ways
    elsewhere = workload_of(
        config_of("70B", "model.gradient_checkpointing=true", "ppo.train.micro_batch_size=1", *BY_SERVERS),
        Step.ppo,
        64,
        gpu=True,
    )
    assert elsewhere is not None and memory.estimate(elsewhere).device <= H100
