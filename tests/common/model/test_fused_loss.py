from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from common.model.fused_loss import token_cross_entropy


def plain_scores(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and entropies [M] of logits [M, V], in their dtype."""
    logprobs = (logits / temperature).log_softmax(1)
    return -logprobs.gather(1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(1)


def test_two_tokens_worked_by_hand() -> None:
    # logits: [0, log 3] and [log 4, 0]; p = [1/4, 3/4] and [4/5, 1/5]
    hidden = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0]], requires_grad=True)
    weight = torch.eye(2).requires_grad_()
    loss = token_cross_entropy(hidden, weight, torch.tensor([0, 0]), with_entropy=True)
    torch.testing.assert_close(loss.loss_sum.item(), math.log(4) + math.log(5 / 4))
    torch.testing.assert_close(loss.token_losses, torch.tensor([math.log(4), math.log(5 / 4)]))
    assert loss.correct.item() == 1
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75) + 0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    assert loss.entropy_sum.item() == pytest.approx(entropy, rel=1e-6)
    loss.loss_sum.backward()
    torch.testing.assert_close(hidden.grad, torch.tensor([[-0.75, 0.75], [-0.2, 0.2]]))


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 64])
@pytest.mark.parametrize("with_bias", [False, True])
def test_any_chunk_size_gives_the_loss_and_gradients_of_plain_cross_entropy(
    chunk_rows: int, with_bias: bool
) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(20, 16, requires_grad=True)
    weight = torch.randn(50, 16, requires_grad=True)
    bias = torch.randn(50, requires_grad=True) if with_bias else None
    targets = torch.randint(0, 50, (20,))
    inputs = (hidden, weight) if bias is None else (hidden, weight, bias)
    ours = token_cross_entropy(hidden, weight, targets, chunk_rows, bias=bias, with_entropy=True)
    logits = F.linear(hidden, weight, bias)
    theirs = F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(ours.loss_sum, theirs, rtol=1e-6, atol=1e-5)
    assert ours.correct == (logits.argmax(1) == targets).sum()
    entropy = torch.distributions.Categorical(logits=logits).entropy().sum()
    torch.testing.assert_close(ours.entropy_sum, entropy.detach(), rtol=1e-5, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(ours.loss_sum * 0.25, inputs),
        torch.autograd.grad(theirs * 0.25, inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_bf16_inputs_are_summed_in_fp32() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(600, 16).bfloat16().requires_grad_()
    weight = torch.randn(50, 16).bfloat16().requires_grad_()
    targets = torch.randint(0, 50, (600,))
    ours = token_cross_entropy(hidden, weight, targets, 7)
    assert ours.loss_sum.dtype is ours.token_losses.dtype is torch.float32
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    theirs = F.cross_entropy(F.linear(*exact), targets, reduction="sum")
    # logits are rounded to bf16 once (2^-9 relative); errors of 600 tokens average out
    assert ours.loss_sum.item() == pytest.approx(theirs.item(), rel=2e-3)
    got = torch.autograd.grad(ours.loss_sum, (hidden, weight))
    wanted = torch.autograd.grad(theirs, exact)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype is torch.bfloat16
        assert ((a.double() - b).norm() / b.norm()).item() < 1e-2


def test_no_trained_token_gives_zero_with_zero_gradients_on_the_graph() -> None:
    hidden = torch.randn(0, 8, requires_grad=True)
    weight = torch.randn(5, 8, requires_grad=True)
    loss = token_cross_entropy(hidden, weight, torch.empty(0, dtype=torch.int64), with_entropy=True)
    assert loss.loss_sum.item() == 0 and loss.correct.item() == 0 and loss.entropy_sum.item() == 0
    loss.loss_sum.backward()
    assert torch.equal(weight.grad, torch.zeros(5, 8)) and hidden.grad.shape == (0, 8)


def test_a_frozen_projection_gets_no_gradient_and_costs_none() -> None:
    hidden = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(5, 8)
    loss = token_cross_entropy(hidden, weight, torch.tensor([0, 1, 2, 3]))
    loss.loss_sum.backward()
    assert weight.grad is None and hidden.grad.abs().sum() > 0


def test_evaluation_without_gradients_gives_the_same_numbers() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    targets = torch.randint(0, 5, (9,))
    trained = token_cross_entropy(hidden, weight, targets, with_entropy=True)
    with torch.no_grad():
        evaluated = token_cross_entropy(hidden, weight, targets, with_entropy=True)
    assert not evaluated.loss_sum.requires_grad and trained.loss_sum.requires_grad
    for a, b in zip(trained[:4], evaluated[:4], strict=True):
        assert torch.equal(a.detach(), b)
    assert trained.token_entropies is evaluated.token_entropies is None


def test_a_second_backward_pass_is_an_error_and_not_a_wrong_gradient() -> None:
    hidden = torch.randn(4, 8, requires_grad=True)
    loss = token_cross_entropy(hidden, torch.randn(5, 8), torch.tensor([0, 1, 2, 3])).loss_sum
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="works once"):
        loss.backward()


def test_huge_logits_do_not_overflow() -> None:
    hidden = torch.tensor([[1e4]], requires_grad=True)
    loss = token_cross_entropy(hidden, torch.tensor([[1.0], [-1.0]]), torch.tensor([0]), with_entropy=True)
    assert loss.loss_sum.item() == 0 and loss.entropy_sum.item() == 0


def test_temperature_and_entropies_worked_by_hand() -> None:
    # at temperature 2 the logits [0, 2 log 3] are [0, log 3]: p = [1/4, 3/4]
    hidden = torch.tensor([[0.0, 2 * math.log(3)]], requires_grad=True)
    found = token_cross_entropy(
        hidden, torch.eye(2), torch.tensor([0]), with_entropy=True, per_token=True, temperature=2.0
    )
    entropy = math.log(4) - 0.75 * math.log(3)
    assert found.token_losses.tolist() == pytest.approx([math.log(4)])
    assert found.token_entropies is not None and found.token_entropies.tolist() == pytest.approx([entropy])
    assert found.entropy_sum.item() == pytest.approx(entropy) and not found.entropy_sum.requires_grad
    (by_loss,) = torch.autograd.grad(found.token_losses.sum(), hidden, retain_graph=True)
    assert by_loss.flatten().tolist() == pytest.approx([-0.75 / 2, 0.75 / 2])
    # −p (log p + H) / 2: more of the likelier token is less entropy
    (by_entropy,) = torch.autograd.grad(found.token_entropies.sum(), hidden)
    slope = 0.25 * (math.log(4) - entropy) / 2
    assert by_entropy.flatten().tolist() == pytest.approx([slope, -slope])


@pytest.mark.parametrize("temperature", [1.0, 0.3, 1.7])
@pytest.mark.parametrize("chunk_rows", [1, 7, 64])
@pytest.mark.parametrize("with_bias", [False, True])
def test_losses_and_entropies_at_a_temperature_have_the_gradients_of_plain_ones(
    temperature: float, chunk_rows: int, with_bias: bool
) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(20, 16), torch.randn(50, 16)] + [torch.randn(50)] * with_bias
    targets, of_losses, of_entropies = torch.randint(0, 50, (20,)), torch.randn(20), torch.randn(20)
    ours = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    found = token_cross_entropy(
        ours[0],
        ours[1],
        targets,
        chunk_rows,
        bias=ours[2] if with_bias else None,
        with_entropy=True,
        per_token=True,
        temperature=temperature,
    )
    losses, entropies = plain_scores(F.linear(*exact), targets, temperature)
    torch.testing.assert_close(found.token_losses.double(), losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.token_entropies.double(), entropies, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropy_sum.double(), entropies.sum(), rtol=1e-5, atol=1e-5)
    for a, b in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        got = torch.autograd.grad(
            a * (found.token_losses * of_losses).sum() + b * (found.token_entropies * of_entropies).sum(),
            ours,
            retain_graph=True,
        )
        wanted = torch.autograd.grad(
            a * (losses * of_losses).sum() + b * (entropies * of_entropies).sum(), exact, retain_graph=True
        )
        for one, other in zip(got, wanted, strict=True):
            assert other.abs().max() > 0.1
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("read", ["token_losses", "token_entropies"])
def test_what_the_callers_loss_does_not_read_adds_no_gradient(read: str) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    targets = torch.randint(0, 5, (9,))
    found = token_cross_entropy(hidden, weight, targets, 4, with_entropy=True, per_token=True)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    losses, entropies = plain_scores(F.linear(*exact), targets, 1.0)
    plain = {"token_losses": losses, "token_entropies": entropies}
    got = torch.autograd.grad(getattr(found, read).sum(), (hidden, weight))
    wanted = torch.autograd.grad(plain[read].sum(), exact)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


def test_the_summed_loss_has_a_temperature_too() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    targets = torch.randint(0, 5, (9,))
    summed = token_cross_entropy(hidden, weight, targets, 4, with_entropy=True, temperature=0.5)
    each = token_cross_entropy(hidden, weight, targets, 4, with_entropy=True, per_token=True, temperature=0.5)
    assert torch.equal(summed.token_losses, each.token_losses) and summed.token_entropies is None
    assert torch.equal(summed.entropy_sum, each.entropy_sum)
    for a, b in zip(
        torch.autograd.grad(summed.loss_sum, (hidden, weight)),
        torch.autograd.grad(each.token_losses.sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_entropy_changes_no_bit_of_losses_and_gradients(dtype: torch.dtype, per_token: bool) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(*size).to(dtype).requires_grad_() for size in ((40, 16), (50, 16), (50,))]
    hidden, weight, bias = inputs
    targets = torch.randint(0, 50, (40,))
    both = [
        token_cross_entropy(
            hidden, weight, targets, 7, bias=bias, with_entropy=asked, per_token=per_token, temperature=0.7
        )
        for asked in (False, True)
    ]
    without, asked = both
    assert asked.entropy_sum > 0 == without.entropy_sum and without.token_entropies is None
    assert torch.equal(without.token_losses, asked.token_losses) and without.correct == asked.correct
    assert torch.equal(without.loss_sum, asked.loss_sum)
    sums = [each.token_losses.sum() if per_token else each.loss_sum for each in both]
    gradients = [torch.autograd.grad(each, inputs) for each in sums]
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other) and one.abs().sum() > 0


def test_bf16_logits_are_divided_by_the_temperature_in_fp32() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(300, 16).bfloat16().requires_grad_()
    weight = torch.randn(50, 16).bfloat16().requires_grad_()
    targets, weights = torch.randint(0, 50, (300,)), torch.rand(300)
    found = token_cross_entropy(
        hidden, weight, targets, 7, with_entropy=True, per_token=True, temperature=0.7
    )
    assert found.token_losses.dtype is found.token_entropies.dtype is torch.float32
    rounded = (hidden @ weight.t()).detach().double()  # to bf16 by the product, and not once more
    losses, entropies = plain_scores(rounded, targets, 0.7)
    torch.testing.assert_close(found.token_losses.detach().double(), losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.token_entropies.detach().double(), entropies, rtol=1e-5, atol=1e-5)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    losses, entropies = plain_scores(F.linear(*exact), targets, 0.7)
    got = torch.autograd.grad(
        ((found.token_losses - found.token_entropies) * weights).sum(), (hidden, weight)
    )
    for a, b in zip(got, torch.autograd.grad(((losses - entropies) * weights).sum(), exact), strict=True):
        assert a.dtype is torch.bfloat16
        assert ((a.double() - b).norm() / b.norm()).item() < 1e-2


def test_no_token_gives_entropies_with_zero_gradients_on_the_graph() -> None:
    hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    none = torch.empty(0, dtype=torch.int64)
    found = token_cross_entropy(hidden, weight, none, with_entropy=True, per_token=True, temperature=0.5)
    (found.token_losses.sum() + found.token_entropies.sum()).backward()
    assert torch.equal(weight.grad, torch.zeros(5, 8)) and hidden.grad.shape == (0, 8)


@pytest.mark.parametrize("scale", [1e4, 1e-6])
def test_entropies_of_huge_and_of_equal_logits_have_finite_gradients(scale: float) -> None:
    hidden = torch.tensor([[scale]], requires_grad=True)
    found = token_cross_entropy(
        hidden, torch.tensor([[1.0], [-1.0]]), torch.tensor([0]), with_entropy=True, per_token=True
    )
    found.token_entropies.sum().backward()
    assert found.token_entropies.item() == pytest.approx(0 if scale > 1 else math.log(2))
    assert hidden.grad.item() == pytest.approx(0, abs=1e-5)
