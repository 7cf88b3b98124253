"""Cross-entropy at trained positions, fused with the output projection: the logits never exist whole.

`token_cross_entropy` takes hidden states, the output projection and targets; it returns sums over tokens,
never means: who divides knows the global number of tokens. `ScoringHead` calls it inside a model's own
projection. Neither shifts labels nor reads a mask: targets come aligned.

The loss is that of supervised fine-tuning in InstructGPT (arXiv 2203.02155): minus the log-likelihood of
the trained tokens. On a GPU a chunk of logits is scored by the kernel of `loss_kernel`; elsewhere by torch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from common.model import loss_kernel

CPU_CHUNK_BYTES = 4 << 20
"""fp32 logits of a chunk on the CPU, unless `CPU_CHUNK_ROWS` are more: a cache's size."""

CPU_CHUNK_ROWS = 256
"""Rows that a chunk on the CPU has at least. Each chunk is added to the whole gradient of the weight: with
few rows that takes as long as the products."""

GPU_CHUNK_BYTES, GPU_CHUNK_ROWS = 1 << 30, 4096
"""fp32 logits of a chunk on a GPU, and its rows, at most. Few rows leave the matrix units idle, and every
chunk adds to the whole gradient of the weight."""


class TokenLoss(NamedTuple):
    """Sums over the M trained tokens of a micro-batch.

    loss_sum: fp32 scalar, minus the log-likelihood in nats; carries the gradient. correct: int64 scalar,
    tokens whose target has the largest logit. entropy_sum: fp32 scalar in nats, of the predicted
    distributions (0 when not asked for). token_losses: fp32 [M], what loss_sum sums. token_entropies: fp32
    [M], what entropy_sum sums, when asked for per token with entropy. Only loss_sum carries the gradient or,
    when asked for per token, token_losses and token_entropies do.
    """

    loss_sum: torch.Tensor
    correct: torch.Tensor
    entropy_sum: torch.Tensor
    token_losses: torch.Tensor
    token_entropies: torch.Tensor | None = None


def chunk_rows_for(device: torch.device, vocab_size: int) -> int:
    """Rows of logits made at once."""
    if device.type != "cpu":
        return min(GPU_CHUNK_ROWS, max(1, GPU_CHUNK_BYTES // (4 * vocab_size * 256)) * 256)
    return max(CPU_CHUNK_ROWS, CPU_CHUNK_BYTES // (4 * vocab_size))


def token_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    chunk_rows: int | None = None,
    *,
    bias: torch.Tensor | None = None,
    with_entropy: bool = False,
    per_token: bool = False,
    temperature: float = 1.0,
) -> TokenLoss:
    """Cross-entropy of softmax((hidden @ weight.T + bias) / temperature) with targets, summed.

    hidden [M, h]; weight [V, h]; targets int64 [M]; bias [V]. The logits never exist whole: they are made
    `chunk_rows` rows at a time, and gradients along with them, so that the backward pass is a multiplication.
    Log-probabilities, their division by the temperature and the sum of the weight's gradient are fp32 for
    every dtype. M = 0 gives a zero that still carries (zero) gradients. Backward works once; no second
    derivative.

    per_token: `token_losses` (and, with_entropy, `token_entropies`) carry the gradient instead of loss_sum,
    for losses that weigh answers by what they were found to be. How much each token weighs is then known in
    the backward pass only, and the logits are made again there.
    """
    rows = chunk_rows or chunk_rows_for(hidden.device, weight.shape[0])
    if per_token:
        losses, entropies, correct, entropy = _TokenLosses.apply(
            hidden, weight, bias, targets, temperature, rows, with_entropy
        )
        return TokenLoss(losses.detach().sum(), correct, entropy, losses, entropies)
    # inside forward autograd is always off, so whether gradients are wanted at all is asked here
    sums = _TokenCrossEntropy.apply(
        hidden, weight, bias, targets, temperature, rows, with_entropy, torch.is_grad_enabled()
    )
    return TokenLoss(*sums)


class _TokenCrossEntropy(torch.autograd.Function):
    """Gradients are computed in forward, while a chunk's logits are at hand, and kept for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        rows: int,
        with_entropy: bool,
        grad_enabled: bool,
    ) -> tuple[torch.Tensor, ...]:
        wanted = tuple(grad_enabled and needed for needed in ctx.needs_input_grad[:3])
        gradients = _Gradients.zeros(hidden, weight, bias, wanted)
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        head = _Head(weight, bias, temperature)
        correct, entropy = _score(hidden, head, targets, rows, with_entropy, losses, gradients=gradients)
        ctx.gradients = gradients
        ctx.dtypes, ctx.temperature = head.dtypes(hidden), temperature
        ctx.mark_non_differentiable(correct, entropy, losses)
        return losses.sum(), correct, entropy, losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the backward pass of token_cross_entropy works once; run forward again")
        gradients, ctx.gradients = ctx.gradients, None  # freed as they are handed on
        scaled = [
            # in fp32: a loss scale of 65,536 does not exist in fp16
            None if gradient is None else gradient.float().mul_(grad_loss / ctx.temperature).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None, None)


class _TokenLosses(torch.autograd.Function):
    """Each token's loss and entropy; the backward pass makes the logits again, a chunk at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        rows: int,
        with_entropy: bool,
    ) -> tuple[torch.Tensor | None, ...]:
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        entropies = torch.empty_like(losses) if with_entropy else None
        head = _Head(weight, bias, temperature)
        correct, entropy = _score(hidden, head, targets, rows, with_entropy, losses, entropies)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.rows, ctx.temperature = rows, temperature
        ctx.mark_non_differentiable(correct, entropy)
        ctx.set_materialize_grads(False)  # what the caller's loss does not read costs nothing
        return losses, entropies, correct, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_losses: torch.Tensor | None, grad_entropies: torch.Tensor | None, *_: Any
    ) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        head = _Head(weight, bias, ctx.temperature)
        gradients = _Gradients.zeros(hidden, weight, bias, ctx.needs_input_grad[:3])
        for start in range(0, len(targets), ctx.rows):
            part = slice(start, start + ctx.rows)
            by_logits = head.gradient_by_logits(
                hidden[part],
                targets[part],
                None if grad_losses is None else grad_losses[part],
                None if grad_entropies is None else grad_entropies[part],
            )
            gradients.add(part, hidden[part], weight, by_logits)
            del by_logits  # before the next chunk's is made
        found = [
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(gradients, head.dtypes(hidden), strict=True)
        ]
        return (*found, None, None, None, None)


