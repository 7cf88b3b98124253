"""AdamW whose two moments are kept in bf16, rounded stochastically: 4 bytes of each weight instead of 8.

The update is that of `torch.optim.AdamW` (arXiv 1711.05101), in fp32, with the moments as they are before
they are rounded; weights are not rounded. A moment that changes by less than half of bf16's last place (2^-9
of its size) would never change if it were rounded to nearest, as the second with `betas[1]=0.999`; up or down
at random, with the right mean, it follows its fp32 twin (stochastic rounding: arXiv 2010.06192).

The random bits of an element are a hash of seed, applied step, parameter and place in the parameter. They do
not depend on how elements are divided over ranks, and a resumed run draws what it would have drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from common.training.reshard import Piece

MOMENTS = ("exp_avg", "exp_avg_sq")
CHUNK = {"cpu": 2**16, "cuda": 2**22}
"""Elements that are updated at once: of them alone are there fp32 copies. On the CPU its cache holds them."""


class AdamWBf16(torch.optim.Optimizer):
    """AdamW with moments in bf16, for flat or whole parameters in fp32."""

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float], eps: float, seed: int
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._seed = seed
        self._pieces: dict[torch.Tensor, Sequence[Piece]] = {}
        self._places: dict[torch.device, torch.Tensor] = {}

    def place(self, pieces: Mapping[torch.Tensor, Sequence[Piece]]) -> None:
        """Say which stretches of which parameters each flat tensor holds; elsewhere are zeros without
        gradients. A tensor that is not named here is a parameter of its own."""
        self._pieces = dict(pieces)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient. closure: not taken."""
        if closure is not None:
            raise ValueError("the gradient is there already")
        for number, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, f"group {number}")

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As every optimizer, but the moments stay in bf16: torch gives them the parameter's dtype."""
        super().load_state_dict(dict(state_dict))
        for state in self.state.values():
            for key in MOMENTS:
                state[key] = state[key].bfloat16()

    def _update(self, parameter: torch.Tensor, group: Mapping[str, Any], name: str) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            for key in MOMENTS:
                state[key] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        state["step"] += 1
        assert parameter.grad is not None
        weights, gradient = parameter.view(-1), parameter.grad.view(-1)
        first, second = (state[key].view(-1) for key in MOMENTS)
        for begin, end, noise in self._stretches(parameter, state["step"], name):
            here = slice(begin, end)
            _update(weights[here], gradient[here], first[here], second[here], noise, state["step"], group)

    def _stretches(
        self, parameter: torch.Tensor, step: int, name: str
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Begin and end in the flat tensor, and 32 random bits for each element between."""
        device = parameter.device
        wanted = min(CHUNK.get(device.type, CHUNK["cuda"]), parameter.numel())
        places = self._places.get(device)
        if places is None or len(places) < wanted:  # ZeRO-3 shows one tensor at a time, also small ones
            places = self._places[device] = torch.arange(wanted, dtype=torch.int32, device=device)
        for piece in self._pieces.get(parameter) or ((name, 0, 0, parameter.numel()),):
            of, first, offset, length = piece
            key = hashlib.blake2b(f"{self._seed} {step} {of}".encode(), digest_size=8).digest()
            for begin in range(0, length, len(places)):
                count = min(len(places), length - begin)
                where = offset + begin
                yield where, where + count, _bits(places[:count], first + begin, key)


def _update(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    noise: torch.Tensor,
    step: int,
    group: Mapping[str, Any],
) -> None:
    """AdamW in fp32, [n] each, in place. noise: int32 [n]."""
    (beta1, beta2), lr, gradient = group["betas"], group["lr"], gradient.float()
    mean = first.float().lerp_(gradient, 1 - beta1)
    square = second.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    first.copy_(rounded(mean, noise & 0xFFFF))
    second.copy_(rounded(square, (noise >> 16) & 0xFFFF))
    denominator = square.sqrt_().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    if group["weight_decay"]:
        weights.mul_(1 - lr * group["weight_decay"])
    weights.addcdiv_(mean, denominator, value=-lr / (1 - beta1**step))


def rounded(values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """fp32 [n] to bf16: away from zero with a probability of the part that bf16 cannot hold.

    noise: int32 [n], evenly from 0 to 65,535. What bf16 holds stays as it is.
    """
    return (values.view(torch.int32) + noise).bitwise_and_(-65_536).view(torch.float32).bfloat16()


def _bits(places: torch.Tensor, begin: int, key: bytes) -> torch.Tensor:
    """int32 [n]: a hash of each place from `begin` on, and of the key.

    Twice, since once would give keys that differ in few bits the same numbers in another order.
    """
    low, high = _signed(key[:4]), _signed(key[4:])
    return _mixed(_mixed((places + _signed(begin.to_bytes(8, "little")[:4])) ^ low) ^ high)


def _mixed(bits: torch.Tensor) -> torch.Tensor:
    """One to one on 32 bits, with wrapping products and shifts that bring in zeros (lowbias32, from
    https://github.com/skeeto/hash-prospector)."""
    bits = bits ^ ((bits >> 16) & 0xFFFF)
    bits.mul_(0x7FEB352D)
    bits ^= (bits >> 15) & 0x1FFFF
    bits.mul_(0x846CA68B - 2**32)
    bits ^= (bits >> 16) & 0xFFFF
    return bits


def _signed(four: bytes) -> int:
    return int.from_bytes(four, "little", signed=True)
