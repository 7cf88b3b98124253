from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from common.data.types import Batch
from common.errors import UserError
from common.model import attention
from common.model.loading import enable_checkpointing
from common.model.losses import (
    PackedCausalLM,
    ScoringHead,
    TokenLoss,
    batch_arguments,
    changes_logits,
    check_packed,
    token_cross_entropy,
)

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA = LlamaConfig(**SHAPE)
TIED = LlamaConfig(**SHAPE, tie_word_embeddings=True)


def tiny(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    attention.register()
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation="packed")


def batch_of(documents: list[list[int]], trained: list[list[int]]) -> Batch:
    """trained: for each document the positions that must predict their next token."""
    starts = [sum(map(len, documents[:i])) for i in range(len(documents))]
    positions = [start + p for start, chosen in zip(starts, trained, strict=True) for p in chosen]
    flat = [token for document in documents for token in document]
    return Batch(
        input_ids=torch.tensor([flat]),
        position_ids=torch.tensor([[p for document in documents for p in range(len(document))]]),
        cu_seqlens=torch.tensor([*starts, len(flat)], dtype=torch.int32),
        trained_positions=torch.tensor(positions, dtype=torch.int64),
        targets=torch.tensor([flat[p + 1] for p in positions], dtype=torch.int64),
        source_of_target=torch.zeros(len(positions), dtype=torch.int64),
        max_seqlen=max(map(len, documents)),
        row_ids=tuple(range(len(documents))),
    )


BATCH = batch_of([[5, 6, 7, 8, 9], [10, 11, 12], [3, 4, 5, 6]], [[1, 2, 3], [0, 1], [2]])


