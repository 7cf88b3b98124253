"""The loss head's Triton kernel: its numbers by Triton's interpreter, and its code for an H100.

It has not run on a GPU. The interpreter computes what each program of the kernel does, on the CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from common.model import fused_loss, loss_kernel
from common.model.fused_loss import token_cross_entropy
from tests.common.model.test_fused_loss import plain_scores

pytest.importorskip("triton", reason="triton is not installed")
aten, score_chunk = torch.ops.aten, fused_loss._score_chunk

SMALL_BLOCK = 32
"""Logits of a block: fewer than the vocabularies here, so that a row has several and a broken last one."""


@pytest.fixture(autouse=True)
def by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every head here goes through the kernel, and the kernel through the interpreter."""
    monkeypatch.setattr(loss_kernel, "BLOCK", SMALL_BLOCK)
    monkeypatch.setattr(loss_kernel, "is_used", lambda hidden: True)
    monkeypatch.setattr(fused_loss, "_score_chunk", None)  # nothing goes the other way


@pytest.mark.parametrize(
    ("vocabulary", "temperature", "with_bias", "chunk_rows"),
    [(5, 1.0, False, 64), (64, 0.6, False, 3), (50, 0.6, True, 3), (50, 1.0, True, 64)],
)
def test_the_summed_loss_is_that_of_fp64(
    vocabulary: int, temperature: float, with_bias: bool, chunk_rows: int
) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(5, 8), torch.randn(vocabulary, 8)] + [torch.randn(vocabulary)] * with_bias
    targets = torch.randint(0, vocabulary, (5,))
    exact = [x.double().requires_grad_() for x in inputs]
    logits = F.linear(*exact) / temperature
    targets[0] = logits[0].argmax()
    ours = [x.clone().requires_grad_() for x in inputs]
    found = token_cross_entropy(
        ours[0], ours[1], targets, chunk_rows,
        bias=ours[2] if with_bias else None, with_entropy=True, temperature=temperature,
    )  # fmt: skip
    losses, entropies = plain_scores(F.linear(*exact), targets, temperature)
    torch.testing.assert_close(found.token_losses.double(), losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.entropy_sum.double(), entropies.sum(), rtol=1e-5, atol=1e-6)
    assert found.correct.dtype is torch.int64
    assert 0 < found.correct == (logits.argmax(1) == targets).sum() < 5
    got = torch.autograd.grad(found.loss_sum * 0.25, ours)
    for one, other in zip(got, torch.autograd.grad(losses.sum() * 0.25, exact), strict=True):
        assert other.abs().max() > 0.05
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("read", ["losses", "entropies", "both"])
@pytest.mark.parametrize(("temperature", "with_bias"), [(1.0, False), (0.6, True)])
def test_losses_and_entropies_of_tokens_have_the_gradients_of_fp64(
    read: str, temperature: float, with_bias: bool
) -> None:
    torch.manual_seed(1)
    inputs = [torch.randn(5, 8), torch.randn(50, 8)] + [torch.randn(50)] * with_bias
    targets, of_losses, of_entropies = torch.randint(0, 50, (5,)), torch.randn(5), torch.randn(5)
    counts = {"losses": (1.0, 0.0), "entropies": (0.0, 1.0), "both": (1.0, 1.0)}[read]
    ours, exact = ([x.clone().to(kind).requires_grad_() for x in inputs] for kind in (None, torch.float64))
    found = token_cross_entropy(
        ours[0], ours[1], targets, 3,
        bias=ours[2] if with_bias else None, with_entropy=True, per_token=True, temperature=temperature,
    )  # fmt: skip
    assert found.token_entropies is not None
    parts = [(found.token_losses * of_losses).sum(), (found.token_entropies * of_entropies).sum()]
    losses, entropies = plain_scores(F.linear(*exact), targets, temperature)
    torch.testing.assert_close(found.token_losses.double(), losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.token_entropies.double(), entropies, rtol=1e-5, atol=1e-6)
    plain = [(losses * of_losses).sum(), (entropies * of_entropies).sum()]
    # what counts 0 is not part of the graph: the kernel is then called without it
    got, wanted = (
        torch.autograd.grad(sum(part for part, count in zip(each, counts, strict=True) if count), leaves)
        for each, leaves in ((parts, ours), (plain, exact))
    )
    for one, other in zip(got, wanted, strict=True):
        assert other.abs().max() > 0.05
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("per_token", [False, True])
def test_the_entropy_changes_no_bit_of_losses_and_gradients(per_token: bool) -> None:
    torch.manual_seed(2)
    inputs = [torch.randn(5, 8).requires_grad_(), torch.randn(50, 8).requires_grad_()]
    targets, found = torch.randint(0, 50, (5,)), []
    for asked in (False, True):
        scored = token_cross_entropy(*inputs, targets, 3, with_entropy=asked, per_token=per_token)
        assert bool(scored.entropy_sum) is asked
        total = scored.token_losses.sum() if per_token else scored.loss_sum
        found.append([scored.token_losses, *torch.autograd.grad(total, inputs)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other) and one.abs().sum() > 0


def test_gradients_of_bf16_are_those_of_fp32_shortened_once() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 50), torch.randint(0, 50, (6,))
    found = torch.empty(6, 50, dtype=torch.bfloat16)
    loss_kernel.score_rows(logits, None, targets, 1.0, gradient=found)
    exact = logits.double().softmax(1)
    exact[torch.arange(6), targets] -= 1
    # the interpreter cuts to 8 bits, where a GPU rounds
    assert ((found.double() - exact).abs() <= exact.abs() * 2**-7 * 1.001).all()


