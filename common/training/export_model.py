"""A plain transformers model with a trained module's weights: adapters merged, settings of training removed.

Takes a live module and its gathered weights; returns a second model around the same tensors, on the CPU, and
what the merge of each adapter changed. The adapters are also written, as peft reads them. Does not change the
live module, and judges nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from common.artifacts import ADAPTER_FOLDER, CARD
from common.model.adapters import ADAPTER, base_name, is_adapter, is_of_base, merged_weights, unwrapped
from common.model.nf4 import is_scale

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Rebuilt:
    """The model to write, and the parts it was made from."""

    saved: PreTrainedModel  # on the CPU; tensors that nothing was merged into are the given ones
    adapted: PreTrainedModel | None = None  # the base with its adapters beside it; None without adapters
    merge_differences: Mapping[str, float] = field(default_factory=dict)  # by tensor: see `merged_weights`


def rebuild(
    module: PreTrainedModel,
    state: Mapping[str, torch.Tensor],
    folder: Path,
    merges: Iterable[tuple[str, torch.Tensor, float]] | None = None,
) -> Rebuilt:
    """A second model around the tensors of `state`; adapters are written to `folder`, then merged.

    state: the module's weights, as `own_names` returns them. merges: what `merged_weights` gives, where it is
    there already.
    """
    is_adapted = hasattr(module, "peft_config")
    base = unwrapped(module)
    if is_adapted:
        state = {**state, **_dequantized(module, state)}
    state = {name: tensor.detach().cpu() for name, tensor in state.items()}
    if not is_adapted:
        return Rebuilt(with_weights(type(base), plain_config(base), state))
    plain = {base_name(name): tensor for name, tensor in state.items() if is_of_base(name)}
    beside = with_weights(type(base), plain_config(base), plain, runs=True)
    tied = tied_names(beside)
    adapted = with_adapters(module, beside, state)
    cast(Any, adapted).save_pretrained(str(folder / ADAPTER_FOLDER), save_embedding_layers=False)
    (folder / ADAPTER_FOLDER / CARD).unlink(missing_ok=True)  # peft's, with blanks and the base's path
    config, differences = plain_config(base), {}
    for name, merged, difference in merged_weights(adapted) if merges is None else merges:
        differences[name] = difference
        plain[name] = merged.to(plain[name].dtype)  # the only rounding
    if tied & set(differences):  # what was one tensor is two now
        set_tied(config, False)
    return Rebuilt(with_weights(type(base), config, plain), adapted, differences)


def plain_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The model's config without the settings that only training needs."""
    config = copy.deepcopy(model.config)
    for part in (config, config.get_text_config(decoder=True)):
        part._attn_implementation = None
        part.use_cache = True
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = model.dtype
    return config


def own_names(
    module: PreTrainedModel, state_dict: Mapping[str, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    """The weights under the module's own names: a wrapper that held it as `model` put that in front.

    state_dict: None for the module's own.
    """
    own = module.state_dict()
    taken = (name for name in own if is_adapter(name) or is_of_base(name))
    names = {name for name in taken if not is_scale(name, own)}
    state = own if state_dict is None else state_dict
    if not names <= set(state):
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    return _chosen(names, state, "module")


def _chosen(names: set[str], state: Mapping[str, torch.Tensor], whose: str) -> dict[str, torch.Tensor]:
    if lacking := names - set(state):
        raise ValueError(
            f"the state dict lacks {len(lacking)} of the {whose}'s tensors: {sorted(lacking)[:3]}"
        )
    return {name: state[name] for name in names}


def _dequantized(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """4-bit base weights of `state` in the model's dtype; empty without quantization."""
    found = {}
    for name, parameter in module.named_parameters():
        quantized = getattr(parameter, "quant_state", None)
        if quantized is not None:
            from bitsandbytes.functional import dequantize_4bit

            # of `state`: on ZeRO-3 a rank holds a part of the parameter's own
            found[name] = dequantize_4bit(state[name].to(quantized.absmax.device), quantized)
    return found


def with_weights(
    kind: type[PreTrainedModel],
    config: PreTrainedConfig,
    state: Mapping[str, torch.Tensor],
    *,
    runs: bool = False,
) -> PreTrainedModel:
    """A model of class `kind` holding exactly these tensors, without a copy; runs: with its buffers too."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False) if runs else torch.device("meta"):
        model = kind(config)
    model.load_state_dict(_chosen(set(model.state_dict()), state, "model"), strict=True, assign=True)
    model.tie_weights()
    return model.eval()


def with_adapters(
    module: PreTrainedModel, base: PreTrainedModel, state: Mapping[str, torch.Tensor]
) -> PreTrainedModel:
    """`base`, with the module's adapters and their weights in `state` around it; its own may be missing."""
    import peft

    config = copy.deepcopy(cast(Any, module).peft_config[ADAPTER])
    config.inference_mode = False
    with torch.random.fork_rng(devices=[]):
        adapted = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    adapters = {name: tensor for name, tensor in state.items() if is_adapter(name)}
    # in the dtype that they have: an adapter in fp32 may stand beside a base in half precision
    unknown = adapted.load_state_dict(adapters, strict=False, assign=True).unexpected_keys
    expected = {name for name in adapted.state_dict() if is_adapter(name)}
    if unknown or expected != set(adapters):
        raise ValueError(f"adapters do not fit: {sorted(set(unknown) | (expected ^ set(adapters)))[:3]}")
    return cast("PreTrainedModel", adapted)


def tied_names(model: PreTrainedModel) -> set[str]:
    """Of tensors that are one with another, and of those."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {*tied, *tied.values()}


def set_tied(config: PreTrainedConfig, tied: bool) -> None:
    for part in (config, config.get_text_config(decoder=True)):
        part.tie_word_embeddings = tied
