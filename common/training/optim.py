"""OptimConfig in, a torch optimizer and its schedule out. DeepSpeed shards whatever is returned.

ZeRO hands an optimizer flat shards of the parameters, not their shapes. AdamW works element by element, so
that changes nothing for it; the other optimizers' docstrings say what it changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from common.model.adapters import dimensions
from common.rates import decay_steps, warmup_of
from common.training_config import OptimConfig, OptimizerName, SchedulerName

if TYPE_CHECKING:
    import torch

ParameterGroups = list[dict[str, Any]]

OF_VOCABULARY = ("embed", "lm_head", "wte", "wpe")
"""Parts of the names of matrices with a row per token."""

LR_SCALE = "lr_scale"
"""Key of a parameter group that takes another learning rate than the rest."""


def parameter_groups(module: torch.nn.Module, weight_decay: float) -> ParameterGroups:
    """Trainable parameters as one group with weight decay and one without (biases, norms).

    Without weight decay there is one group: fewer, larger shards.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    if weight_decay == 0:
        return [{"params": trainable, "weight_decay": 0.0}]
    decayed = [p for p in trainable if dimensions(p) >= 2]
    plain = [p for p in trainable if dimensions(p) < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(
    module: torch.nn.Module, optim: OptimConfig, lr: float, *, seed: int = 0
) -> torch.optim.Optimizer:
    """The client optimizer for `module`'s trainable parameters at peak learning rate `lr`.

    seed: of what is rounded at random.
    """
    groups = parameter_groups(module, optim.weight_decay)
    betas = (optim.betas[0], optim.betas[1])
    if optim.name is OptimizerName.adamw:
        import torch

        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=optim.eps, fused=True)
    if optim.name is OptimizerName.adamw_bf16:
        from common.training.adamw_bf16 import AdamWBf16

        return AdamWBf16(groups, lr, betas, optim.eps, seed)
    if optim.name is OptimizerName.adafactor:
        return _adafactor(groups, lr)
    if optim.name is OptimizerName.muon:
        return _muon(module, optim, lr)
    return _bitsandbytes(optim, groups, lr, betas)


def _adafactor(groups: ParameterGroups, lr: float) -> torch.optim.Optimizer:
    """Adafactor (arXiv 1804.04235) with an external learning rate.

    On ZeRO's flat shards its second moment is not factored: one fp32 number per weight, half of
    AdamW's state. Its update clipping is off, because the RMS of a shard depends on the world size.
    """
    from transformers.optimization import Adafactor

    return Adafactor(
        groups,
        lr=lr,
        scale_parameter=False,
        relative_step=False,
        warmup_init=False,
        clip_threshold=float("inf"),
    )


def _muon(module: torch.nn.Module, optim: OptimConfig, lr: float) -> torch.optim.Optimizer:
    """Muon for the matrices of the decoder, AdamW for embeddings, head, norms and biases.

    DeepSpeed orthogonalises whole matrices before it shards them, for parameters marked `use_muon`. Its
    update has singular values of about sqrt(max(1, rows / columns)); times 0.2 sqrt(columns) its elements
    are as large as AdamW's, so that one learning rate serves both (arXiv 2502.16982, section 2.2).
    """
    from common.training.engine import muon_optimizer

    by_columns: dict[int, list[torch.nn.Parameter]] = {}
    others: list[torch.nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = dimensions(parameter) == 2 and not any(part in name for part in OF_VOCABULARY)
        parameter.use_muon = is_matrix  # type: ignore[attr-defined]  # DeepSpeed reads this mark
        columns = getattr(parameter, "ds_shape", parameter.shape)[-1]
        (by_columns.setdefault(columns, []) if is_matrix else others).append(parameter)
    groups: ParameterGroups = [
        {
            "params": matrices,
            "use_muon": True,
            "lr": lr,
            LR_SCALE: 0.2 * math.sqrt(columns),
            "momentum": 0.95,
            "weight_decay": optim.weight_decay,
        }
        for columns, matrices in by_columns.items()
    ]
    rest = {"params": others, "use_muon": False, "lr": lr, "eps": optim.eps, "weight_decay": 0.0}
    groups.append({**rest, "betas": (optim.betas[0], optim.betas[1])})
    return muon_optimizer([group for group in groups if group["params"]])


def _bitsandbytes(
    optim: OptimConfig, groups: ParameterGroups, lr: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            f"optim.name={optim.name.value} needs bitsandbytes, which is not installed",
            hint="pip install 'rlhf-pipeline[gpu]', or use optim=adamw",
        ) from error
    is_paged = optim.name is OptimizerName.paged_adamw_8bit
    kind = bitsandbytes.optim.PagedAdamW8bit if is_paged else bitsandbytes.optim.AdamW8bit
    return kind(groups, lr=lr, betas=betas, eps=optim.eps)


def build_schedule(optim: OptimConfig, total_steps: int) -> Callable[[int], float]:
    """Applied steps so far -> share of the peak learning rate for the next one (transformers' schedules).

    Linear warm-up over `warmup_of` steps, then the named shape: the first step has learning rate 0 when
    there is a warm-up. A pure function, so that a resumed run needs no scheduler state.
    """
    import torch
    from transformers import get_scheduler

    warmup = warmup_of(optim, total_steps)
    extra: dict[str, object] = {}
    name = optim.scheduler.value
    if optim.scheduler is SchedulerName.cosine and optim.min_lr_ratio > 0:
        name, extra = "cosine_with_min_lr", {"min_lr_rate": optim.min_lr_ratio}
    if optim.scheduler is SchedulerName.wsd:
        name = "warmup_stable_decay"
        extra = {"num_decay_steps": decay_steps(total_steps, warmup), "min_lr_ratio": optim.min_lr_ratio}
    carrier = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    return get_scheduler(name, carrier, warmup, total_steps, scheduler_specific_kwargs=extra).lr_lambdas[0]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every parameter group's learning rate, times the group's own scale where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get(LR_SCALE, 1.0)