def plain_logits(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """[M, V] at the trained positions: each document alone, full logits, transformers' own SDPA."""
    found = []
    bounds = batch.cu_seqlens.tolist()
    with attention.plain_attention(model):
        for start, end in zip(bounds[:-1], bounds[1:], strict=True):
            logits = model(input_ids=batch.input_ids[:, start:end], use_cache=False).logits[0]
            inside = (batch.trained_positions >= start) & (batch.trained_positions < end)
            found.append(logits[batch.trained_positions[inside] - start].float())
    return torch.cat(found)


def plain_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(plain_logits(model, batch), batch.targets, reduction="sum")


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


MODELS = {
    "llama": LLAMA,
    "tied": TIED,
    "gemma3 with soft-capped logits": Gemma3TextConfig(
        **SHAPE, head_dim=8, sliding_window=4, final_logit_softcapping=2.0
    ),
    "cohere scales logits": CohereConfig(**SHAPE, logit_scale=0.25),
    "granite divides logits": GraniteConfig(**SHAPE, logits_scaling=4.0),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_batch_has_the_loss_and_gradients_of_its_documents_alone(name: str) -> None:
    reference, model = tiny(MODELS[name]), tiny(MODELS[name])
    packed = PackedCausalLM(model)
    assert packed.scores_in_head == (name in ("llama", "tied"))
    loss = packed.score(BATCH, with_entropy=True)
    expected = plain_loss(reference, BATCH)
    torch.testing.assert_close(loss.loss_sum, expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(loss.token_losses.sum(), expected.detach(), rtol=1e-6, atol=1e-5)
    assert 0 < loss.entropy_sum.item() <= 6 * math.log(64) + 1e-3
    loss.loss_sum.backward()
    expected.backward()
    compared = 0
    for (key, a), (_, b) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=key)
        compared += int(b.grad.abs().sum() > 0)
    assert compared > 10


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_without_trained_tokens_gives_every_parameter_a_zero_gradient(name: str) -> None:
    packed = PackedCausalLM(tiny(MODELS[name]))
    loss = packed.score(batch_of([[5, 6, 7]], [[]]), with_entropy=True)
    loss.loss_sum.backward()
    assert loss.loss_sum.item() == 0 and loss.correct.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in packed.parameters())


def test_changing_another_document_leaves_a_documents_losses_bit_identical() -> None:
    packed = PackedCausalLM(tiny(LLAMA))
    changed = batch_of([[5, 6, 7, 8, 9], [20, 21, 22], [3, 4, 5, 6]], [[1, 2, 3], [0, 1], [2]])
    a, b = packed.score(BATCH).token_losses, packed.score(changed).token_losses
    kept = torch.tensor([0, 1, 2, 5])
    assert torch.equal(a[kept], b[kept]) and not torch.equal(a, b)


def test_the_projection_still_projects_and_the_models_names_are_unchanged() -> None:
    model = tiny(LLAMA)
    names = list(model.state_dict())
    packed = PackedCausalLM(model)
    assert list(model.state_dict()) == names and isinstance(model.lm_head, ScoringHead)
    ids = torch.arange(4)[None]
    hidden = torch.randn(3, 32)
    assert torch.equal(model.lm_head(hidden), F.linear(hidden, model.lm_head.weight))
    assert packed.logits(ids).shape == (4, 64)


def test_the_loss_is_computed_while_the_projection_is_being_called() -> None:
    # ZeRO-3 gathers a weight in the hooks around its module's call and frees it afterwards
    model = tiny(LLAMA)
    packed = PackedCausalLM(model)
    weight = model.lm_head.weight.data
    model.lm_head.weight.data = torch.empty(0)

    def gather(module: torch.nn.Module, _: object) -> None:
        module.weight.data = weight

    def free(module: torch.nn.Module, _: object, output: TokenLoss) -> None:
        module.weight.data = torch.empty(0)

    model.lm_head.register_forward_pre_hook(gather)
    model.lm_head.register_forward_hook(free)
    with torch.no_grad():
        assert packed.score(BATCH).loss_sum.item() > 0


def test_adapters_train_and_the_base_does_not() -> None:
    from peft import LoraConfig, get_peft_model

    base = tiny(LLAMA)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    packed = PackedCausalLM(adapted)
    assert packed.scores_in_head
    torch.testing.assert_close(
        packed.score(BATCH).loss_sum, plain_loss(tiny(LLAMA), BATCH), rtol=1e-6, atol=1e-5
    )
    packed.score(BATCH).loss_sum.backward()
    trained = [n for n, p in adapted.named_parameters() if p.grad is not None]
    assert trained and all("lora_" in n for n in trained)


def test_gradient_checkpointing_changes_nothing() -> None:
    def gradients(on: bool) -> list[torch.Tensor]:
        model = tiny(LLAMA).train()
        if on:
            enable_checkpointing(model)
        PackedCausalLM(model).score(BATCH).loss_sum.backward()
        return [p.grad for p in model.parameters()]

    # recomputed layers are computed at all rows, others only where they are read: products of other sizes
    for without, with_it in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(with_it, without, rtol=1e-5, atol=1e-7)


def test_a_projection_with_a_bias_is_scored_with_it() -> None:
    from transformers import PhiConfig

    config = PhiConfig(**SHAPE)
    model = tiny(config)
    torch.nn.init.normal_(model.lm_head.bias)
    packed = PackedCausalLM(model)
    assert packed.scores_in_head
    torch.testing.assert_close(packed.score(BATCH).loss_sum, plain_loss(model, BATCH), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_models_that_pack_exactly_pass_the_check(name: str) -> None:
    model = tiny(MODELS[name]).train()
    state = torch.get_rng_state()
    check_packed(model)
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_a_model_that_changes_its_logits_unannounced_makes_them_itself() -> None:
    model = tiny(GraniteConfig(**SHAPE, logits_scaling=4.0))
    model.config.logits_scaling = 1.0
    original = model.forward

    def doubled(*args: object, **kwargs: object) -> object:
        output = original(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    model.forward = doubled
    assert not changes_logits(model)
    check_packed(model)
    assert changes_logits(model)
    packed = PackedCausalLM(model)
    torch.testing.assert_close(packed.score(BATCH).loss_sum, plain_loss(model, BATCH), rtol=1e-6, atol=1e-5)


def test_a_layer_that_looks_at_later_tokens_is_refused() -> None:
    model = tiny(LLAMA)

    def shift(_: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output + output.roll(-1, 1)

    model.model.layers[0].mlp.register_forward_hook(shift)
    with pytest.raises(UserError, match="model_type=llama has attention to later tokens"):
        check_packed(model)


def test_a_forward_pass_that_fails_names_the_family() -> None:
    model = tiny(LLAMA)

    def fail(*_: object) -> None:
        raise KeyError("alibi")

    model.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(UserError, match="model_type=llama has a forward pass that fails .KeyError: 'alibi'"):
        check_packed(model)


def test_the_arguments_of_a_batch_are_those_of_forward() -> None:
    packed = PackedCausalLM(tiny(LLAMA))
    assert torch.equal(packed(**batch_arguments(BATCH)).loss_sum, packed.score(BATCH).loss_sum)


def plain_scores(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and entropies [M] of logits [M, V], in their dtype."""
    logprobs = (logits / temperature).log_softmax(1)
    return -logprobs.gather(1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(1)


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


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_every_model_is_scored_at_the_temperature(name: str, temperature: float) -> None:
    reference, model = tiny(MODELS[name]), tiny(MODELS[name])
    with torch.no_grad():
        for weights in (reference, model):
            weights.get_output_embeddings().weight.mul_(5)  # the logits of a new model are all but equal
    packed = PackedCausalLM(model)
    found = packed(**batch_arguments(BATCH), with_entropy=True, per_token=True, temperature=temperature)
    logits = plain_logits(reference, BATCH)
    expected = plain_scores(logits, BATCH.targets, temperature)
    other = plain_scores(logits, BATCH.targets, 0.8)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(expected, other, strict=True))
    torch.testing.assert_close(found.token_losses, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.token_entropies, expected[1], rtol=1e-5, atol=1e-5)
    weights = torch.linspace(-1, 1, 6)
    ((found.token_losses - 0.5 * found.token_entropies) * weights).sum().backward()
    ((expected[0] - 0.5 * expected[1]) * weights).sum().backward()
    compared = 0
    for (key, a), (_, b) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5 * float(b.grad.abs().max()), msg=key)
        compared += int(b.grad.abs().sum() > 0)
    assert compared > 10


def test_entropies_are_not_asked_for_in_vain() -> None:
    packed = PackedCausalLM(tiny(LLAMA))
    assert packed(**batch_arguments(BATCH), per_token=True).token_entropies is None
    assert packed(**batch_arguments(BATCH), with_entropy=True).token_entropies is None
