"""A small stand-in for a model, to find out by running what its architecture does.

Takes a transformers model; returns one of the same class with few layers, narrow widths, a small vocabulary,
short windows and random weights in fp32; `differ` compares two ways through it. What holds for its code holds
for the model's, and is seen without rounding: in half precision two right ways through a pretrained model may
differ by half of the largest logit. It says nothing of the model's weights.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from common.errors import UserError
from common.model import attention
from common.model.one_by_one import decoder_of, reason_of, run_one_by_one
from common.model.partition import is_partitioned
from common.runtime.performance import weights_in

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger("rlhf.models")

VOCABULARY, WINDOW, LAYERS, WIDTH = 128, 4, 2, 64
"""Tokens, tokens of an attention window, layers, and units of a feed-forward network, at most."""

SMALL = 2_000_000
"""Parameters of a model that is run as it is."""

TOLERANCE = 1e-4
"""How far two right ways through a miniature may differ, of the largest value: fp32 in other orders."""
HALF_TOLERANCE = 3e-2
"""The same in half precision, where a model has to stand for itself."""

WINDOWS = ("sliding_window", "attention_chunk_size")
VOCABULARIES = ("vocab_size", "vocab_size_per_layer_input")
FEED_FORWARD = (
    "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "n_inner",
)  # fmt: skip
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
FIRST_LAYERS = ("first_k_dense_replace", "max_window_layers")
"""Config fields that say from which layer on layers are of another kind."""


class NoMiniature(UserError):
    """There is no smaller model of the class, and this one cannot be run: its weights are in parts."""


def miniature_of(model: PreTrainedModel) -> PreTrainedModel:
    """The miniature, in evaluation mode on the model's device; its documents run as the model's do.

    The model itself, in its own mode, where it is in fp32 and small, and where its class takes no smaller
    sizes. NoMiniature instead of that for a model whose weights are in parts.
    """
    if _is_small(model):
        return model
    small = small_network(model.config, lambda config: _like(model, config))
    if small is None and is_partitioned(model):
        raise NoMiniature(f"model_type={model.config.model_type} takes no smaller sizes")
    if small is None:
        return model
    if (reason := reason_of(model)) is not None:
        run_one_by_one(small, reason)
    return small


def small_network(
    config: PreTrainedConfig, make: Callable[[PreTrainedConfig], PreTrainedModel]
) -> PreTrainedModel | None:
    """What `make` makes of the config with fewer of everything, in evaluation mode with weights that count;
    None where the class takes no smaller sizes. Random states are left as they were."""
    for narrow in (True, False):
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                return _begun(make(reduced(config, narrow=narrow)))
        except Exception as error:  # whatever the class's own code makes of these sizes
            log.info("no miniature of model_type=%s: %r", config.model_type, error)
    return None


def _is_small(model: PreTrainedModel) -> bool:
    """Whether rounding and size leave nothing to gain, and no window is too long to be seen at work."""
    if is_partitioned(model):
        return False
    text = model.config.get_text_config(decoder=True)
    parameters = sum(map(weights_in, model.parameters()))
    filled = all((getattr(text, name, None) or 0) <= WINDOW for name in WINDOWS)
    return is_exact(model.dtype) and parameters <= SMALL and filled


def reduced(config: PreTrainedConfig, *, narrow: bool = True) -> PreTrainedConfig:
    """The config with fewer of everything. Layers: one of each kind that it names, at least. Heads keep their
    width, and stay fewer for keys than for queries where they are."""
    small = copy.deepcopy(config)
    text = small.get_text_config(decoder=True)
    if hasattr(small, "quantization_config"):
        del small.quantization_config
    _shorten(text, _kept_layers(text))
    for name in getattr(small, "sub_configs", {}):
        part = getattr(small, name, None)
        if part is not None and part is not text and hasattr(part, "num_hidden_layers"):
            _shorten(part, [0])  # a tower for images, which text never enters
    for name in WINDOWS:
        _at_most(text, name, WINDOW)
    for name in VOCABULARIES:
        _at_most(text, name, VOCABULARY)
    for part in (small, text):
        _within_vocabulary(part)
    if narrow:
        _narrow(text)
    return small


def _within_vocabulary(config: PreTrainedConfig) -> None:
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        token = getattr(config, name, None)
        if token is not None and not (isinstance(token, int) and token < VOCABULARY):
            setattr(config, name, 0)


def _kept_layers(text: PreTrainedConfig) -> list[int]:
    """The first layer of each kind, and of all kinds together at least `LAYERS`.

    Where the last layers read keys and values of earlier ones, of both one of each kind.
    """
    kinds = list(getattr(text, "layer_types", None) or ())
    firsts = sorted(kinds.index(kind) for kind in set(kinds))
    if readers := getattr(text, "num_kv_shared_layers", 0):
        text.num_kv_shared_layers = len(firsts)
        own = len(kinds) - readers
        return [*firsts, *(own + kinds[own:].index(kinds[layer]) for layer in firsts)]
    others = (layer for layer in range(text.num_hidden_layers) if layer not in firsts)
    return sorted([*firsts, *itertools.islice(others, max(0, LAYERS - len(firsts)))])


def _shorten(config: PreTrainedConfig, kept: Sequence[int]) -> None:
    """Only these layers, also in what has an entry for each of them or of some."""
    before = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == before > len(kept):
            setattr(config, name, [value[layer] for layer in kept])
    if spec := vars(config).get("_heterogeneity_spec"):
        of_layer = spec.per_layer_overrides
        spec.per_layer_overrides = {
            new: of_layer[layer] for new, layer in enumerate(kept) if layer in of_layer
        }
    for name in FIRST_LAYERS:
        _at_most(config, name, len(kept) - 1)
    config.num_hidden_layers = len(kept)


def _narrow(text: PreTrainedConfig) -> None:
    heads = text.num_attention_heads
    groups = _value(text, "num_key_value_heads") or heads
    width = _value(text, "head_dim") or text.hidden_size // heads
    fewer_groups = min(groups, 2)
    fewer = fewer_groups * min(heads // groups, 2)
    if fewer < heads:
        text.num_attention_heads, text.hidden_size = fewer, fewer * width
        if _value(text, "num_key_value_heads"):
            text.num_key_value_heads = fewer_groups
    for name in FEED_FORWARD:
        _at_most(text, name, WIDTH)
    chosen, groups = (_value(text, name) or 1 for name in ("num_experts_per_tok", "n_group"))
    for name in EXPERTS:
        _at_most(text, name, 2 * max(chosen, groups))


def _value(config: PreTrainedConfig, name: str) -> Any:
    """A field's value, also of one of which layers may have their own; None where there is no such field."""
    return vars(config).get(config.attribute_map.get(name, name))


