"""Low-rank adapters: around which modules they go, and what they are merged into.

Takes a network and a `LoraConfig`, or a PeftModel with its weights; returns peft's wrapper, words about what
it reaches, or merged weights in fp32. peft's own merge is not used: it rounds the product to the base's dtype
before it adds, and the sum again. Loads nothing and writes nothing.

LoRA is arXiv 2106.09685, DoRA arXiv 2402.09353. Experts that transformers 5 keeps in one tensor are adapted
as peft does it: each expert has an A and a B of its own, stacked.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from common.config import LoraConfig
from common.errors import UserError
from common.runtime.performance import weights_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "default"
"""peft's name for the only adapter."""

MERGE_TOLERANCE = 1e-4
"""fp32: a sum of two products against the product of a sum, of one layer, relative to its largest output."""

PROBE_ROWS = 8

GATE_AND_UP, GATE_UP = ("gate_proj", "up_proj"), "gate_up_proj"
"""The usual names of two matrices, and the name of the one tensor in which all experts' are kept."""


def add_adapters(network: PreTrainedModel, lora: LoraConfig, task_type: str) -> PreTrainedModel:
    """peft's wrapper around `network`, in the base's dtype: the optimizer keeps fp32 copies of its own.

    A target is a module's name, a parameter's (for example `experts.gate_up_proj`), or all-linear alone.
    UserError for targets that the network does not have, or that cannot be adapted as the settings say.
    """
    import peft

    warnings.filterwarnings("ignore", ".*gradient_checkpointing.*", FutureWarning)  # peft's own calls
    warnings.filterwarnings(
        "ignore", ".*tie_word_embeddings.*"
    )  # merged weights are untied, see `merged_names`
    targets = _targets(network, lora)
    config = peft.LoraConfig(
        task_type=task_type,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
        target_modules="all-linear" if targets.modules == ["all-linear"] else targets.modules,
        target_parameters=targets.parameters or None,
        rank_pattern=dict.fromkeys(targets.doubled, 2 * lora.r),
        alpha_pattern=dict.fromkeys(targets.doubled, 2 * lora.alpha),
    )
    try:
        adapted: Any = peft.get_peft_model(network, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise _refused(network, lora, error) from error
    if targets.modules != ["all-linear"]:  # what peft neither found nor took for experts is still among these
        there = [base_name(name) for name, _ in network.named_modules()]
        lost = [name for name in sorted(config.target_modules or ()) if not _any_ends_in(there, name)]
        if lost:
            raise _refused(network, lora, ValueError(f"nothing has the name {', '.join(lost)}"))
    return cast("PreTrainedModel", adapted)


@dataclass(frozen=True)
class _Targets:
    modules: list[str]
    parameters: list[str]
    doubled: list[str]  # patterns of parameters that hold two matrices: they have twice the rank and alpha


def _targets(network: nn.Module, lora: LoraConfig) -> _Targets:
    """Experts that are kept in one tensor have no modules: their names are those of parameters."""
    modules = [name for name, _ in network.named_modules()]
    parameters = [name for name, _ in network.named_parameters()]
    lost = [name for name in lora.targets if not _any_ends_in(modules, name)]
    found = [name for name in lost if _any_ends_in(parameters, name)]
    taken, doubled = list(found), []
    if set(GATE_AND_UP) <= set(lost) and _any_ends_in(parameters, GATE_UP):
        found, taken, doubled = [*found, GATE_UP], [*found, *GATE_AND_UP], [rf".*\.{GATE_UP}"]
    return _Targets([name for name in lora.targets if name not in taken], found, doubled)


def _any_ends_in(names: Iterable[str], target: str) -> bool:
    return any(name == target or name.endswith("." + target) for name in names)


def _refused(network: nn.Module, lora: LoraConfig, error: ValueError) -> UserError:
    text = " ".join(str(error).split())
    for word, key, off in (("lora_dropout", "dropout", "0"), ("use_dora", "dora", "false")):
        if "ParamWrapper" in text and word in text:
            return UserError(
                f"model.lora.{key}={getattr(lora, key)} cannot be had on experts and routers: "
                "they have no linear layers of their own",
                hint=f"set model.lora.{key}={off}, or leave the experts out: "
                "model.lora.targets=[q_proj,k_proj,v_proj,o_proj]",
            )
    weights = [base_name(n) for n, p in network.named_parameters() if dimensions(p) > 1 and not is_adapter(n)]
    names = sorted({_short(name) for name in weights})
    return UserError(
        f"model.lora.targets={list(lora.targets)} cannot be adapted: {text}",
        hint=f"use all-linear, or names that this model has: {', '.join(names)}",
    )


# --- What adapters reach --------------------------------------------------------------------------


def reach(network: nn.Module) -> str | None:
    """Which modules have adapters, counted by name, and which weights of two dimensions or more have none;
    None without adapters."""
    names = {_adapted_name(name, layer) for name, layer in _layers(network)}
    if not names:
        return None
    left = Counter(
        _short(plain)
        for name, parameter in network.named_parameters()
        if not is_adapter(name) and not parameter.requires_grad and (plain := base_name(name)) not in names
        if dimensions(parameter) > 1
    )
    trained = sum(weights_in(parameter) for parameter in network.parameters() if parameter.requires_grad)
    reached = Counter(_short(name) for name in names)
    said = f"adapters on {_listed(reached)} ({trained:,} weights are trained)"
    return said + (f"; none on {_listed(left)}" if left else "")


def _short(name: str) -> str:
    """A module's name without its place; a parameter's with that of its module, as of experts."""
    return ".".join(name.split(".")[-2:]).removesuffix(".weight")


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def dimensions(parameter: Any) -> int:
    """Of the whole parameter, also when ZeRO-3 has partitioned it."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


# --- peft's wrapper ---------------------------------------------------------------------------------


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside peft's wrapper, if there is one; adapters stay active in it."""
    unwrap = getattr(model, "get_base_model", None)
    return cast("PreTrainedModel", model if unwrap is None else unwrap())


def adapters_off(module: nn.Module) -> AbstractContextManager[None]:
    """While the block runs, what peft wrapped inside of `module` is its base; without peft nothing changes.

    peft stops and resumes gradients of the adapters with it: no backward pass inside, nor across its borders.
    """
    # asked of the type: peft's wrappers find attributes of what they wrap as well
    wrapped = [part for part in module.modules() if hasattr(type(part), "disable_adapter")]
    return cast(Any, wrapped[0]).disable_adapter() if wrapped else nullcontext()


# --- Names ----------------------------------------------------------------------------------------


def is_adapter(name: str) -> bool:
    """Whether a tensor of a PeftModel's state dict belongs to an adapter."""
    return ".lora_" in name


def is_of_base(name: str) -> bool:
    """Whether the merged model has this tensor: of a head trained beside adapters, peft keeps the old one."""
    return not is_adapter(name) and ".original_module." not in name


def base_name(name: str) -> str:
    """The name a tensor has in the model without adapters."""
    plain = re.sub(r"(\.base_layer)+\.", ".", name.removeprefix("base_model.model."))
    return plain.replace(f".modules_to_save.{ADAPTER}.", ".")


def _layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """Each layer with an adapter, by the name it has in the model without; experts that are adapted in two
    tensors are two layers, one inside the other."""
    from peft.tuners.lora import LoraLayer

    for name, layer in network.named_modules():
        if isinstance(layer, LoraLayer):
            yield base_name(name + ".").removesuffix("."), layer


def _adapted_name(name: str, layer: Any) -> str:
    """Of the tensor that the adapter changes."""
    plain = re.sub(r"(\.base_layer)+$", "", name)
    return f"{plain}.{getattr(layer, 'parameter_name', 'weight')}"


# --- Merging --------------------------------------------------------------------------------------


@torch.no_grad()
def merged_weights(adapted: nn.Module) -> Iterator[tuple[str, torch.Tensor, float]]:
    """For each adapted tensor: its name in the model without adapters, the merge in fp32, and by how much
    that differs from what peft's layer computes in fp32 with the adapter beside it, relative to its largest
    output (at most MERGE_TOLERANCE where both are right).

    adapted: a PeftModel whose weights are whole; it is left as it was. One layer at a time is held in fp32.
    """
    for name, layer in adapted_layers(adapted):
        yield name, *merged_weight(layer)


def adapted_layers(adapted: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """For each adapted tensor its name in the model without adapters, and peft's layer around it."""
    for name, layer in _layers(adapted):
        yield _adapted_name(name, layer), layer


@torch.no_grad()
def merged_weight(layer: nn.Module) -> tuple[torch.Tensor, float]:
    """The merge of one of `adapted_layers` and its difference, as `merged_weights` has them. The layer's own
    tensors are whole; others of the network may be missing."""
    whole = copy.deepcopy(layer).float().eval()
    merged = _merged(whole)
    return merged, _difference(whole, merged)


def _merged(layer: Any) -> torch.Tensor:
    """W + scale * (B @ A) in the base's layout; with DoRA its rows are scaled to the learned lengths."""
    scale = layer.scaling[ADAPTER]
    if hasattr(layer, "parameter_name"):
        return layer.get_param() + _stacked_product(layer).mul_(scale)
    base = layer.get_base_layer()
    if ADAPTER in layer.lora_embedding_A:
        product, is_transposed = layer.lora_embedding_B[ADAPTER] @ layer.lora_embedding_A[ADAPTER], True
    else:
        product = layer.lora_B[ADAPTER].weight @ layer.lora_A[ADAPTER].weight
        is_transposed = layer.fan_in_fan_out
    if is_transposed:
        product = product.T
    merged = base.weight + product.mul_(scale)  # a copy less: of embeddings it is a large one
    if ADAPTER not in layer.lora_magnitude_vector:
        return cast(torch.Tensor, merged)
    per_output = merged.norm(dim=0 if is_transposed else 1)
    factor = layer.lora_magnitude_vector[ADAPTER].weight / per_output
    return cast(torch.Tensor, merged * (factor if is_transposed else factor[:, None]))


def _stacked_product(layer: Any) -> torch.Tensor:
    """B @ A of each of E experts, in the layout of the parameter: [E, out, in], or [E, in, out]."""
    weight_a, weight_b = (
        layer.lora_A[ADAPTER].weight,
        layer.lora_B[ADAPTER].weight,
    )  # [r * E, in], [out, E * r]
    if layer.get_param().dim() == 2:
        return cast(torch.Tensor, weight_b @ weight_a)
    experts = layer.num_experts
    pairs = weight_b.unflatten(1, (-1, experts)), weight_a.unflatten(0, (experts, -1))
    product = torch.einsum("ore,eri->eoi", *pairs)
    return product.transpose(1, 2) if getattr(layer.get_base_layer(), "is_transposed", False) else product


def _difference(layer: Any, merged: torch.Tensor) -> float:
    """What peft computes against the merge: outputs for a few inputs, or the tensor of a stacked layer."""
    generator = torch.Generator().manual_seed(0)
    base = layer.get_base_layer()
    if hasattr(layer, "parameter_name"):
        with layer._activate_lora([ADAPTER]):
            return _relative(getattr(base, layer.parameter_name), merged)
    if isinstance(base, nn.Embedding):
        inputs = torch.randint(base.num_embeddings, (PROBE_ROWS, 1), generator=generator)
    else:
        width = merged.shape[0] if layer.fan_in_fan_out else merged.shape[1]
        inputs = torch.randn(PROBE_ROWS, width, generator=generator)
    expected = layer(inputs)
    base.weight = nn.Parameter(merged, requires_grad=False)
    return _relative(expected, base(inputs))


def _relative(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float((expected - found).abs().max() / expected.abs().max().clamp_min(1e-30))
