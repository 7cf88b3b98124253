"""Optimizer steps of real sizes on the fake device: only shapes are there, so that 70B fit anywhere."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

LLAMA: dict[str, Any] = {
    "model_type": "llama", "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "1B": {
        **LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "7B": {
        **LLAMA, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    },
    "8B": {
        **LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "70B": {
        **LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
SIZES["30B-A3B"] = {
    **LLAMA, "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
}  # fmt: skip
SIZES["30B-A3B of 16 experts"] = {**SIZES["30B-A3B"], "num_experts": 16}
SIZES["1B, 2 of 16 layers"] = {**SIZES["1B"], "num_hidden_layers": 2}
"""Configs of Llama 3.2 1B, Qwen 2.5 7B (as a Llama), Llama 3.1 8B and 70B, and Qwen 3 30B-A3B."""
OF_DEPTH = " layers of "


def fields_of(name: str) -> dict[str, Any]:
    """The config of a size, also of `3 layers of 8B`."""
    layers, _, size = name.rpartition(OF_DEPTH)
    return {**SIZES[size], "num_hidden_layers": int(layers)} if layers else SIZES[size]


DOCUMENT = 512
"""Tokens of a document."""


def train(case: dict[str, Any]) -> int:
    """Two optimizer steps, the second of `micro_batches` passes; returns 0.

    case: names, frozen, tokens, micro_batches, stage, size, offload_optimizer, offload_param, hpz, lora,
    checkpointing and, if wanted, dtype, policy (of checkpointing), compile, liger (with its kernels), entropy
    (false: not computed), shared and documents. names: of the sizes of what learns, the first with a head of
    tokens, the others with a scalar one; frozen: of what does not. shared: ranks that share the tokens;
    documents: how many each has (else DOCUMENT).
    """
    from common.data.slices import slice_of
    from common.runtime.distributed import init_world

    world = init_world(case.get("shared", 1))
    learning = [_learner(case, name, number > 0) for number, name in enumerate(case["names"])]
    held = [_module(case, name, False) for name in case.get("frozen", ())]
    for module in held:
        module.requires_grad_(False)
    batch = _batch(documents_of(case))
    if world.sequence_parallel > 1:
        batch = slice_of(batch, world.sequence_rank, world.sequence_parallel)
    batch = batch.to(world.device)
    for step in (1, 2):
        for number, engine in enumerate(learning):
            passes = 1 if step == 1 else case["micro_batches"]  # the first makes the optimizer's state
            _step(engine, batch, passes, number > 0, step, case.get("entropy", True))
    return 0


def _step(engine: Any, batch: Any, micro_batches: int, is_scalar: bool, step: int, entropy: bool) -> None:
    from common.model.packed import batch_arguments, document_arguments
    from common.phases import enter

    enter("step", step)
    for _ in range(micro_batches):
        if is_scalar:
            positions = {
                "score_positions": batch.trained_positions,
                "computed_positions": batch.computed_positions,
            }
            loss = engine(**document_arguments(batch), **positions).sum()
        else:
            loss = engine(**batch_arguments(batch), with_entropy=entropy).loss_sum
        engine.backward(loss, 1000.0)
        del loss
    engine.step()


def _module(case: dict[str, Any], name: str, is_scalar: bool) -> Any:
    """The network of this size, as a step makes it."""
    import torch

    from common.config import CheckpointingPolicy, LoraConfig, ModelConfig
    from common.model import adapters, attention, compiled, loading, recomputation
    from common.model.architecture import CAUSAL_LM, build_config
    from common.model.packed import PackedCausalLM
    from common.model.partition import drawing_shares, share_of
    from common.model.probes import find_shortcuts
    from common.model.scalar_head import NEW_REWARD_MODEL, PackedScalarModel

    attention.register()
    head = NEW_REWARD_MODEL if is_scalar else CAUSAL_LM
    config = build_config(fields_of(name))
    config.update(dict(head.fields))
    share, cuda = share_of(case["stage"]), torch.device("cuda")
    with cuda, nullcontext() if share is None else drawing_shares(share, cuda):
        network = loading.make_network(config, ModelConfig(dtype=_dtype(case)), head)
    if case["checkpointing"]:
        model = ModelConfig(
            gradient_checkpointing=True, checkpointing_policy=CheckpointingPolicy(case.get("policy", "full")),
            tiled_mlp=case.get("tiled"), activation_offload=case.get("activation_offload", False),
            compile=case.get("compile"),
        )  # fmt: skip
        recomputation.recompute_layers(network, model, cuda)
    if case.get("compile"):
        compiled.compile_layers(network)
    if case["lora"]:
        lora = LoraConfig(enabled=True, r=case["lora"], alpha=16)
        network = adapters.add_adapters(network, lora, head.task_type)
    network.train()
    kind = PackedScalarModel if is_scalar else PackedCausalLM
    module = kind(network, find_shortcuts(network))
    if case.get("liger"):
        from tests.gpu_fake import liger

        liger.put_into(network)
    return module


def _learner(case: dict[str, Any], name: str, is_scalar: bool) -> Any:
    from common.config import DeepSpeedConfig, Offload
    from common.training.ds_config import build_ds_config
    from common.training.engine import Engine
    from common.training.optim import build_optimizer
    from common.training_config import OptimConfig

    module = _module(case, name, is_scalar)
    settings = DeepSpeedConfig(
        stage=case["stage"],
        hpz_partition_size=case["hpz"],
        offload_optimizer=Offload.cpu if case["offload_optimizer"] else Offload.none,
        offload_param=Offload.cpu if case["offload_param"] else Offload.none,
    )
    config = build_ds_config(
        settings, dtype=_dtype(case), max_grad_norm=1.0, micro_batch_size=1, world_size=case["size"],
        num_parameters=sum(parameter.numel() for parameter in module.parameters()), gpu=True,
    )  # fmt: skip
    engine = Engine(module, build_optimizer(module, OptimConfig(lr=1e-5), 1e-5), config)
    engine.train()
    return engine


def _dtype(case: dict[str, Any]) -> Any:
    from common.config import Dtype

    return Dtype(case.get("dtype", "bf16"))


def documents_of(case: dict[str, Any]) -> list[int]:
    """Tokens of each document."""
    found: list[int] = case.get("documents") or [DOCUMENT] * (case["tokens"] // DOCUMENT)
    return found


def _batch(lengths: list[int]) -> Any:
    """Documents of these lengths, all but the last token of each trained."""
    import numpy as np

    from common.data.batches import collate
    from common.data.types import IGNORE, TokenizedExample

    documents = []
    for length in lengths:
        labels = np.full(length, 5, np.int32)
        labels[-1] = IGNORE
        documents.append(TokenizedExample(np.full(length, 7, np.int32), labels, ""))
    return collate(documents, range(len(lengths)), [0] * len(lengths))