def test_the_first_of_equal_logits_is_the_largest() -> None:
    logits = torch.zeros(2, 40)
    correct = torch.empty(2, dtype=torch.int32)
    loss_kernel.score_rows(logits, None, torch.tensor([0, 39]), 1.0, correct=correct)
    assert correct.tolist() == [1, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 39])
def test_a_logit_that_is_not_finite_is_felt(value: float, place: int) -> None:
    logits = torch.zeros(2, 40)
    logits[1, place] = value
    losses = torch.empty(2)
    loss_kernel.score_rows(logits, None, torch.tensor([3, 3]), 1.0, losses=losses)
    assert losses[0].isfinite() and not losses[1].isfinite()


def test_huge_logits_do_not_overflow_and_a_masked_token_counts_nothing() -> None:
    logits = torch.tensor([[1e4, -1e4, -float("inf")]])
    losses, entropies, gradient = torch.empty(1), torch.empty(1), torch.empty(1, 3)
    one = torch.ones(1)
    loss_kernel.score_rows(logits, None, torch.tensor([0]), 1.0, losses=losses, entropies=entropies)
    loss_kernel.score_rows(logits, None, torch.tensor([0]), 1.0, gradient=gradient, by_entropy=one)
    assert losses.item() == entropies.item() == 0 and gradient.tolist() == [[0, 0, 0]]


def test_no_token_and_a_frozen_projection() -> None:
    hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    found = token_cross_entropy(hidden, weight, torch.empty(0, dtype=torch.int64), with_entropy=True)
    found.loss_sum.backward()
    assert found.loss_sum == found.correct == found.entropy_sum == 0
    assert torch.equal(weight.grad, torch.zeros(5, 8))
    hidden = torch.randn(4, 8, requires_grad=True)
    token_cross_entropy(hidden, weight.detach(), torch.tensor([0, 1, 2, 3])).loss_sum.backward()
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "wrong", [{"targets": torch.zeros(1, dtype=torch.int64)}, {"losses": torch.empty(4)[::2]},
              {"gradient": torch.empty(2, 6)}, {"bias": torch.empty(2)}],
)  # fmt: skip
def test_what_a_kernel_would_read_elsewhere_is_refused(wrong: dict[str, torch.Tensor]) -> None:
    given = {"bias": None, "targets": torch.zeros(2, dtype=torch.int64), **wrong}
    bias, targets = given.pop("bias"), given.pop("targets")
    with pytest.raises(ValueError, match="side by side"):
        loss_kernel.score_rows(torch.zeros(2, 5), bias, targets, 1.0, **given)


class Traffic(TorchDispatchMode):
    """Bytes of tensors of so many elements that operations read and write, save where they pick a few."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.bytes = elements, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket not in (aten.gather, aten.index, aten.index_put_):
            read_or_written = (x for x in (*args, out) if isinstance(x, torch.Tensor))
            self.bytes += sum(x.nbytes for x in read_or_written if x.numel() == self.elements)
        return out


@pytest.mark.parametrize(("with_entropy", "bytes_of_a_logit"), [(False, 38), (True, 70)])
def test_torch_moves_four_to_seven_times_the_bytes(with_entropy: bool, bytes_of_a_logit: int) -> None:
    logits, targets = torch.randn(8, 64), torch.zeros(8, dtype=torch.int64)
    with Traffic(8 * 64) as counted:
        chunk = score_chunk(logits, targets, with_entropy)
        fused_loss._subtract_targets(chunk.probabilities, targets)
        chunk.probabilities.to(torch.bfloat16)
    assert counted.bytes == bytes_of_a_logit * 8 * 64


# The code for an H100 ---------------------------------------------------------------------------------

REGISTERS, SHARED = 65_536, 227 * 1024
"""Of a multiprocessor of compute capability 9.0, in words and bytes."""
RESIDENT = 3
"""Programs that should be resident at once, so that some read while others compute."""


@pytest.mark.slow
def test_it_compiles_for_an_h100_without_spilling() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.programs.kernel_for_h100"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    forms = json.loads(ran.stdout)
    assert len(forms) == 24
    for form, (registers, stack, shared) in forms:
        assert 0 < registers * 32 * loss_kernel.WARPS * RESIDENT <= REGISTERS, (form, registers)
        assert stack == 0 and shared * RESIDENT <= SHARED, (form, stack, shared)
