"""The load-balancing loss of a mixture's routers, beside transformers' own."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from common.data.types import Batch
from common.errors import UserError
from common.model import attention
from common.model.packed import batch_arguments
from common.model.router_balance import KEY, RouterBalance, routers_of
from tests.common.model.test_packed import batch_of
from tests.packed import packed_lm
from tests.tiny import SHAPE

CPU = torch.device("cpu")
VOCABULARY = 61
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                  "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


def mixture(kind: str, attn_implementation: str = attention.NAME) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    attention.register()
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SHAPE, **MIXTURES[kind]}, vocab_size=VOCABULARY)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation).train()


DOCUMENTS = torch.randint(1, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))
EVERYTHING = [[*range(8)]] * 3
COEFFICIENT = 0.5  # large, so that a wrong gradient shows


def transformers_loss(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The token mean of a batch of whole rows, and the mean over layers of transformers' own function."""
    out = model(input_ids=ids, use_cache=False, output_router_logits=True)
    function = sys.modules[type(model).__module__].load_balancing_loss_func
    losses = [function((logits,), 4, 2) for logits in out.router_logits]
    tokens = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return tokens, torch.stack(losses).mean()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("kind", MIXTURES)
def test_the_loss_and_its_gradient_are_those_of_transformers_layer_by_layer(
    kind: str, checkpointing: bool
) -> None:
    reference, model = mixture(kind, "sdpa"), mixture(kind)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens, balance = transformers_loss(reference, DOCUMENTS)
    (tokens + COEFFICIENT * balance).backward()
    packed = packed_lm(model)
    batch = batch_of(DOCUMENTS.tolist(), EVERYTHING)
    metrics = RouterBalance(packed, COEFFICIENT).count([batch], CPU, 1.0)
    (packed(**batch_arguments(batch)).loss_sum / len(batch.targets)).backward()
    assert metrics["aux_loss"] == pytest.approx(balance.item(), rel=1e-6)
    expected, found = gradients(reference), gradients(model)
    assert any("gate" in name or "router" in name for name in found)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_in_one_layer_it_is_what_transformers_adds_to_its_loss() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    attention.register()
    torch.manual_seed(0)
    shape = {**SHAPE, "num_hidden_layers": 1, **MIXTURES["qwen3_moe"], "vocab_size": VOCABULARY}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **shape))
    with torch.no_grad():
        expected = model(input_ids=DOCUMENTS, output_router_logits=True).aux_loss
    model.set_attn_implementation(attention.NAME)
    batch = batch_of(DOCUMENTS.tolist(), EVERYTHING)
    found = RouterBalance(packed_lm(model), COEFFICIENT).count([batch], CPU, 1.0)
    assert found["aux_loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_micro_batches_and_padding_change_nothing() -> None:
    """Counted over the step, the gradient does not depend on how the step is cut, and filler is no token."""
    whole, cut = packed_lm(mixture("qwen3_moe")), packed_lm(mixture("qwen3_moe"))
    batch = batch_of(DOCUMENTS.tolist(), EVERYTHING)
    first, rest = (batch_of(DOCUMENTS[part].tolist(), EVERYTHING[part]) for part in (slice(1), slice(1, 3)))
    first = padded(first, 5)
    metrics = []
    for packed, parts in ((whole, [batch]), (cut, [first, rest])):
        balance = RouterBalance(packed, COEFFICIENT)
        metrics.append(balance.count(parts, CPU, 1.0))
        for part in parts:
            (packed(**batch_arguments(part)).loss_sum / len(batch.targets)).backward()
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-6)
    found, expected = gradients(cut.model), gradients(whole.model)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


def padded(batch: Batch, count: int) -> Batch:
    """With a document of padding behind."""
    length = batch.input_ids.shape[1]
    return replace(
        batch,
        input_ids=torch.nn.functional.pad(batch.input_ids, (0, count)),
        position_ids=torch.cat([batch.position_ids, torch.arange(count)[None]], 1),
        cu_seqlens=torch.cat([batch.cu_seqlens, torch.tensor([length + count], dtype=torch.int32)]),
        padding=count,
    )


def test_passes_without_gradients_and_before_counting_are_left_alone() -> None:
    packed = packed_lm(mixture("mixtral"))
    batch = batch_of(DOCUMENTS.tolist(), EVERYTHING)
    before = packed(**batch_arguments(batch)).loss_sum
    balance = RouterBalance(packed, COEFFICIENT)
    assert torch.equal(packed(**batch_arguments(batch)).loss_sum, before)
    balance.count([batch], CPU, 1.0)
    with torch.no_grad():
        assert torch.equal(packed(**batch_arguments(batch)).loss_sum, before)
    assert torch.equal(packed(**batch_arguments(batch)).loss_sum, before)  # the gradient is another's


def test_one_expert_that_takes_all_is_seen() -> None:
    """Of four experts, two for a token: a router that always takes the first two has a load of two, and a
    loss of 4 (1/2 + 1/2) where it is sure of both."""
    packed = packed_lm(mixture("qwen3_moe"))
    with torch.no_grad():
        for router in routers_of(packed.base()):
            router.module.weight.zero_()
            router.module.register_forward_hook(sure_of_two, prepend=True)
    found = RouterBalance(packed, COEFFICIENT).count([batch_of(DOCUMENTS.tolist(), EVERYTHING)], CPU, 1.0)
    assert found["max_expert_load"] == pytest.approx(2)
    assert found["aux_loss"] == pytest.approx(4)


def sure_of_two(module: Any, arguments: Any, outputs: tuple[torch.Tensor, ...]) -> Any:
    logits = torch.full_like(outputs[0], -100)
    logits[:, :2] = 0
    return (logits, *outputs[1:])


@pytest.mark.parametrize(
    ("kind", "fields", "why"),
    [
        ("llama", {}, "has no experts"),
        ("deepseek_v3", {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
                         "first_k_dense_replace": 0, "moe_intermediate_size": 16, "kv_lora_rank": 8,
                         "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
         "not trained with it"),
        ("minimax_m2", {"num_local_experts": 4, "num_experts_per_tok": 2}, "balanced by a bias"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_networks_that_have_no_such_loss_are_refused(kind: str, fields: dict[str, Any], why: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        config = AutoConfig.for_model(kind, **{**SHAPE, **fields}, vocab_size=VOCABULARY)
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        UserError, match=rf"{KEY} .*model_type={kind} {why}|{KEY} .*model_type={kind} .*{why}"
    ):
        routers_of(model)


def test_routers_that_prefer_some_experts_learn_to_take_all() -> None:
    """By this loss alone: that of tokens has no weight here."""
    packed = packed_lm(mixture("qwen3_moe"))
    weights = [router.module.weight for router in routers_of(packed.base())]
    with torch.no_grad():
        for weight in weights:
            weight.mul_(40)
    balance, batch = RouterBalance(packed, 1.0), batch_of(DOCUMENTS.tolist(), EVERYTHING)
    optimizer, seen = torch.optim.AdamW(weights, lr=0.05), []
    for _ in range(20):
        seen.append(balance.count([batch], CPU, 1.0))
        (packed(**batch_arguments(batch)).loss_sum * 0).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert seen[0]["aux_loss"] > 2.1 and seen[-1]["aux_loss"] < (seen[0]["aux_loss"] + 2) / 2
