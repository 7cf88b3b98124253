"""One rank of two that tries what DeepSpeed has to divide layers; rank 0 writes what came of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common.config import DeepSpeedConfig, Dtype
from common.model import attention
from common.runtime.distributed import close_world, init_world
from common.training.ds_config import build_ds_config
from common.training.engine import Engine
from tests.packed import packed_lm
from tests.tiny import SHAPE

MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
EXPERT_PARALLEL = {
    "enabled": True, "autoep_size": 2, "preset_model": "qwen3_moe",
    "moe_layer_pattern": r"model\.model\.layers\.\d+\.mlp",
}  # fmt: skip


def main(out: str) -> int:
    world = init_world()
    attention.register()
    found = {
        "experts": _outcome("qwen3_moe", {"expert_parallel": EXPERT_PARALLEL}),
        "tensors of a mixture": _outcome("qwen3_moe", {"tensor_parallel": {"autotp_size": 2}}),
        "tensors": _outcome("qwen3", {"tensor_parallel": {"autotp_size": 2}}),
    }
    if world.is_rank0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    close_world()
    return 0


def _outcome(kind: str, division: dict[str, Any]) -> str:
    """The error that ends it; else the shape in which a matrix [32, 32] would be exported."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    fields = {**SHAPE, **(MIXTURE if kind == "qwen3_moe" else {}), "vocab_size": 61, "head_dim": 8}
    network: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **fields), attn_implementation=attention.NAME
    )
    module = packed_lm(network)
    module.config = network.config  # where DeepSpeed looks
    config = build_ds_config(
        DeepSpeedConfig(stage=2), dtype=Dtype.fp32, max_grad_norm=1.0, micro_batch_size=1, world_size=2,
        num_parameters=sum(p.numel() for p in module.parameters()),
    )  # fmt: skip
    try:
        engine = Engine(module, torch.optim.AdamW(module.parameters()), {**config, **division})
        state = engine.full_state_dict() or {}
    except (TypeError, ValueError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    return str([tuple(state[name].shape) for name in state if name.endswith("0.self_attn.q_proj.weight")])
