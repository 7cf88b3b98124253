"""Actors that no device holds whole: refused where PPO would need one whole to sample from it.

Takes a configuration and a GPU's memory. Under ZeRO-3 the builtin decoder gathers the actor, and vLLM in a
rank has a copy of its own. vLLM servers hold the weights elsewhere, divided over their own GPUs.
"""

from __future__ import annotations

from common.errors import UserError
from common.stage import Step
from pipeline.config import PipelineConfig
from pipeline.planning.work import Workload
from pipeline.planning.workload import workload_of

SERVERS = "ppo.rollout.engine=vllm 'ppo.rollout.vllm.servers=[...]'"
"""vLLM servers, each with --tensor-parallel-size GPUs of its own."""
LAYER_BY_LAYER = "ppo.rollout.gather_parameters=false"


def sampled_whole(work: Workload) -> float:
    """Bytes of the copy of the actor that is whole on every rank while it samples; 0 where none is."""
    decoding = work.decoding
    if decoding is None or not (decoding.by_vllm or (decoding.gathers and work.sharding.stage == 3)):
        return 0.0
    return float(work.weight_bytes * work.networks[0].network.parameters)


def refuse_whole_actor(config: PipelineConfig, memory: int | None) -> None:
    """UserError where PPO samples from a copy of the actor that no rank has room for, whatever else it holds.

    memory: of a GPU, in bytes; None where there is none, or it is not known.
    """
    if Step.ppo not in config.steps or memory is None:
        return
    work = workload_of(config, Step.ppo, 1, gpu=True)
    needed = 0.0 if work is None else sampled_whole(work)
    if needed <= memory:
        return
    by_servers = f"{SERVERS}, servers on GPUs of their own with vLLM's --tensor-parallel-size (docs/ppo.md)"
    layered = f"deepspeed=zero3 {LAYER_BY_LAYER}, which sends every weight to every rank for each token"
    alone = "model.lora trains adapters, which servers do not take: "
    raise UserError(
        f"PPO holds the whole actor on every rank while it samples, {needed / 1e9:,.1f} GB of weights, and a "
        f"GPU here has {memory / 1e9:,.1f} GB",
        hint=alone + layered if config.model.lora.enabled else f"{by_servers}; or {layered}",
    )
