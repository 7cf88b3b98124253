"""Cross-entropy at trained positions, and the causal LM that computes nothing else.

`token_cross_entropy` takes hidden states, the output projection and targets; it returns sums over tokens,
never means: who divides knows the global number of tokens. `PackedCausalLM` takes the tensors of a
`Batch` and returns the same. Neither pads, shifts labels, or reads a mask: targets come aligned.

The loss is that of supervised fine-tuning in InstructGPT (arXiv 2203.02155): minus the log-likelihood of
the trained tokens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from common.errors import UserError
from common.model import attention
from common.model.adapters import unwrapped
from common.model.architecture import why_not_packed
from common.model.last_layer import WHOLE_LAYER, LastLayer
from common.model.miniature import HALF_TOLERANCE, TOLERANCE, is_exact, miniature_of
from common.model.one_by_one import decoder_of, reason_of, run_one_by_one
from common.notices import notice

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from common.data.types import Batch

log = logging.getLogger("rlhf.models")

CPU_CHUNK_BYTES = 4 << 20
"""fp32 logits of a chunk on the CPU: they stay in the cache between the passes over them."""

GPU_CHUNK_ROWS = 4096
"""Rows of a chunk on a GPU: fewer leave the matrix units idle."""

LOGIT_CHANGES = {
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
    "output_multiplier": 1.0,
}
"""Config fields by which a model changes what its projection gives, and the value that changes nothing."""


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
        return GPU_CHUNK_ROWS
    return max(64, CPU_CHUNK_BYTES // (4 * vocab_size))


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
        """Whether anybody asked."""
        return any(gradient is not None for gradient in self)

    def add(self, part: slice, hidden: torch.Tensor, weight: torch.Tensor, by_logits: torch.Tensor) -> None:
        """Add one chunk. by_logits: fp32 [m, V], the gradient by what the projection gave."""
        low = by_logits.to(hidden.dtype)
        if self.hidden is not None:
            torch.mm(low, weight, out=self.hidden[part])
        if self.weight is not None:
            _add_product(self.weight, low.t(), hidden)
        if self.bias is not None:
            self.bias.add_(by_logits.sum(0))


class _Head(NamedTuple):
    """softmax((hidden @ weight.T + bias) / temperature)"""

    weight: torch.Tensor
    bias: torch.Tensor | None
    temperature: float

    def dtypes(self, hidden: torch.Tensor) -> tuple[torch.dtype | None, ...]:
        """Of the gradients by hidden, weight and bias."""
        return hidden.dtype, self.weight.dtype, None if self.bias is None else self.bias.dtype

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 [m, V], what the softmax is taken of."""
        logits = _product(hidden, self.weight.t())
        if self.bias is not None:
            logits += self.bias
        return logits if self.temperature == 1 else logits.div_(self.temperature)

    def gradient_by_logits(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        grad_losses: torch.Tensor | None,
        grad_entropies: torch.Tensor | None,
    ) -> torch.Tensor:
        """fp32 [m, V], by what the projection gave before the division by the temperature.

        grad_losses, grad_entropies: fp32 [m], how much each token's loss and entropy count. With
        H = −Σ p log p, the entropy's gradient by the softmax's logits is −p (log p + H).
        """
        if grad_entropies is None:
            p = _softmax(self.logits(hidden))
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


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    """In place, of each row."""
    logits.sub_(logits.amax(1, keepdim=True)).exp_()
    return logits.div_(logits.sum(1, keepdim=True))


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
    else:
        total += _product(a, b)


class ScoringHead(nn.Linear):
    """An output projection that scores targets inside its own call.

    Under ZeRO-3 a module's weight is whole only while the module is called, so the loss must be computed
    here. Made from the model's own nn.Linear by changing its class: same parameters, names and hooks.
    """

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


