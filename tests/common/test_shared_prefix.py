"""A prompt that is computed once for all answers to it gives what documents of their own give."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.data.batches import collate, collate_pairs
from common.data.types import IGNORE, PairBatch, TokenizedExample, TokenizedPair
from common.model import attention
from common.model.fused_loss import token_cross_entropy
from common.model.packed import batch_arguments
from common.model.probes import find_shortcuts
from tests.packed import packed_lm

VOCABULARY = 50


def example(ids: np.ndarray, trained_from: int) -> TokenizedExample:
    labels = np.append(ids[1:], IGNORE).astype(np.int32)
    labels[: trained_from - 1] = IGNORE
    return TokenizedExample(ids, labels, "s")


def some_pairs() -> list[TokenizedPair]:
    """Long and short prompts; the third pair's answers begin alike, the fourth's prompts differ at once."""
    draw = np.random.default_rng(0)
    pairs = []
    for prompt, chosen, rejected, alike in ((9, 4, 7, 0), (3, 12, 2, 0), (5, 6, 5, 3), (4, 3, 3, -4)):
        left = draw.integers(3, VOCABULARY, prompt + chosen).astype(np.int32)
        right = draw.integers(3, VOCABULARY, prompt + rejected).astype(np.int32)
        right[: prompt + alike] = left[: prompt + alike]
        left[0], right[0] = 1, 1 if alike >= 0 else 2
        pairs.append(TokenizedPair(example(left, prompt), example(right, prompt), 0.0))
    return pairs


def tiny_model(window: int | None = None) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

    attention.register()
    torch.manual_seed(0)
    kind = MistralConfig if window else LlamaConfig
    more = {"sliding_window": window} if window else {}
    config = kind(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, **more,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME).double()


def run(batch: PairBatch, window: int | None) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Token losses, hidden states where scores are read, and gradients of a weighted sum of both."""
    model = tiny_model(window)
    packed = packed_lm(model)
    packed.shortcuts = replace(packed.shortcuts, fused_loss=False)  # the plain path stays in float64
    losses = packed(**batch_arguments(batch.documents), per_token=True).token_losses
    documents = batch.documents
    hidden = []
    hook = model.get_decoder().register_forward_hook(
        lambda module, args, out: hidden.append(out.last_hidden_state[0])
    )
    packed(**batch_arguments(documents))
    hook.remove()
    scores = hidden[0][batch.score_positions].sum(1)
    weights = 1.0 + batch.document_of_target % 3
    ((losses * weights).sum() + (scores * torch.arange(len(scores))).sum()).backward()
    return losses, scores, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("window", [None, 5])
def test_a_shared_prompt_gives_the_same_losses_scores_and_gradients(window: int | None) -> None:
    pairs = some_pairs()
    ids = list(range(len(pairs)))
    apart = collate_pairs(pairs, ids, [0] * 4, share_prefix=False)
    together = collate_pairs(pairs, ids, [0] * 4)
    # three prompts, and three tokens of an answer, less one (a document keeps its last token)
    assert together.documents.shared_prefix == (0, 9, 0, 3, 0, 8, 0, 0)
    assert apart.documents.input_ids.shape[1] - together.documents.input_ids.shape[1] == 20
    losses, scores, gradients = run(apart, window)
    losses_once, scores_once, gradients_once = run(together, window)
    # losses and softmax are in fp32 whatever the model
    torch.testing.assert_close(losses_once, losses, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scores_once, scores, rtol=1e-5, atol=1e-5)
    assert len(gradients) == len(gradients_once) > 10
    for name, gradient in gradients.items():
        scale = float(gradient.abs().max())
        assert scale > 0
        torch.testing.assert_close(gradients_once[name], gradient, rtol=0, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("window", [None, 5])
def test_many_answers_to_a_prompt_give_the_same_losses_and_gradients(window: int | None) -> None:
    draw = np.random.default_rng(1)
    prompts = [draw.integers(3, VOCABULARY, length).astype(np.int32) for length in (9, 6)]
    prefix_groups, documents = [0, 0, 0, 0, 1, 1, 1], []
    for group, length in zip(prefix_groups, (4, 1, 7, 5, 3, 8, 2), strict=True):
        answer = draw.integers(3, VOCABULARY, length).astype(np.int32)
        if len(documents) == 3:
            answer[:2] = documents[0].input_ids[9:11]  # the fourth goes on like the first
        documents.append(example(np.concatenate([prompts[group], answer]), len(prompts[group])))
    ids, sources = list(range(7)), [0] * 7
    found = {}
    for shared, batch in (
        (False, collate(documents, ids, sources)),
        (True, collate(documents, ids, sources, prefix_groups)),
    ):
        assert batch.shared_prefix == ((0, 9, 9, 11, 0, 6, 6) if shared else ())
        model = tiny_model(window)
        packed = packed_lm(model)
        packed.shortcuts = replace(packed.shortcuts, fused_loss=False)  # the plain path stays in float64
        losses = packed(**batch_arguments(batch), per_token=True).token_losses
        (losses * (1.0 + torch.arange(len(losses)) % 4)).sum().backward()
        found[shared] = losses.detach(), {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(found[True][0], found[False][0], rtol=1e-6, atol=1e-6)
    for name, gradient in found[False][1].items():
        scale = float(gradient.abs().max())
        assert scale > 0
        torch.testing.assert_close(found[True][1][name], gradient, rtol=0, atol=1e-5 * scale, msg=name)


def test_keys_are_those_of_the_prefix_and_the_documents_own() -> None:
    boundaries = torch.tensor([0, 4, 6, 9, 10], dtype=torch.int32)
    positions, ends, longest, stored = attention.SharedPrefix((0, 3, 4, 0), boundaries, 10, 4).keys
    assert positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 4, 5, 0, 1, 2, 3, 6, 7, 8, 9]
    assert ends.tolist() == [0, 4, 9, 16, 17] and longest == 4 + 4  # at most
    assert stored.tolist() == [0, 1, 2, 3, 7, 8, 13, 14, 15, 16]
    assert positions[stored].tolist() == list(range(10))


@pytest.mark.parametrize("with_bias", [False, True])
def test_token_losses_carry_the_gradient_of_any_weighting(with_bias: bool) -> None:
    torch.manual_seed(1)
    made = [torch.randn(7, 6), torch.randn(11, 6), *([torch.randn(11)] if with_bias else [])]
    targets, weights = torch.arange(7), torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0, 1.0, -1.0])

    def gradients(plain: bool) -> list[torch.Tensor]:
        hidden, weight, *bias = [tensor.clone().requires_grad_() for tensor in made]
        if plain:
            logits = torch.nn.functional.linear(hidden, weight, *bias)
            losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        else:
            result = token_cross_entropy(
                hidden, weight, targets, 3, bias=bias[0] if bias else None, per_token=True
            )
            assert not result.loss_sum.requires_grad and float(result.loss_sum) == pytest.approx(
                float(result.token_losses.detach().sum())
            )
            losses = result.token_losses
        (losses * weights).sum().backward()
        return [tensor.grad for tensor in (hidden, weight, *bias)]

    for ours, plain in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_a_model_that_drops_what_its_attention_is_told_does_not_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model().float()
    assert find_shortcuts(model).shared_prefix
    assert find_shortcuts(tiny_model(window=4).float()).shared_prefix
    forward = type(model.model.layers[0].self_attn).forward

    def forgetful(self: object, *args: object, shared_prefix: object = None, **kwargs: object) -> object:
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", forgetful)
    assert not find_shortcuts(model).shared_prefix
