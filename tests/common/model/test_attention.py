from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from common.config import CheckpointingPolicy
from common.errors import UserError
from common.model import attention, flash_attention
from common.model.recomputation import enable_checkpointing

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=8),
    "gemma3_text": Gemma3TextConfig(
        **SHAPE,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gpt_neox": GPTNeoXConfig(**SHAPE),
}
LENGTHS = [5, 1, 9]


def reference_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Packed attention from one N x N mask and a softmax in fp32.

    Shapes as for `packed_attention`; returns [1, N, H, d] in the query's dtype.
    """
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    positions = torch.arange(length, device=query.device)
    document = torch.bucketize(positions, cu_seqlens[1:].to(positions.dtype), right=True)
    seen = attention._seen_by_own(length, sliding_window or length, 0, query.device) & (
        document[:, None] == document[None, :]
    )
    k, v = (x.repeat_interleave(groups, 1).float() for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query.float() @ k.transpose(2, 3)) * scale
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ v).transpose(1, 2).to(query.dtype)


def boundaries(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def tiny(config: PreTrainedConfig, implementation: str = "packed") -> PreTrainedModel:
    attention.register()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


def packed_hidden(model: PreTrainedModel, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    cu_seqlens = boundaries(lengths)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    longest = max(lengths)
    return (
        model.get_decoder()(
            input_ids=ids,
            position_ids=positions,
            use_cache=False,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=longest,
            max_length_k=longest,
        )
        .last_hidden_state[0]
        .detach()
    )


def heads(number: int, length: int, width: int = 8) -> torch.Tensor:
    return torch.randn(1, number, length, width, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 3, 64])
def test_the_loop_over_documents_gives_what_one_masked_softmax_gives(groups: int, window: int | None) -> None:
    torch.manual_seed(0)
    q, k, v = heads(4, 15), heads(groups, 15), heads(groups, 15)
    upstream = torch.randn(1, 15, 4, 8, dtype=torch.float64)
    cu_seqlens = boundaries(LENGTHS)
    out, weights = attention.packed_attention(
        torch.nn.Identity(), q, k, v, None, scaling=0.3, cu_seq_lens_q=cu_seqlens, sliding_window=window
    )
    assert weights is None
    ours = torch.autograd.grad((out * upstream).sum(), (q, k, v))
    expected = reference_attention(q, k, v, cu_seqlens, 0.3, window)
    theirs = torch.autograd.grad((expected * upstream).sum(), (q, k, v))
    # the reference computes in fp32
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_reference_on_three_tokens_worked_by_hand() -> None:
    # one document of one token, one of two; scores are 0, so weights are equal over what is seen
    q, k = torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2)
    v = torch.tensor([[[[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]]]])
    expected = torch.tensor([[[[1.0, 10.0]], [[2.0, 20.0]], [[3.0, 30.0]]]])
    cu_seqlens = torch.tensor([0, 1, 3], dtype=torch.int32)
    assert torch.equal(reference_attention(q, k, v, cu_seqlens), expected)
    out, _ = attention.packed_attention(torch.nn.Identity(), q, k, v, None, cu_seq_lens_q=cu_seqlens)
    assert torch.equal(out, expected)


def test_a_window_counts_the_token_itself() -> None:
    q, k = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2)
    v = torch.tensor([1.0, 2.0, 4.0, 8.0]).view(1, 1, 4, 1).expand(1, 1, 4, 2)
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    out, _ = attention.packed_attention(
        torch.nn.Identity(), q, k, v, None, cu_seq_lens_q=cu_seqlens, sliding_window=2
    )
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([1.0, 1.5, 3.0, 6.0]))


def test_empty_documents_at_the_end_change_nothing() -> None:
    torch.manual_seed(0)
    q, k, v = heads(2, 6), heads(2, 6), heads(2, 6)
    plain = torch.tensor([0, 4, 6], dtype=torch.int32)
    padded = torch.tensor([0, 4, 6, 6, 6], dtype=torch.int32)
    run = lambda cu: attention.packed_attention(torch.nn.Identity(), q, k, v, None, cu_seq_lens_q=cu)[0]  # noqa: E731
    assert torch.equal(run(plain), run(padded))


@pytest.mark.parametrize("kind", CONFIGS)
def test_changing_any_token_of_one_document_leaves_the_others_bit_identical(kind: str) -> None:
    model = tiny(CONFIGS[kind])
    torch.manual_seed(1)
    ids = torch.randint(0, 64, (1, sum(LENGTHS)))
    before = packed_hidden(model, ids, LENGTHS)
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    for position in range(sum(LENGTHS)):
        changed = ids.clone()
        changed[0, position] = (ids[0, position] + 7) % 64
        after = packed_hidden(model, changed, LENGTHS)
        others = document != document[position]
        assert torch.equal(after[others], before[others])
        earlier = torch.arange(sum(LENGTHS)) < position
        assert torch.equal(after[earlier], before[earlier])
        assert not torch.equal(after[position], before[position])


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_packed_document_has_the_hidden_states_it_has_alone_in_plain_transformers(kind: str) -> None:
    packed, plain = tiny(CONFIGS[kind]), tiny(CONFIGS[kind], "sdpa")
    ids = torch.randint(0, 64, (1, sum(LENGTHS)))
    together = packed_hidden(packed, ids, LENGTHS)
    for start, length in ((0, 5), (5, 1), (6, 9)):
        part = slice(start, start + length)
        alone = plain.get_decoder()(input_ids=ids[:, part], use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(together[part], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("policy", CheckpointingPolicy)
def test_gradient_checkpointing_gives_the_same_gradients(kind: str, policy: CheckpointingPolicy) -> None:
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = tiny(CONFIGS[kind]).train()
        if checkpointing:
            enable_checkpointing(model, policy)
        cu_seqlens = boundaries(LENGTHS)
        ids = torch.arange(15)[None]
        positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
        model.get_decoder()(
            input_ids=ids, position_ids=positions, use_cache=False, cu_seq_lens_q=cu_seqlens, max_length_q=9
        ).last_hidden_state.square().sum().backward()
        return [p.grad for p in model.get_decoder().parameters() if p.grad is not None]

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) == len(checkpointed) > 10
    for a, b in zip(plain, checkpointed, strict=True):
        assert torch.equal(a, b)


def test_without_document_boundaries_it_refuses_rather_than_guess() -> None:
    model = tiny(CONFIGS["llama"])
    with pytest.raises(ValueError, match="plain_attention"):
        model(input_ids=torch.arange(4)[None], use_cache=False)


def test_plain_attention_generates_with_padding_and_puts_packed_attention_back() -> None:
    model = tiny(CONFIGS["llama"])
    padded = torch.tensor([[0, 0, 5, 6], [3, 4, 5, 6]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    with attention.plain_attention(model):
        both = model.generate(input_ids=padded, attention_mask=mask, **options)
        alone = model.generate(input_ids=padded[:1, 2:], **options)
    assert both[0, 4:].tolist() == alone[0, 2:].tolist()
    assert model.config._attn_implementation == "packed"


def test_registering_twice_changes_nothing() -> None:
    from transformers import AttentionInterface

    attention.register()
    attention.register()
    assert AttentionInterface()["packed"] is attention.packed_attention


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"position_bias": torch.zeros(2)}, "position bias"),
        ({"is_causal": False}, "later"),
    ],
)
def test_what_no_backend_computes_is_refused_by_name(asked: dict, named: str) -> None:
    q = torch.zeros(1, 2, 3, 8)
    module = torch.nn.Module()
    module.config = LlamaConfig(**SHAPE)
    with pytest.raises(UserError, match=f"model_type=llama.*{named}"):
        attention.packed_attention(
            module, q, q, q, None, cu_seq_lens_q=torch.tensor([0, 3], dtype=torch.int32), **asked
        )


def test_a_soft_cap_and_a_sink_on_two_tokens_worked_by_hand() -> None:
    # one head of width 1, both queries 1: the second sees scores 0 and 2, capped at 1 to 0 and tanh 2
    q, k = torch.ones(1, 1, 2, 1), torch.tensor([0.0, 2.0]).view(1, 1, 2, 1)
    v = torch.tensor([10.0, 30.0]).view(1, 1, 2, 1)
    one = torch.tensor([0, 2], dtype=torch.int32)
    run = lambda **asked: attention.packed_attention(  # noqa: E731
        torch.nn.Identity(), q, k, v, None, scaling=1.0, cu_seq_lens_q=one, **asked
    )[0][0, :, 0, 0]
    high = math.exp(math.tanh(2.0))
    torch.testing.assert_close(run(softcap=1.0), torch.tensor([10.0, (10 + 30 * high) / (1 + high)]))
    # a sink of score 0 takes as much as a key of score 0, and has no value
    total = 2 + math.exp(2.0)
    torch.testing.assert_close(
        run(s_aux=torch.zeros(1)), torch.tensor([5.0, (10 + 30 * math.exp(2.0)) / total])
    )


@pytest.mark.parametrize("window", [None, 3])
def test_sinks_and_caps_that_change_nothing_give_what_plain_attention_gives(window: int | None) -> None:
    torch.manual_seed(0)
    q, k, v = (heads(n, 9) for n in (4, 2, 2))
    cu_seqlens = boundaries([5, 4])
    shared = attention.SharedPrefix((0, 3), cu_seqlens, int(cu_seqlens[-1]), max(LENGTHS))
    run = lambda **asked: attention.packed_attention(  # noqa: E731
        torch.nn.Identity(), q, k, v, None, cu_seq_lens_q=cu_seqlens, sliding_window=window,
        shared_prefix=shared, **asked,
    )[0]  # fmt: skip
    nothing = {"softcap": 1e6, "s_aux": torch.full((4,), -1e4)}
    torch.testing.assert_close(run(**nothing), run(), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 4])
def test_varlen_attention_agrees_with_the_reference(window: int | None) -> None:
    torch.manual_seed(0)
    q, k, v = (heads(n, 15, 64).detach().to("cuda", torch.bfloat16).requires_grad_() for n in (4, 2, 2))
    cu_seqlens = boundaries(LENGTHS).cuda()
    assert flash_attention.flash_applies(q, v, 0.0)
    out, _ = attention.packed_attention(
        torch.nn.Identity(), q, k, v, None, cu_seq_lens_q=cu_seqlens, max_length_q=9, sliding_window=window
    )
    expected = reference_attention(q, k, v, cu_seqlens, None, window)
    # bf16 keeps 8 bits: one part in 128 after a sum of rounded products
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    out.float().square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))