class PackedCausalLM(nn.Module):
    """A transformers causal LM (also one wrapped by peft) that takes packed batches and returns sums.

    Only trained positions reach the output projection. Models that change their logits after the
    projection go through their own forward and plain cross-entropy.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.scores_in_head = scores_in_head(self.base())
        if self.scores_in_head:
            cast(nn.Module, self.base().get_output_embeddings()).__class__ = ScoringHead
        elif changes_logits(self.base()):
            notice(
                "logits of all trained tokens are held at once, not chunk by chunk",
                f"model_type={self.base().config.model_type} changes them after the projection",
                "4 bytes x tokens x vocabulary, several times",
            )
        self.last_layer = last_layer_of(self.base())
        self.shares_prefix = can_share_prefix(self.base())

    def base(self) -> PreTrainedModel:
        """The transformers model, without peft's wrapper; adapters stay active in it."""
        return unwrapped(self.model)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        trained_positions: torch.Tensor,
        targets: torch.Tensor,
        shared_prefix: tuple[int, ...] = (),
        with_entropy: bool = False,
        per_token: bool = False,
        temperature: float = 1.0,
    ) -> TokenLoss:
        """Score the trained positions of one packed sequence. Shapes as in `Batch`.

        per_token: `token_losses` and, with_entropy, `token_entropies` carry the gradient, and loss_sum does
        not. temperature: the distributions are softmax(logits / temperature).
        """
        arguments = packed_arguments(input_ids, position_ids, cu_seqlens, max_seqlen, shared_prefix)
        if not self.scores_in_head:
            with self.last_layer.only(trained_positions):
                logits = self.base()(**arguments, logits_to_keep=trained_positions).logits[0]
            return _plain_cross_entropy(logits, targets, with_entropy, per_token, temperature)
        with self.last_layer.only(trained_positions):
            hidden = decoder_of(self.base())(**arguments).last_hidden_state
        selected = hidden[0].index_select(0, trained_positions)
        return cast(
            TokenLoss,
            self.base().get_output_embeddings()(selected, targets, with_entropy, per_token, temperature),
        )

    def score(self, batch: Batch, with_entropy: bool = False) -> TokenLoss:
        """`forward` with a Batch's fields, for callers without an engine around this module."""
        return cast(TokenLoss, self(**batch_arguments(batch), with_entropy=with_entropy))

    def logits(self, input_ids: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [N, V] of the flat sequence input_ids [1, N]; one document unless cu_seqlens says more."""
        return _logits(self.base(), input_ids, cu_seqlens)


def batch_arguments(batch: Batch) -> dict[str, Any]:
    """The arguments of `PackedCausalLM.forward` for a batch."""
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "cu_seqlens": batch.cu_seqlens,
        "max_seqlen": batch.max_seqlen,
        "trained_positions": batch.trained_positions,
        "targets": batch.targets,
        "shared_prefix": batch.shared_prefix,
    }


def positions_within(cu_seqlens: torch.Tensor, length: int) -> torch.Tensor:
    """int64 [1, N]: the position of each token in its own document, from 0."""
    starts = cu_seqlens[:-1].long().repeat_interleave(cu_seqlens.diff().long())
    return (torch.arange(length, device=cu_seqlens.device) - starts)[None]


def _logits(
    model: PreTrainedModel, input_ids: torch.Tensor, cu_seqlens: torch.Tensor | None = None
) -> torch.Tensor:
    length = input_ids.shape[1]
    whole = torch.tensor([0, length], dtype=torch.int32, device=input_ids.device)
    boundaries = whole if cu_seqlens is None else cu_seqlens
    positions = positions_within(boundaries, length)
    arguments = packed_arguments(input_ids, positions, boundaries, int(boundaries.diff().max()))
    return cast(torch.Tensor, cast(Any, model)(**arguments).logits[0])


def scores_in_head(model: PreTrainedModel) -> bool:
    """Whether the loss can be computed where the output projection is: a plain product, then nothing more."""
    # a subclass (an adapter, a quantized layer) does more than multiply by its weight
    return type(model.get_output_embeddings()) in (nn.Linear, ScoringHead) and not changes_logits(model)


def changes_logits(model: PreTrainedModel) -> bool:
    """Whether the model scales or caps what its output projection gives, by its config or `check_packed`."""
    if getattr(model, "_makes_own_logits", False):
        return True
    config = model.config.get_text_config(decoder=True)
    return any(getattr(config, name, None) not in (None, same) for name, same in LOGIT_CHANGES.items())


def packed_arguments(
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    shared_prefix: tuple[int, ...] = (),
) -> dict[str, Any]:
    """What a transformers model wants to hear about a packed sequence. Shapes as in `Batch`."""
    shared = (
        {"shared_prefix": attention.SharedPrefix(shared_prefix, cu_seqlens)} if any(shared_prefix) else {}
    )
    return {
        **shared,
        "input_ids": input_ids,
        "position_ids": position_ids,
        "attention_mask": None,
        "use_cache": False,
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": max_seqlen,
        "max_length_k": max_seqlen,
    }


def _plain_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, with_entropy: bool, per_token: bool, temperature: float
) -> TokenLoss:
    """From logits [M, V] that the model made itself."""
    scores = logits.float()
    if temperature != 1:
        scores = scores / temperature
    losses = F.cross_entropy(scores, targets, reduction="none")
    entropies = None
    if with_entropy:
        with torch.set_grad_enabled(per_token and torch.is_grad_enabled()):
            logprobs = scores.log_softmax(1)
            entropies = -(logprobs.exp() * logprobs).sum(1)
    with torch.no_grad():
        correct = (scores.argmax(1) == targets).sum() if len(targets) else targets.new_zeros(())
        entropy = scores.new_zeros(()) if entropies is None else entropies.sum()
    if per_token:
        return TokenLoss(losses.detach().sum(), correct, entropy, losses, entropies)
    return TokenLoss(losses.sum(), correct, entropy, losses.detach())


@torch.no_grad()
def check_packed(model: nn.Module) -> None:
    """Run a few tokens and settle how the model's documents are kept apart; see `isolate_documents`.

    Also finds logits that are changed after the projection by what no config says. Raises UserError. Costs
    some forward passes of a miniature; leaves mode, weights and random state as they were.
    """
    with evaluating(unwrapped(model)):
        isolate_documents(unwrapped(model))
        _check_head(unwrapped(model))


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """In evaluation mode; what fails in the model's own code is an error of the user's choice of model."""
    training = model.training
    model.eval()
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise attention.Unsupported(
            model.config.model_type, f"a forward pass that fails ({type(error).__name__}: {error})"
        ) from error
    finally:
        model.train(training)


@torch.no_grad()
def can_share_prefix(model: PreTrainedModel) -> bool:
    """Whether a document may begin in one before it (`attention.SharedPrefix`): a model must hand its
    attention what it is called with. Asked of a miniature by running a few tokens.

    model: a transformers model with packed attention, without peft's wrapper.
    """
    if reason_of(model):
        return False
    small = miniature_of(model)
    with evaluating(small):
        ids = some_tokens(small, 12)
        ids[:, 6:9] = ids[:, :3]  # the second document is 3 tokens of the first and 3 of its own
        apart = _run_decoder(small, ids, [0, 6, 12], ())
        together = _run_decoder(small, torch.cat([ids[:, :6], ids[:, 9:]], 1), [0, 6, 9], (0, 3))
        shares = not differ(apart[9:], together[6:], small.dtype)
    if not shares:
        notice(
            "a prompt is computed again for each of its responses",
            f"model_type={model.config.model_type} does not tell its attention which tokens they share",
        )
    return shares


def last_layer_of(model: PreTrainedModel) -> LastLayer:
    """The model's last layer, told to compute everything where a few tokens show that it must.

    model: a transformers model with packed attention, without peft's wrapper; its mode is left as it was.
    """
    last = LastLayer(model)
    if last.works and not _last_layer_can_be_partial(miniature_of(model)):
        notice(
            "the last layer is computed at all positions",
            f"the feed-forward networks of model_type={model.config.model_type} cannot be run at some",
            WHOLE_LAYER,
        )
        last.give_up()
    elif not last.found and reason_of(model) is None:
        notice(
            "the last layer is computed at all positions",
            f"the feed-forward network of model_type={model.config.model_type} is not found",
            WHOLE_LAYER,
        )
    return last


@torch.no_grad()
def _last_layer_can_be_partial(small: PreTrainedModel) -> bool:
    last, training = LastLayer(small), small.training
    small.eval()
    try:
        ids, rows = some_tokens(small, 12), [2, 3, 5, 11]
        whole = _run_decoder(small, ids, [0, 6, 12], ())
        with last.only(torch.tensor(rows, device=ids.device)):
            part = _run_decoder(small, ids, [0, 6, 12], ())
        return not differ(whole[rows], part[rows], small.dtype)
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError):
        return False  # called with something else than hidden states, or returns more
    finally:
        last.give_up()
        small.train(training)


def _run_decoder(
    model: PreTrainedModel, ids: torch.Tensor, cu_seqlens: list[int], shared_prefix: tuple[int, ...]
) -> torch.Tensor:
    """fp32 [N, h], hidden states of documents which begin at `cu_seqlens`."""
    boundaries = torch.tensor(cu_seqlens, dtype=torch.int32, device=ids.device)
    positions = positions_within(boundaries, ids.shape[1])
    for start, end, shared in zip(cu_seqlens, cu_seqlens[1:], shared_prefix, strict=False):
        positions[:, start:end] += shared
    arguments = packed_arguments(ids, positions, boundaries, int(boundaries.diff().max()), shared_prefix)
    return decoder_of(model)(**arguments).last_hidden_state[0].float()


@torch.no_grad()
def isolate_documents(base: PreTrainedModel) -> None:
    """Settle how documents are kept apart: packed where that is exact, else one by one, else UserError.

    base: in evaluation mode, without peft's wrapper, loaded with packed attention or its own.
    """
    kind = base.config.model_type
    reason = why_not_packed(type(base), base.config)
    if reason is None:
        try:
            reason = _crossing(miniature_of(base))
        except attention.Unsupported as error:
            reason = error.what
        except attention.NoBoundaries:
            reason = "layers that are not told where documents begin"
        except (AttributeError, TypeError, ValueError, IndexError, KeyError, RuntimeError) as error:
            reason = f"a pass over packed documents that fails ({type(error).__name__}: {error})"
    if reason is None:
        return
    if base.config._attn_implementation == attention.NAME:
        base.set_attn_implementation(attention.plain_name(base))
    run_one_by_one(base, reason)
    fault = _crossing(miniature_of(base))
    if fault is not None:
        raise attention.Unsupported(kind, fault)
    notice("documents run one by one, not packed", f"model_type={kind} has {reason}", "exact, and slower")


def _crossing(base: PreTrainedModel) -> str | None:
    """What joins tokens that must not know of each other; None: nothing.

    Document B after A, after another A, and alone under transformers' own attention: always the same.
    """
    ids, bounds = some_tokens(base, 11), [0, 6, 11]
    other = ids.clone()
    other[:, :6] = ids[:, :6].flip(1)
    later = ids.clone()
    later[:, 7:] = ids[:, :4]
    b = _run_decoder(base, ids, bounds, ())[6:]
    if differ(b, _run_decoder(base, other, bounds, ())[6:], base.dtype):
        return "state that crosses documents"
    if differ(b[:1], _run_decoder(base, later, bounds, ())[6:7], base.dtype):
        return "attention to later tokens"
    with attention.plain_attention(base):
        alone = decoder_of(base)(input_ids=ids[:, 6:], use_cache=False).last_hidden_state[0].float()
    return "an attention with arguments of its own" if differ(b, alone, base.dtype) else None


def _check_head(model: PreTrainedModel) -> None:
    """Where the head's product is not the model's logits, the model makes its logits itself from now on."""
    if not scores_in_head(model):
        return
    small = miniature_of(model)
    ids = some_tokens(small, 4)
    hidden = _run_decoder(small, ids, [0, 4], ())
    projected = small.get_output_embeddings()(hidden.to(small.dtype)).float()
    own = _logits(small, ids).float()
    if own.shape != projected.shape or differ(projected, own, small.dtype):
        model._makes_own_logits = True  # type: ignore[assignment]
        log.info("model_type=%s changes its logits after the projection", model.config.model_type)


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
