"""One rank of the gradient grid: rank 0 writes {combination: {name: gradient}}.

The gradient is read off a plain SGD step so large that the old weight is lost in rounding.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch

from common.config import DeepSpeedConfig, Dtype
from common.data.batches import Batches, BatchPlan
from common.data.types import IGNORE, TokenizedExample
from common.model import attention
from common.model.packed import batch_arguments
from common.runtime.distributed import World, all_reduce_sum, close_world, init_world
from common.training.ds_config import build_ds_config
from common.training.engine import Engine
from tests.packed import packed_lm
from tests.spread import sharing

LEARNING_RATE = 1e5
MAX_LENGTH = 24
VOCABULARY = 61
MICRO_BATCH_SIZES, PACKINGS, ZERO_STAGES = (1, 2, 4), (True, False), (1, 2, 3)


class Documents:
    """Seven documents of different lengths, each with a prompt that is not trained."""

    sources = ["only"]
    lengths = np.array([5, 19, 8, 24, 3, 11, 14], dtype=np.int32)
    source_ids = np.zeros(7, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> TokenizedExample:
        ids = np.random.default_rng(index).integers(1, VOCABULARY, self.lengths[index]).astype(np.int32)
        labels = np.append(ids[1:], IGNORE).astype(np.int32)
        labels[: self.lengths[index] // 3] = IGNORE
        return TokenizedExample(ids, labels, "only")


def tiny_llama(attn_implementation: str, *, checkpointing: bool = False) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def reference_gradient() -> dict[str, torch.Tensor]:
    """Plain transformers in float64, one document at a time, one backward pass over all."""
    model, documents = tiny_llama("eager").double(), Documents()
    loss, tokens = torch.zeros((), dtype=torch.float64), 0
    for index in range(len(documents)):
        example = documents[index]
        logits = model(torch.from_numpy(example.input_ids.astype(np.int64))[None]).logits[0]
        labels = torch.from_numpy(example.labels.astype(np.int64))
        loss = loss + torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE)
        tokens += int((labels != IGNORE).sum())
    (loss / tokens).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def pipeline_gradient(
    world: World,
    micro_batch_size: int,
    packing: bool,
    stage: int,
    *,
    checkpointing: bool = False,
    hpz: int = 1,
) -> dict[str, torch.Tensor] | None:
    """The gradient of one optimizer step over all documents, on rank 0."""
    module = packed_lm(tiny_llama(attention.NAME, checkpointing=checkpointing))
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    config = build_ds_config(
        DeepSpeedConfig(stage=stage, hpz_partition_size=hpz), dtype=Dtype.fp32, max_grad_norm=0.0,
        micro_batch_size=micro_batch_size, world_size=world.size,
        num_parameters=sum(p.numel() for p in module.parameters()),
    )  # fmt: skip
    engine = Engine(module, torch.optim.SGD(module.parameters(), lr=LEARNING_RATE), config)
    plan = BatchPlan(MAX_LENGTH, packing, 8, micro_batch_size, 0, **sharing(world))
    micro_batches = Batches(Documents(), plan).micro_batches(0)
    (trained,) = all_reduce_sum([sum(len(batch.targets) for batch in micro_batches)])
    engine.train()
    for batch in micro_batches:
        engine.backward(engine(**batch_arguments(batch)).loss_sum, trained)
    assert engine.step().applied
    after = engine.full_state_dict()
    if after is None:
        return None
    return {name: (before[name] - after[f"model.{name}"]) / LEARNING_RATE for name in before}


def main(out: str) -> int:
    attention.register()
    world = init_world()
    gradients = {}
    for micro, packing, stage in itertools.product(MICRO_BATCH_SIZES, PACKINGS, ZERO_STAGES):
        key = (micro, packing, stage, False)
        gradients[key] = pipeline_gradient(world, micro, packing, stage)
    for stage in ZERO_STAGES:
        gradients[2, True, stage, True] = pipeline_gradient(world, 2, True, stage, checkpointing=True)
    if world.is_rank0:
        torch.save(gradients, out)
    close_world()
    return 0


def of_slices(out: str, sequence_parallel: int) -> int:
    """One rank of those that share rows."""
    attention.register()
    world = init_world(sequence_parallel)
    gradients = {}
    for stage, packing in itertools.product(ZERO_STAGES, PACKINGS):
        gradients[stage, packing, False] = pipeline_gradient(world, 1, packing, stage)
    gradients[2, True, True] = pipeline_gradient(world, 2, True, 2, checkpointing=True)
    gradients["hpz"] = pipeline_gradient(world, 1, True, 3, hpz=2)
    if world.is_rank0:
        torch.save(gradients, out)
    close_world()
    return 0
