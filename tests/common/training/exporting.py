"""Small models whose weights have moved, exported: what the tests of the export share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from common.config import Dtype, LoraConfig, ModelConfig
from common.model.architecture import build_config
from common.model.loading import load_model
from common.model.packed import PackedCausalLM
from common.training.export import ask_live, export_model
from tests.packed import packed_lm
from tests.tiny import CHATML, SHAPE, tiny_tokenizer

CPU = torch.device("cpu")
PROBE = torch.arange(5, 25)[None]
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 4},
    "cohere": {"model_type": "cohere", "logit_scale": 0.25},
}
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"model_type": "granitemoe", "num_local_experts": 4, "num_experts_per_tok": 2},
}
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TIED = {"model_type": "llama", "tie_word_embeddings": True}
BF16_LORA = {"dtype": Dtype.bf16, "lora": LoraConfig(enabled=True, r=4, alpha=8)}


def published(
    folder: Path,
    make: Any = AutoModelForCausalLM,
    dtype: torch.dtype = torch.bfloat16,
    template: str | None = CHATML,
    labels: int | None = None,
    **fields: Any,
) -> Path:
    """A model as others publish it: `save_pretrained` of network and tokenizer."""
    torch.manual_seed(1)
    tokenizer = tiny_tokenizer(template)
    fields = {"model_type": "llama", "vocab_size": len(tokenizer), "pad_token_id": 0, **SHAPE, **fields}
    config = build_config(fields)
    if labels is not None:
        config.num_labels = labels
    make.from_config(config, dtype=dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trained(
    fields: Mapping[str, Any], dtype: Dtype = Dtype.fp32, lora: LoraConfig | None = None
) -> PackedCausalLM:
    """A model whose trainable weights have moved away from where they began."""
    config = ModelConfig(config={**SHAPE, **fields}, dtype=dtype, lora=lora or LoraConfig())
    model = load_model(config, tiny_tokenizer(CHATML), seed=0, device=CPU)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.05)
    return packed_lm(model.eval())


def exported(packed: PackedCausalLM, folder: Path, **changes: Any) -> Path:
    asked: dict[str, Any] = {"state_dict": packed.state_dict(), "details": {"steps": 7}, **changes}
    asked.setdefault("probe", ask_live(packed, PROBE))
    return export_model(packed.model, tokenizer=tiny_tokenizer(CHATML), folder=folder, **asked)


@torch.no_grad()
def reloaded_logits(folder: Path) -> torch.Tensor:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.config._attn_implementation == "sdpa"
    return model(PROBE).logits[0]
