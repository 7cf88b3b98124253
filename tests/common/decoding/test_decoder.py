"""Responses of small random models, against a loop that knows no cache, no slots and no packing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import CohereConfig, Gemma3TextConfig, PreTrainedModel

from common.decoding import passes, scheduler
from common.decoding.decoder import Decoder
from common.decoding.draws import Drawn, choose, uniforms
from common.decoding.requests import Completion, Request, SamplingParams
from common.decoding.slots import DecodingStep
from common.errors import UserError
from common.model import attention
from common.model.miniature import TOLERANCE, difference
from tests.common.model.test_attention import CONFIGS, SHAPE, tiny
from tests.packed import packed_lm

MODELS = {**CONFIGS, "cohere": CohereConfig(**SHAPE, logit_scale=0.5)}
PARAMS = SamplingParams(temperature=1.3, max_new_tokens=20, terminators=(1, 2, 3, 4))


def requests_of(count: int, samples: int = 2, seed: int = 0) -> list[Request]:
    """Prompts of 1 to 29 tokens, each asked for `samples` times."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(5, 64, rng.integers(1, 30)).astype(np.int32) for _ in range(count)]
    return [Request(prompt, (i, k)) for i, prompt in enumerate(prompts) for k in range(samples)]


def plain_loop(model: Any, request: Request, params: SamplingParams) -> Completion:
    """One token after the other, each from a forward pass over everything before it, under plain SDPA."""
    ids, logprobs, numbers = request.prompt.tolist(), [], uniforms(request.key, params.max_new_tokens)
    with torch.no_grad(), attention.plain_attention(model):
        for number in numbers:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double().numpy()
            logprob = logits / params.temperature
            logprob -= np.log(np.exp(logprob - logprob.max()).sum()) + logprob.max()
            ids.append(int(np.searchsorted(np.exp(logprob).cumsum(), number, side="right")))
            logprobs.append(logprob[ids[-1]])
            if ids[-1] in params.terminators:
                break
    stopped = ids[-1] in params.terminators
    return Completion(np.array(ids[len(request.prompt) :]), np.array(logprobs), stopped)


def decode(model: Any, requests: Sequence[Request], slots: int = 8, **changes: Any) -> list[Completion]:
    params = SamplingParams(**{**vars(PARAMS), **changes})
    completions = Decoder(model, slots=slots).decode(requests, params)
    assert completions is not None
    return completions


def tokens_of(completions: Sequence[Completion]) -> list[list[int]]:
    return [completion.tokens.tolist() for completion in completions]


def bits_of(completions: Sequence[Completion]) -> list[tuple[Any, ...]]:
    return [(c.tokens.tolist(), c.logprobs.tobytes(), c.stopped) for c in completions]


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny(CONFIGS["llama"])


@pytest.mark.parametrize("kind", MODELS)
def test_a_response_is_what_a_plain_loop_over_the_same_draws_gives(kind: str) -> None:
    model = tiny(MODELS[kind])
    requests = requests_of(8)
    engine = Decoder(model, slots=5)
    assert engine.has_cache
    found = engine.decode(requests, PARAMS)
    assert found is not None
    expected = [plain_loop(model, request, PARAMS) for request in requests]
    assert tokens_of(found) == tokens_of(expected)
    assert [c.stopped for c in found] == [c.stopped for c in expected]
    assert {c.stopped for c in found} == {True, False}  # both ways to end occur
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-6)  # fp32 beside float64
        assert ours.tokens.dtype == np.int32 and ours.logprobs.dtype == np.float32


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "llama" else pytest.mark.slow) for kind in MODELS]
)
def test_nothing_beside_a_response_changes_a_bit_of_it(kind: str) -> None:
    model = tiny(MODELS[kind])
    requests = requests_of(24)
    expected = bits_of(decode(model, requests, slots=64))
    assert len({tuple(tokens) for tokens, *_ in expected}) > 40
    for slots in (1, 3, 8):
        assert bits_of(decode(model, requests, slots)) == expected
    order = np.random.default_rng(1).permutation(len(requests))
    shuffled = bits_of(decode(model, [requests[i] for i in order], slots=7))
    assert shuffled == [expected[i] for i in order]
    others = requests_of(30, samples=1, seed=9)
    mixed = bits_of(decode(model, [*others[:15], *requests[:5], *others[15:]], slots=8))
    assert mixed[15:20] == expected[:5]


