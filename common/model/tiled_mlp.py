"""Feed-forward networks computed tile by tile over the tokens of a pass, where layers are recomputed.

A feed-forward network acts on each token alone, and what lies between its matrices is several times as wide
as a layer's input: over a long row it is most of what a recomputed layer holds. In tiles, its backward pass
computes `TILE` tokens forward and at once backward, so that this width is held of one tile. Results and
gradients are those of the whole; the gradient of a weight is the sum over tiles, in fp32. The network runs
forward twice, as in any recomputed layer, and once more where a norm follows it. The idea is ALST's (arXiv
2506.13996); under ZeRO-3 a network's weights are gathered once, not once per tile.

Takes a transformers model before adapters are added. Says nothing of who recomputes layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from common.errors import UserError
from common.model.miniature import differ, miniature_of
from common.model.one_by_one import decoder_of, reason_of
from common.notices import notice

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TILE = 8192
"""Tokens of a tile, at most; passes of no more tokens are computed whole. Every tile adds to the whole
gradient of the weights: with few tokens that takes as long as the products."""

NOT_TILED = "feed-forward networks are computed over all tokens at once"
COST = "a recomputed layer holds their width of every token"

Draws = tuple[torch.Tensor, list[int], list[torch.Tensor]]
"""States of the generators, of the host and of devices."""


def tile_feed_forward(network: PreTrainedModel, *, insisted: bool) -> None:
    """From now on. A notice says which networks are not tiled: where that is insisted on at once, else in the
    first pass of more tokens than a tile. UserError where none can be and that is insisted on."""
    layers = list(getattr(decoder_of(network), "layers", ()))
    per_token = _kinds_per_token(network)
    tiled = [layer.mlp for layer in layers if type(getattr(layer, "mlp", None)) in per_token]
    for module in tiled:
        module.forward = _Tiles(module)
        module.register_forward_pre_hook(_with_gradient)
    whole = [layer for layer in layers if not is_tiled(getattr(layer, "mlp", layer))]
    others = f"{len(whole)} of {len(layers)} layers of model_type={network.config.model_type}"
    if not tiled and insisted:
        raise UserError(
            f"model.tiled_mlp=true: {others} have experts, or mix tokens, and cannot be tiled",
            hint="model.tiled_mlp=null",
        )
    why = f"{others} have experts, or mix tokens"
    if whole and insisted:
        notice(NOT_TILED, why, COST)
    elif whole:
        _say_in_a_long_pass(whole[0], why)


def _say_in_a_long_pass(layer: nn.Module, why: str) -> None:
    """Once. How long passes are is decided by rows, their length and their number, and by ranks that share
    them: the layer sees it."""

    def look(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden = arguments[0] if arguments else named["hidden_states"]
        if torch.is_grad_enabled() and hidden.shape[-2] > TILE:
            handle.remove()
            notice(NOT_TILED, why, COST)

    handle = layer.register_forward_pre_hook(look, with_kwargs=True)


def is_tiled(module: nn.Module) -> bool:
    """Whether the module is a feed-forward network that `tile_feed_forward` found."""
    return isinstance(module.__dict__.get("forward"), _Tiles)


class _Tiles:
    """The forward pass of a feed-forward network, by tiles where the pass has more tokens than one."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._whole = module, module.forward

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., N, h] -> [..., N, h]."""
        if hidden.shape[-2] <= TILE:
            return self._whole(hidden)
        weights = [weight for weight in self._module.parameters() if weight.requires_grad]
        if not torch.is_grad_enabled() or not (weights or hidden.requires_grad):
            return _by_tiles(self._whole, hidden)
        kept = _Kept.apply(hidden)
        draws = _draws_of(hidden) if _draws_numbers(self._module) else None
        tiled: torch.Tensor = _Tiled.apply(kept, self._whole, kept.grad_fn, draws, *weights)
        return tiled


class _Kept(torch.autograd.Function):
    """What the backward pass of `_Tiled` asks for. It is saved before the network is computed, so that a
    layer that is run again stops here: what comes behind saves nothing."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden)
        return hidden.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class _Tiled(torch.autograd.Function):
    """A network over tiles; each is computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        run: Callable[..., torch.Tensor],
        kept: Any,
        draws: Draws | None,
        *weights: nn.Parameter,
    ) -> torch.Tensor:
        ctx.run, ctx.kept, ctx.draws, ctx.weights = run, kept, draws, weights
        return _by_tiles(run, hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (hidden,) = ctx.kept.saved_tensors
        by_hidden = torch.empty_like(hidden)
        sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in ctx.weights]
        with _drawing_again(ctx.draws):
            for part in _tiles(hidden.shape[-2]):
                tile = hidden.narrow(-2, *part).detach().requires_grad_()
                with torch.enable_grad():
                    out = ctx.run(tile)
                found = torch.autograd.grad(
                    out, [tile, *ctx.weights], gradient.narrow(-2, *part), allow_unused=True
                )
                by_hidden.narrow(-2, *part).copy_(found[0])
                _add(sums, found[1:])
                del out, found  # before the next tile has its own
        rounded = []
        for weight in reversed(ctx.weights):
            rounded.append(sums.pop().to(weight.dtype))
        return by_hidden, None, None, None, *reversed(rounded)


def _add(sums: list[torch.Tensor], gradients: tuple[torch.Tensor | None, ...]) -> None:
    for total, gradient in zip(sums, gradients, strict=True):
        if gradient is not None:  # no token reaches the weight
            total += gradient


def _by_tiles(run: Callable[..., torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(hidden)
    with torch.no_grad():
        for part in _tiles(hidden.shape[-2]):
            out.narrow(-2, *part).copy_(run(hidden.narrow(-2, *part)))
    return out


def _tiles(tokens: int) -> Iterator[tuple[int, int]]:
    """(first token, tokens) of each; they differ by one token at most."""
    count = -(-tokens // TILE)
    bounds = [tokens * number // count for number in range(count + 1)]
    return ((begin, end - begin) for begin, end in zip(bounds, bounds[1:], strict=False))


def _with_gradient(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """DeepSpeed takes the gradient by its input as the sign that a module's gradients are there. Below the
    first adapters there is none."""
    hidden, *rest = arguments
    wanted = torch.is_grad_enabled() and any(weight.requires_grad for weight in module.parameters())
    if not wanted or hidden.requires_grad or hidden.shape[-2] <= TILE:
        return None
    return (hidden.detach().requires_grad_(), *rest)


def _draws_numbers(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Dropout) and part.p > 0 and part.training for part in module.modules())


def _draws_of(hidden: torch.Tensor) -> Draws:
    return torch.get_rng_state(), *get_device_states(hidden)


@contextmanager
def _drawing_again(draws: Draws | None) -> Iterator[None]:
    """While the block runs, random numbers are those that were drawn from these states on."""
    if draws is None:
        yield
        return
    host, devices, states = draws
    with torch.random.fork_rng(devices=devices):
        torch.set_rng_state(host)
        set_device_states(devices, states)
        yield


def _kinds_per_token(network: PreTrainedModel) -> set[type[nn.Module]]:
    """Classes of feed-forward networks that take hidden states alone, and compute each token for itself."""
    if reason_of(network) is not None:
        return set()
    small = miniature_of(network)
    layers = getattr(decoder_of(small), "layers", ())
    found = {
        type(layer.mlp): layer.mlp for layer in layers if isinstance(getattr(layer, "mlp", None), nn.Module)
    }
    return {
        kind for kind, module in found.items() if not _has_experts(module) and _acts_per_token(module, small)
    }


def _has_experts(module: nn.Module) -> bool:
    """Whether some tokens go through other weights than others do."""
    return any(isinstance(part, nn.ModuleList) for part in module.modules()) or any(
        weight.dim() > 2 for weight in module.parameters()
    )


@torch.no_grad()
def _acts_per_token(module: nn.Module, small: PreTrainedModel) -> bool:
    if len(inspect.signature(module.forward).parameters) != 1:
        return False
    width = small.config.get_text_config(decoder=True).hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        hidden = torch.randn(1, 6, width, dtype=torch.float32).to(small.device, small.dtype)
    training = module.training
    try:
        module.eval()
        whole, parts = module(hidden), torch.cat([module(part) for part in hidden.split(2, 1)], 1)
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError):
        return False  # returns more than hidden states, or is called with more
    finally:
        module.train(training)
    return whole.shape == hidden.shape and not differ(whole[0].float(), parts[0].float(), small.dtype)