def _score(
    hidden: torch.Tensor,
    head: _Head,
    targets: torch.Tensor,
    rows: int,
    with_entropy: bool,
    losses: torch.Tensor,
    entropies: torch.Tensor | None = None,
    gradients: _Gradients | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens whose target has the largest logit, and the sum of entropies; chunk by chunk.

    Writes into losses and entropies, fp32 [M]; adds the loss sum's gradients, before the division by the
    temperature, to `gradients`.
    """
    if loss_kernel.is_used(hidden):
        return _score_by_kernel(hidden, head, targets, rows, with_entropy, losses, entropies, gradients)
    correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
    entropy = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(targets), rows):
        part = slice(start, start + rows)
        chunk = _score_chunk(head.logits(hidden[part]), targets[part], with_entropy)
        losses[part] = chunk.losses
        correct += chunk.correct
        if chunk.entropies is not None:
            entropy += chunk.entropies.sum()
            if entropies is not None:
                entropies[part] = chunk.entropies
        if gradients is not None and gradients.wanted:
            _subtract_targets(chunk.probabilities, targets[part])
            gradients.add(part, hidden[part], head.weight, chunk.probabilities)
    return correct, entropy


def _score_by_kernel(
    hidden: torch.Tensor,
    head: _Head,
    targets: torch.Tensor,
    rows: int,
    with_entropy: bool,
    losses: torch.Tensor,
    entropies: torch.Tensor | None,
    gradients: _Gradients | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_score`, in two passes over a chunk's logits."""
    correct = torch.empty(len(targets), dtype=torch.int32, device=hidden.device)
    if with_entropy and entropies is None:
        entropies = torch.empty_like(losses)
    wants_gradient = gradients is not None and gradients.wanted
    for start in range(0, len(targets), rows):
        part = slice(start, start + rows)
        logits = head.products(hidden[part])
        by_logits = torch.empty_like(logits, dtype=hidden.dtype) if wants_gradient else None
        loss_kernel.score_rows(
            logits,
            head.bias,
            targets[part],
            head.temperature,
            losses=losses[part],
            entropies=None if entropies is None else entropies[part],
            correct=correct[part],
            gradient=by_logits,
        )
        del logits  # as large as the rest of a chunk
        if gradients is not None and by_logits is not None:
            gradients.add(part, hidden[part], head.weight, by_logits)
        del by_logits
    return correct.sum(), losses.new_zeros(()) if entropies is None else entropies.sum()


class _Gradients(NamedTuple):
    """None where nobody asked. The weight's and the bias's are summed in fp32."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    @staticmethod
    def zeros(
        hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wanted: tuple[bool, ...]
    ) -> _Gradients:
        return _Gradients(
            torch.empty_like(hidden) if wanted[0] else None,
            torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None,
            torch.zeros_like(bias, dtype=torch.float32) if wanted[2] and bias is not None else None,
        )

    @property
    def wanted(self) -> bool:
        return any(gradient is not None for gradient in self)

    def add(self, part: slice, hidden: torch.Tensor, weight: torch.Tensor, by_logits: torch.Tensor) -> None:
        """Add one chunk. by_logits: [m, V], fp32 or rounded, the gradient by what the projection gave."""
        low = by_logits.to(hidden.dtype)
        if self.hidden is not None:
            torch.mm(low, weight, out=self.hidden[part])
        if self.weight is not None:
            _add_product(self.weight, low.t(), hidden)
        if self.bias is not None:
            self.bias.add_(by_logits.sum(0, dtype=torch.float32))


class _Head(NamedTuple):
    """softmax((hidden @ weight.T + bias) / temperature)"""

    weight: torch.Tensor
    bias: torch.Tensor | None
    temperature: float

    def dtypes(self, hidden: torch.Tensor) -> tuple[torch.dtype | None, ...]:
        return hidden.dtype, self.weight.dtype, None if self.bias is None else self.bias.dtype

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 [m, V], what the softmax is taken of."""
        logits = self.products(hidden)
        if self.bias is not None:
            logits += self.bias
        return logits if self.temperature == 1 else logits.div_(self.temperature)

    def products(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 [m, V], before bias and temperature."""
        return _product(hidden, self.weight.t())

    def gradient_by_logits(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        grad_losses: torch.Tensor | None,
        grad_entropies: torch.Tensor | None,
    ) -> torch.Tensor:
        """[m, V], fp32 or rounded, by what the projection gave before the division by the temperature.

        grad_losses, grad_entropies: fp32 [m], how much each token's loss and entropy count. With
        H = −Σ p log p, the entropy's gradient by the softmax's logits is −p (log p + H).
        """
        if loss_kernel.is_used(hidden):
            return self._gradient_by_kernel(hidden, targets, grad_losses, grad_entropies)
        if grad_entropies is None:
            p = self.logits(hidden)
            p.sub_(p.amax(1, keepdim=True)).exp_()
            p.div_(p.sum(1, keepdim=True))
            if grad_losses is None:
                return p.zero_()
            _subtract_targets(p, targets)
            return p.mul_((grad_losses / self.temperature)[:, None])
        logp = self.logits(hidden).log_softmax(1)
        p = logp.exp()
        entropies = -(p * logp).sum(1)
        by_loss = torch.zeros_like(entropies) if grad_losses is None else grad_losses
        by_logits = p.mul_(by_loss[:, None] - grad_entropies[:, None] * logp.add_(entropies[:, None]))
        by_logits[torch.arange(len(targets), device=p.device), targets] -= by_loss
        return by_logits.div_(self.temperature)

    def _gradient_by_kernel(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        grad_losses: torch.Tensor | None,
        grad_entropies: torch.Tensor | None,
    ) -> torch.Tensor:
        logits = self.products(hidden)
        by_logits = torch.empty_like(logits, dtype=hidden.dtype)
        by_loss, by_entropy = (
            None if counts is None else counts / self.temperature for counts in (grad_losses, grad_entropies)
        )
        if by_loss is None and by_entropy is None:
            return by_logits.zero_()
        loss_kernel.score_rows(
            logits,
            self.bias,
            targets,
            self.temperature,
            gradient=by_logits,
            by_loss=by_loss,
            by_entropy=by_entropy,
        )
        return by_logits


class _Chunk(NamedTuple):
    losses: torch.Tensor  # fp32 [m]
    correct: torch.Tensor  # int64 scalar
    entropies: torch.Tensor | None  # fp32 [m]
    probabilities: torch.Tensor  # fp32 [m, V]


def _score_chunk(logits: torch.Tensor, targets: torch.Tensor, with_entropy: bool) -> _Chunk:
    """logits: fp32 [m, V], overwritten: it is the only such tensor, everything below works in place."""
    of_target = logits.gather(1, targets[:, None]).squeeze(1)
    largest, predicted = logits.max(1)
    correct = (predicted == targets).sum()
    shifted = logits.clone().sub_(largest[:, None]) if with_entropy else None
    p = logits.sub_(largest[:, None]).exp_()
    total = p.sum(1)
    p.div_(total[:, None])
    log_total = total.log()
    # H = log Z - E[z], both relative to the largest logit
    entropies = None if shifted is None else log_total - shifted.mul_(p).sum(1)
    return _Chunk(log_total - (of_target - largest), correct, entropies, p)


def _subtract_targets(p: torch.Tensor, targets: torch.Tensor) -> None:
    """From probabilities to the gradient of each row's loss by its logits, in place."""
    p[torch.arange(len(targets), device=p.device), targets] -= 1


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in fp32. On CUDA the matrix units accumulate in fp32 anyway and need not round to a's dtype."""
    if a.dtype is torch.float32:
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).float()


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, with total in fp32."""
    if a.dtype is torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda:  # as large as the weight: nothing is made beside it
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += _product(a, b)


class ScoringHead(nn.Linear):
    """An output projection that scores targets inside its own call, where ZeRO-3 has its weight whole."""

    def forward(  # type: ignore[override]
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor | None = None,
        with_entropy: bool = False,
        per_token: bool = False,
        temperature: float = 1.0,
    ) -> torch.Tensor | TokenLoss:
        if targets is None:
            return super().forward(hidden)
        return token_cross_entropy(
            hidden,
            self.weight,
            targets,
            bias=self.bias,
            with_entropy=with_entropy,
            per_token=per_token,
            temperature=temperature,
        )