def _at_most(config: PreTrainedConfig, name: str, most: int) -> None:
    value = _value(config, name)
    if isinstance(value, int) and not isinstance(value, bool) and value > most:
        setattr(config, name, most)


def _like(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    built = cast(Any, type(model))._from_config(
        config, dtype=torch.float32, attn_implementation=model.config._attn_implementation
    )
    return cast("PreTrainedModel", built.to(device_of(model)))


def _begun(small: PreTrainedModel) -> PreTrainedModel:
    """With weights that count, and run once."""
    for module in small.eval().modules():
        _begin(module)
    with torch.no_grad(), attention.plain_attention(small):
        decoder_of(small)(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device_of(small)))
    return small


@torch.no_grad()
def _begin(module: nn.Module) -> None:
    """Weights that make every token and place count; a new model's are so small that nearly all is alike."""
    for weight in module.parameters(recurse=False):
        if weight.dim() >= 2:
            weight.normal_(std=1.0 if isinstance(module, nn.Embedding) else weight.shape[-1] ** -0.5)


def some_tokens(base: PreTrainedModel, count: int) -> torch.Tensor:
    """int64 [1, count], different ids where the vocabulary is large enough."""
    table = cast(nn.Embedding, base.get_input_embeddings()).weight
    rows = getattr(table, "ds_shape", table.shape)[0]  # ZeRO-3 may hold the table in parts
    return torch.arange(3, 3 + count, device=table.device)[None] % rows


def difference(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> float:
    """Of the largest value in a, over the rows of a and b [N, ...]: in fp32 the largest difference; in half
    precision that of the median row, since rounding reroutes a token or two of a mixture of experts."""
    rows = (a - b).abs().amax(1) / a.abs().max().clamp_min(1e-6)
    found = float(rows.max() if is_exact(dtype) else rows.median())
    return found if math.isfinite(found) else math.inf


def differ(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether two ways through a model, or its miniature, differ by more than rounding."""
    return difference(a, b, dtype) > (TOLERANCE if is_exact(dtype) else HALF_TOLERANCE)


def is_exact(dtype: torch.dtype) -> bool:
    """Whether rounding in it is small enough to be told from a mistake."""
    return dtype in (torch.float32, torch.float64)


def device_of(model: PreTrainedModel) -> torch.device:
    return cast(nn.Embedding, model.get_input_embeddings()).weight.device
