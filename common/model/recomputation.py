"""Layers that are computed again in the backward pass, instead of keeping what that pass needs.

Takes a transformers model before adapters are added, and what goes with `model.gradient_checkpointing`: what
is kept all the same, tiles of feed-forward networks, inputs in host memory.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from common.config import CheckpointingPolicy, ModelConfig
from common.errors import UserError
from common.model.activation_offload import offload_layer_inputs
from common.model.tiled_mlp import tile_feed_forward
from common.notices import notice

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEPT = {
    "mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_varlen_attn", "efficient_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
}  # fmt: skip
"""What selective recomputation keeps, by name: all of a layer's matrix products, and its attention."""


def recompute_layers(network: PreTrainedModel, model: ModelConfig, device: torch.device) -> None:
    """As the settings say. device: on which it trains. UserError for an architecture that cannot."""
    enable_checkpointing(network, model.checkpointing_policy)
    if model.tiles_feed_forward:
        tile_feed_forward(network, insisted=bool(model.tiled_mlp))
    if model.activation_offload and device.type == "cpu":
        notice("model.activation_offload moves nothing", "this rank trains on the CPU")
    elif model.activation_offload:
        offload_layer_inputs(network)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = getattr(operation, "overloadpacket", operation).__name__
    return CheckpointPolicy.MUST_SAVE if name in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def enable_checkpointing(
    network: PreTrainedModel, policy: CheckpointingPolicy = CheckpointingPolicy.full
) -> None:
    """Activations of a layer are recomputed in the backward pass, with selective all that are cheap."""
    if not network.supports_gradient_checkpointing:
        raise UserError(
            f"model_type={network.config.model_type} cannot recompute activations",
            hint="set model.gradient_checkpointing=false",
        )
    # renamed in the course of transformers 5
    enable = (
        getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
    )
    options: dict[str, Any] = {"use_reentrant": False}
    if policy is CheckpointingPolicy.selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    enable(options)