def test_rows_that_top_p_keeps_much_of_are_drawn_as_if_all_tokens_had_been_in_order(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = requests_of(8)
    expected = decode(llama, requests, top_p=0.6)
    assert tokens_of(expected) != tokens_of(decode(llama, requests))
    again: list[int] = []

    def choosing(logits: Any, numbers: Any, params: Any, most: int = 25) -> Drawn:
        drawn = choose(logits, numbers, params, most)
        again.append(int((~drawn.is_sure).sum()))
        return drawn

    monkeypatch.setattr(scheduler, "choose", choosing)
    assert bits_of(decode(llama, requests, top_p=0.6)) == bits_of(expected)
    assert any(again) and not all(again)


def test_two_threads_draw_what_one_draws(llama: PreTrainedModel) -> None:
    requests = requests_of(24)
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(tokens_of(decode(llama, requests, slots=16)))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_long_and_short_responses_change_places_without_harm(llama: PreTrainedModel) -> None:
    """Slots are sorted and the batch shrinks several times."""
    rng = np.random.default_rng(3)
    lengths = np.where(rng.random(90) < 0.2, 40, rng.integers(1, 6, 90))
    prompts = requests_of(90, samples=1)
    requests = [
        Request(request.prompt[:20], request.key, int(length))
        for request, length in zip(prompts, lengths, strict=True)
    ]
    params = SamplingParams(1.0, 44, ())
    engine = Decoder(llama, slots=32)
    found = engine.decode(requests, params)
    assert found is not None and [len(c.tokens) for c in found] == lengths.tolist()
    assert engine.counts.tokens == lengths.sum() and engine.counts.slot_utilisation > 0.6
    for request, completion in zip(requests[::9], found[::9], strict=True):
        alone = SamplingParams(1.0, len(completion.tokens), ())
        assert completion.tokens.tolist() == plain_loop(llama, request, alone).tokens.tolist()


def test_a_prompt_that_requests_share_is_computed_once(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = requests_of(4, samples=5)
    requests = [requests[i] for i in np.random.default_rng(0).permutation(20)]
    seen: list[int] = []
    forward = passes.CachedPasses.forward

    def counted(self: Any, tokens: Any, positions: Any, chunks: Any, wanted: Any, prompts: Any) -> Any:
        seen.extend(len(ids) for _, ids in prompts)
        return forward(self, tokens, positions, chunks, wanted, prompts)

    engine = Decoder(llama, slots=3)
    monkeypatch.setattr(passes.CachedPasses, "forward", counted)
    found = engine.decode(requests, PARAMS)
    assert sorted(seen) == sorted(
        {request.prompt.tobytes(): len(request.prompt) for request in requests}.values()
    )
    assert found is not None
    assert tokens_of(found) == [plain_loop(llama, r, PARAMS).tokens.tolist() for r in requests]


def test_an_adapter_takes_part_in_what_is_sampled() -> None:
    base = tiny(CONFIGS["llama"])
    requests = requests_of(8)
    before = tokens_of(decode(base, requests))
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5)
    model = peft.get_peft_model(base, config).train()
    found = tokens_of(decode(model, requests))
    assert found != before
    with model.disable_adapter():
        assert tokens_of(decode(model, requests)) == before
    model.eval()
    assert found == [plain_loop(base, request, PARAMS).tokens.tolist() for request in requests]


def test_weights_may_change_between_calls() -> None:
    model = tiny(CONFIGS["llama"])
    engine, requests = Decoder(model, slots=8), requests_of(8)
    before = engine.decode(requests, PARAMS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    after = engine.decode(requests, PARAMS)
    assert before is not None and after is not None and tokens_of(before) != tokens_of(after)
    assert tokens_of(after) == [plain_loop(model, request, PARAMS).tokens.tolist() for request in requests]


WRONG = {
    "no mask": (DecodingStep, "bias", lambda right: lambda *asked: torch.zeros_like(right(*asked))),
    "a window ignored": (
        DecodingStep, "bias", lambda right: lambda self, window, dtype: right(self, None, dtype),
    ),
    "positions off by one": (
        passes.CachedPasses, "forward",
        lambda right: lambda self, tokens, positions, *rest: right(self, tokens, positions + 1, *rest),
    ),
    "a neighbour's slot": (
        DecodingStep, "write",
        lambda right: lambda self, keys, values, key, value: right(self, keys.roll(1, 0), values, key, value),
    ),
}  # fmt: skip
"""What is patched in a decoder so that its cache is wrong."""


def large_in_bf16() -> PreTrainedModel:
    """Larger than its miniature; a window that no short text fills; logits as spread as trained ones."""
    sizes = {**SHAPE, "vocab_size": 300, "num_hidden_layers": 12, "intermediate_size": 256}
    config = Gemma3TextConfig(**sizes, num_key_value_heads=2, head_dim=8, sliding_window=512)
    model = tiny(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(15)
    return model


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_cache_is_found_in_half_precision(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = large_in_bf16()
    owner, name, wrong = WRONG[fault]
    monkeypatch.setattr(owner, name, wrong(getattr(owner, name)))
    assert not Decoder(model, slots=4).has_cache


def test_rounding_does_not_cost_a_model_its_cache() -> None:
    """Two right ways through it differ by a hundred times what two ways through its miniature may."""
    model, ids = large_in_bf16(), torch.arange(3, 15)[None]
    with torch.no_grad():
        packed = packed_lm(model).logits(ids).float()
        with attention.plain_attention(model):
            plain = model(input_ids=ids, use_cache=False).logits[0].float()
    assert difference(plain, packed, torch.bfloat16) > 100 * TOLERANCE
    assert Decoder(model, slots=4).has_cache


def test_a_model_whose_cache_would_be_wrong_is_decoded_without_and_says_so(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    requests = requests_of(6)
    expected = decode(llama, requests)
    owner, name, wrong = WRONG["no mask"]
    monkeypatch.setattr(owner, name, wrong(getattr(owner, name)))
    with caplog.at_level(logging.WARNING):
        engine = Decoder(llama, slots=4)
    assert not engine.has_cache and "without a key/value cache" in caplog.text
    found = engine.decode(requests, PARAMS)
    assert found is not None and tokens_of(found) == tokens_of(expected)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-6)


def test_half_precision_stays_near_what_packed_training_says_of_its_tokens() -> None:
    model = tiny(CONFIGS["qwen3"]).to(torch.bfloat16)
    requests = requests_of(8)
    for request, completion in zip(requests, decode(model, requests), strict=True):
        ids = torch.tensor([[*request.prompt.tolist(), *completion.tokens.tolist()]])
        with torch.no_grad(), attention.plain_attention(model):
            scores = model(input_ids=ids, use_cache=False).logits[0].float() / PARAMS.temperature
        expected = scores.log_softmax(1)[len(request.prompt) - 1 : -1].numpy()
        of_tokens = expected[np.arange(len(completion.tokens)), completion.tokens]
        np.testing.assert_allclose(completion.logprobs, of_tokens, atol=0.05)  # 8 bits of mantissa


def test_the_mode_the_attention_and_all_generators_are_left_as_they_were(llama: PreTrainedModel) -> None:
    llama.train()
    llama.get_decoder().layers[0].eval()
    torch.manual_seed(5)
    np.random.seed(5)
    modes = [module.training for module in llama.modules()]
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()

    def fail() -> bool:
        raise RuntimeError("asked")

    try:
        decode(llama, requests_of(3))
        with pytest.raises(RuntimeError, match="asked"):
            Decoder(llama, slots=2).decode(requests_of(3), PARAMS, should_stop=fail)
        assert [module.training for module in llama.modules()] == modes and len(set(modes)) == 2
    finally:
        llama.eval()
    assert llama.config._attn_implementation == attention.NAME
    assert torch.equal(torch.get_rng_state(), before) and (np.random.get_state()[1] == numpy_before).all()
    assert torch.is_grad_enabled()


def test_who_is_told_to_stop_leaves_without_a_result(llama: PreTrainedModel) -> None:
    asked: list[int] = []

    def second_time() -> bool:
        asked.append(1)
        return len(asked) == 2

    engine = Decoder(llama, slots=2)
    params = SamplingParams(1.0, 30, ())
    assert engine.decode(requests_of(20), params, should_stop=second_time) is None
    assert len(asked) == 2 and 0 < engine.counts.steps < 40


def test_a_response_ends_where_the_models_context_does(llama: PreTrainedModel) -> None:
    prompt = np.full(60, 7, np.int32)
    (found,) = decode(llama, [Request(prompt, (0,))], terminators=())
    assert len(found.tokens) == 4 and not found.stopped  # of 64 positions
    with pytest.raises(UserError, match="64 tokens leaves no room"):
        decode(llama, [Request(np.full(64, 7, np.int32), (0,))])


def test_logits_that_are_not_finite_are_an_error_in_words() -> None:
    model = tiny(CONFIGS["llama"])
    engine = Decoder(model, slots=2)
    with torch.no_grad():
        model.get_decoder().norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        engine.decode(requests_of(2), PARAMS)


def test_no_requests_are_no_work(llama: PreTrainedModel) -> None:
    assert Decoder(llama, slots=4).decode([], PARAMS) == []


def test_temperature_zero_takes_the_likeliest_token(llama: PreTrainedModel) -> None:
    request = requests_of(1)[0]
    (found,) = decode(llama, [request], temperature=0, terminators=())
    ids = torch.tensor([[*request.prompt.tolist(), *found.tokens.tolist()]])
    with torch.no_grad(), attention.plain_attention(llama):
        logprobs = (
            llama(input_ids=ids, use_cache=False).logits[0].log_softmax(1)[len(request.prompt) - 1 : -1]
        )
    assert found.tokens.tolist() == logprobs.argmax(1).tolist()
    np.testing.assert_allclose(found.logprobs, logprobs.amax(1).numpy(), atol=2e-6)
