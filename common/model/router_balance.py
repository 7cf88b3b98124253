"""The load-balancing loss of a mixture's routers (Switch Transformer, arXiv 2101.03961, equations 4 to 6).

With E experts, of which a token takes k, and T tokens of the optimizer step, on all ranks and in all its
micro-batches, each of the L layers that route has

    loss = E Σ_e f_e P_e,    f_e = (tokens that take expert e) / T,    P_e = Σ_t p_t(e) / T

where p_t is the softmax of the router's logits. It is k where experts are taken equally often. The loss of
the step gets `model.router_aux_loss_coef` times the mean over the layers. T counts every token that is
computed, trained or not, once: prompts that documents share, too, and no padding.

f has no gradient, so given f the gradient is a sum over tokens as any other. But f is of all tokens of the
step: with that of a micro-batch alone the loss would depend on how the batch is cut, and push each small
batch towards all experts (arXiv 2501.11873). So the decoder runs over the step's micro-batches once more,
first and without gradients, and tokens are counted. Then each router adds its share to the gradient where it
is computed, in the backward pass of whatever the step minimises: nothing else knows of it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from common.data.types import Batch, PairBatch
from common.errors import UserError
from common.model.last_layer import WHOLE_LAYER
from common.model.one_by_one import decoder_of, reason_of
from common.model.packed import PackedModel, decoder_arguments
from common.model.probes import Shortcuts
from common.notices import notice
from common.runtime.distributed import all_reduce_sum

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEY = "model.router_aux_loss_coef"
ITS_FUNCTION = "load_balancing_loss_func"
"""What transformers calls the loss, in the modules of the models that it has it for."""
CORRECTION = "e_score_correction_bias"
"""By which other models are balanced: their routers choose by it and weigh without it."""


@dataclass(frozen=True)
class Router:
    """A module, and where in what it returns the logits [..., E] are."""

    module: nn.Module
    index: int


def routers_of(model: PreTrainedModel) -> list[Router]:
    """Of a mixture whose routers take a softmax, in the order of its layers; UserError for other models."""
    kind = model.config.model_type
    recorded = (getattr(type(model), "_can_record_outputs", None) or {}).get("router_logits")
    source = inspect.getsource(sys.modules[type(model).__module__]) if recorded is not None else ""
    why = None
    if recorded is None:
        why = "has no experts that tokens are routed to"
    elif ITS_FUNCTION not in source or isinstance(recorded, list):
        why = "has routers that are not trained with it"
    elif any(name.endswith(CORRECTION) for name in model.state_dict()):
        why = "has routers that are balanced by a bias of their choice"
    elif reason := reason_of(model):
        why = f"runs documents one by one: {reason}"
    if why is not None:
        raise UserError(f"{KEY} asks for a load-balancing loss, and model_type={kind} {why}", hint=f"{KEY}=0")
    kind_of_router: Any = getattr(recorded, "target_class", recorded)
    index = getattr(recorded, "index", 0)
    return [Router(module, index) for module in model.modules() if isinstance(module, kind_of_router)]


def experts_of_a_token(model: PreTrainedModel) -> int:
    """How many of them a token takes."""
    return int(model.config.get_text_config(decoder=True).num_experts_per_tok)


def say_what_it_costs(coefficient: float, shortcuts: Shortcuts) -> None:
    """Notices of what is computed for the loss alone. shortcuts: of the network without it."""
    if shortcuts.partial_last_layer:
        notice("the last layer is computed at all positions", f"{KEY}={coefficient:g}", WHOLE_LAYER)
    notice(
        "each step runs its micro-batches once more without gradients",
        f"{KEY}={coefficient:g} counts which experts its tokens take",
        "a fourth to a third of the computation more",
    )


class RouterBalance:
    """Adds the loss to the gradients of a module's passes; in place before DeepSpeed puts its hooks there."""

    def __init__(self, module: PackedModel, coefficient: float) -> None:
        base = module.base()
        self._module, self._coefficient = module, coefficient
        routers = routers_of(base)
        self._chosen = experts_of_a_token(base)
        self._counts: list[torch.Tensor | None] = [None] * len(routers)
        self._mass: list[torch.Tensor | None] = [None] * len(routers)
        self._pull: torch.Tensor | None = None
        self._is_counting = False
        for layer, router in enumerate(routers):
            router.module.register_forward_hook(_Hook(self, layer, router.index))
        say_what_it_costs(coefficient, module.shortcuts)
        module.shortcuts = replace(module.shortcuts, partial_last_layer=False)

    @torch.no_grad()
    def count(
        self, micro_batches: Sequence[Batch | PairBatch], device: torch.device, scale: float
    ) -> dict[str, float]:
        """Run the step's micro-batches, so that passes with gradients may follow. A collective.

        scale: of the gradients of this rank until they are averaged over the ranks. Returns the step's
        metrics: `aux_loss`, the mean over layers, and `max_expert_load`, of the expert that most tokens take
        in its layer, in units of what each would have if all had the same.
        """
        decoder: Any = decoder_of(self._module.base())
        layers = len(self._counts)
        self._counts, self._mass = [None] * layers, [None] * layers
        self._is_counting = True
        try:
            for batch in micro_batches:
                documents = batch if isinstance(batch, Batch) else batch.documents
                self._module.routed = documents.input_ids.shape[1] - documents.padding
                decoder(**decoder_arguments(documents.to(device)))
        finally:
            self._is_counting = False
        counts, mass = (torch.stack([x for x in of if x is not None]) for of in (self._counts, self._mass))
        layers, experts = counts.shape
        summed = torch.tensor(all_reduce_sum(torch.stack([counts, mass]).cpu()), dtype=torch.float64)
        counts, mass = summed.view(2, layers, experts)
        tokens = counts.sum(1, keepdim=True) / self._chosen
        share = counts / tokens
        pull = self._coefficient * scale * experts / layers * share / tokens
        self._pull = pull.float().to(device, non_blocking=True)
        loss = experts * (share * mass / tokens).sum(1).mean()
        return {"aux_loss": float(loss), "max_expert_load": float(share.max()) * experts / self._chosen}

    def seen(self, layer: int, logits: torch.Tensor, outputs: Sequence[torch.Tensor]) -> Iterator[Any]:
        """What a router's module returned, tensor by tensor; with gradients they carry that of the loss."""
        if not self._is_counting and (self._pull is None or not torch.is_grad_enabled()):
            return iter(outputs)
        probabilities = logits.flatten(0, -2)[: self._module.routed].float().softmax(-1)
        mass = probabilities.sum(0)
        if self._is_counting:
            chosen = probabilities.topk(self._chosen, -1).indices.flatten()
            counts = torch.zeros_like(mass, dtype=torch.int64).scatter_add_(
                0, chosen, torch.ones_like(chosen)
            )
            self._counts[layer] = _added(self._counts[layer], counts.double())
            self._mass[layer] = _added(self._mass[layer], mass.double())
            return iter(outputs)
        assert self._pull is not None
        carry = [output for output in outputs if output.is_floating_point()]
        carried = iter(_Pulled.apply(mass, self._pull[layer], *carry))
        return iter([next(carried) if output.is_floating_point() else output for output in outputs])


@dataclass(frozen=True)
class _Hook:
    """Of one router."""

    balance: RouterBalance
    layer: int
    index: int

    @torch.compiler.disable
    def __call__(self, module: nn.Module, arguments: Any, outputs: tuple[torch.Tensor, ...]) -> Any:
        return tuple(self.balance.seen(self.layer, outputs[self.index], outputs))


class _Pulled(torch.autograd.Function):
    """Tensors unchanged; their backward pass gives `mass`, fp32 [E], the gradient `pull`, once."""

    @staticmethod
    def forward(ctx: Any, mass: torch.Tensor, pull: torch.Tensor, *tensors: torch.Tensor) -> Any:
        ctx.pull = pull
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        return ctx.pull, None, *gradients


def _added(before: torch.Tensor | None, more: torch.Tensor) -> torch.Tensor:
    return more if before is None else before + more
