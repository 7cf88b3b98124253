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
from common.model import attention
from common.model.fused_loss import ScoringHead, TokenLoss
from common.model.packed import PackedCausalLM, batch_arguments
from common.model.probes import Shortcuts
from common.model.recomputation import enable_checkpointing
from tests.common.model.test_fused_loss import plain_scores
from tests.packed import packed_lm
from tests.tiny import SHAPE as DECODER

SHAPE = {"vocab_size": 64, **DECODER}
LLAMA = LlamaConfig(**SHAPE)
TIED = LlamaConfig(**SHAPE, tie_word_embeddings=True)
MODELS = {
    "llama": LLAMA,
    "tied": TIED,
    "gemma3 with soft-capped logits": Gemma3TextConfig(
        **SHAPE, head_dim=8, sliding_window=4, final_logit_softcapping=2.0
    ),
    "cohere scales logits": CohereConfig(**SHAPE, logit_scale=0.25),
    "granite divides logits": GraniteConfig(**SHAPE, logits_scaling=4.0),
}


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


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_batch_has_the_loss_and_gradients_of_its_documents_alone(name: str) -> None:
    reference, model = tiny(MODELS[name]), tiny(MODELS[name])
    packed = packed_lm(model)
    assert packed.shortcuts.fused_loss == (name in ("llama", "tied"))
    loss = packed(**batch_arguments(BATCH), with_entropy=True)
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
    packed = packed_lm(tiny(MODELS[name]))
    loss = packed(**batch_arguments(batch_of([[5, 6, 7]], [[]])), with_entropy=True)
    loss.loss_sum.backward()
    assert loss.loss_sum.item() == 0 and loss.correct.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in packed.parameters())


def test_changing_another_document_leaves_a_documents_losses_bit_identical() -> None:
    packed = packed_lm(tiny(LLAMA))
    changed = batch_of([[5, 6, 7, 8, 9], [20, 21, 22], [3, 4, 5, 6]], [[1, 2, 3], [0, 1], [2]])
    a, b = packed(**batch_arguments(BATCH)).token_losses, packed(**batch_arguments(changed)).token_losses
    kept = torch.tensor([0, 1, 2, 5])
    assert torch.equal(a[kept], b[kept]) and not torch.equal(a, b)


def test_the_projection_still_projects_and_the_models_names_are_unchanged() -> None:
    model = tiny(LLAMA)
    names = list(model.state_dict())
    packed = packed_lm(model)
    assert list(model.state_dict()) == names and isinstance(model.lm_head, ScoringHead)
    ids = torch.arange(4)[None]
    hidden = torch.randn(3, 32)
    assert torch.equal(model.lm_head(hidden), F.linear(hidden, model.lm_head.weight))
    assert packed.logits(ids).shape == (4, 64)


def test_making_the_wrapper_runs_nothing_of_the_model() -> None:
    model = tiny(LLAMA)

    def fail(*_: object) -> None:
        raise AssertionError("the model was run")

    model.model.register_forward_pre_hook(fail)
    packed = PackedCausalLM(model, Shortcuts(fused_loss=True, partial_last_layer=True))
    assert packed.base() is model and not model.model.layers[-1].mlp._forward_hooks


def test_the_loss_is_computed_while_the_projection_is_being_called() -> None:
    # ZeRO-3 gathers a weight in the hooks around its module's call and frees it afterwards
    model = tiny(LLAMA)
    packed = packed_lm(model)
    weight = model.lm_head.weight.data
    model.lm_head.weight.data = torch.empty(0)

    def gather(module: torch.nn.Module, _: object) -> None:
        module.weight.data = weight

    def free(module: torch.nn.Module, _: object, output: TokenLoss) -> None:
        module.weight.data = torch.empty(0)

    model.lm_head.register_forward_pre_hook(gather)
    model.lm_head.register_forward_hook(free)
    with torch.no_grad():
        assert packed(**batch_arguments(BATCH)).loss_sum.item() > 0


def test_adapters_train_and_the_base_does_not() -> None:
    from peft import LoraConfig, get_peft_model

    base = tiny(LLAMA)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    packed = packed_lm(adapted)
    assert packed.shortcuts.fused_loss
    torch.testing.assert_close(
        packed(**batch_arguments(BATCH)).loss_sum, plain_loss(tiny(LLAMA), BATCH), rtol=1e-6, atol=1e-5
    )
    packed(**batch_arguments(BATCH)).loss_sum.backward()
    trained = [n for n, p in adapted.named_parameters() if p.grad is not None]
    assert trained and all("lora_" in n for n in trained)


def test_gradient_checkpointing_changes_nothing() -> None:
    def gradients(on: bool) -> list[torch.Tensor]:
        model = tiny(LLAMA).train()
        if on:
            enable_checkpointing(model)
        packed_lm(model)(**batch_arguments(BATCH)).loss_sum.backward()
        return [p.grad for p in model.parameters()]

    # recomputed layers are computed at all rows, others only where they are read: products of other sizes
    for without, with_it in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(with_it, without, rtol=1e-5, atol=1e-7)


def test_a_projection_with_a_bias_is_scored_with_it() -> None:
    from transformers import PhiConfig

    config = PhiConfig(**SHAPE)
    model = tiny(config)
    torch.nn.init.normal_(model.lm_head.bias)
    packed = packed_lm(model)
    assert packed.shortcuts.fused_loss
    torch.testing.assert_close(
        packed(**batch_arguments(BATCH)).loss_sum, plain_loss(model, BATCH), rtol=1e-6, atol=1e-5
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_every_model_is_scored_at_the_temperature(name: str, temperature: float) -> None:
    reference, model = tiny(MODELS[name]), tiny(MODELS[name])
    with torch.no_grad():
        for weights in (reference, model):
            weights.get_output_embeddings().weight.mul_(5)  # the logits of a new model are all but equal
    packed = packed_lm(model)
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


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("per_token", [False, True])
def test_the_entropy_changes_no_bit_of_losses_and_gradients(name: str, per_token: bool) -> None:
    found = []
    for asked in (False, True):
        model = tiny(MODELS[name])
        scored = packed_lm(model)(**batch_arguments(BATCH), with_entropy=asked, per_token=per_token)
        assert bool(scored.entropy_sum) is asked
        (scored.token_losses.sum() if per_token else scored.loss_sum).backward()
        gradients = {key: weight.grad for key, weight in model.named_parameters()}
        found.append({"losses": scored.token_losses.detach(), **gradients})
    for key, one in found[0].items():
        assert torch.equal(one, found[1][key]), key
    assert sum(bool(one.abs().sum() > 0) for one in found[0].values()) > 10


def test_entropies_are_not_asked_for_in_vain() -> None:
    packed = packed_lm(tiny(LLAMA))
    assert packed(**batch_arguments(BATCH), per_token=True).token_entropies is None
    assert packed(**batch_arguments(BATCH), with_entropy=True).token_entropies is None
