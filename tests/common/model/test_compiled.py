"""Compiled layers: one graph for batches of any documents, and the numbers of layers that are not compiled.

The CUDA branches of attention run on the CPU, by the kernels of `test_varlen_on_cpu` and
`test_efficient_attention`. Graphs are run by torch's operations, not by kernels made for them: what is
compiled is tested, not what Inductor makes of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from common.config import CheckpointingPolicy, Dtype, ModelConfig
from common.data.batches import collate
from common.data.types import Batch, TokenizedExample
from common.model import attention, compiled, loading, packed, recomputation
from common.model.architecture import CAUSAL_LM, build_config
from common.model.packed import PackedCausalLM, batch_arguments
from common.model.probes import find_shortcuts
from tests.common.model import test_varlen_on_cpu as varlen_on_cpu
from tests.common.model.test_efficient_attention import standing_in

GPU, CPU = torch.device("cuda"), torch.device("cpu")
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 128, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip


def take_cuda_branch(monkeypatch: pytest.MonkeyPatch, name: str = "_varlen") -> None:
    """Attention as on a GPU, layers compiled without kernels of their own."""
    varlen = varlen_on_cpu.varlen
    varlen._varlen_attn.register_kernel("cpu")(varlen_on_cpu.forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(varlen_on_cpu.backward)
    branch = getattr(attention, name)
    monkeypatch.setattr(attention, "_in_one_call", lambda *_: branch)

    def arguments(*given: Any) -> dict[str, Any]:
        made = attention.packed_arguments(*given)
        if "shared_prefix" in made:
            made["shared_prefix"].keys  # noqa: B018  (as on a GPU)
        return made

    monkeypatch.setattr(packed, "packed_arguments", arguments)
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: real(self, backend="aot_eager"))


@pytest.fixture(params=["_varlen", "_efficient"])
def cuda_branch(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    take_cuda_branch(monkeypatch, request.param)
    torch._dynamo.reset()
    counters.clear()
    with standing_in():
        yield
    torch._dynamo.reset()


def model(model_type: str, **fields: Any) -> PackedCausalLM:
    attention.register()
    config = build_config({**SIZES, "model_type": model_type, **fields})
    network = loading.make_network(config, ModelConfig(dtype=Dtype.fp32), CAUSAL_LM)
    return PackedCausalLM(network.train(), find_shortcuts(network))


def batch(draws: np.random.Generator, *, shared: bool) -> Batch:
    """Two to eight documents of up to 40 tokens; shared: neighbours begin alike."""
    lengths = draws.integers(3, 40, draws.integers(2, 9))
    documents = [
        TokenizedExample(np.full(length, 7, np.int32), np.full(length, 5, np.int32), "") for length in lengths
    ]
    groups = [index // 2 for index in range(len(documents))]
    return collate(documents, range(len(lengths)), [0] * len(lengths), groups if shared else None)


def learned(module: PackedCausalLM, given: Batch) -> list[torch.Tensor]:
    """The loss, and the gradient of each weight."""
    loss = module(**batch_arguments(given)).loss_sum
    weights = list(module.parameters())
    return [loss.detach(), *torch.autograd.grad(loss, weights)]


@pytest.mark.usefixtures("cuda_branch")
@pytest.mark.parametrize(
    ("model_type", "fields", "graphs"),
    [
        ("llama", {}, 3),  # for the first batch, for other lengths, with shared prefixes
        ("mistral", {"sliding_window": 6}, 3),
        ("qwen3", {}, 3),
    ],
)
def test_batches_of_any_documents_need_three_graphs_without_breaks_and_learn_the_same(
    model_type: str, fields: dict[str, Any], graphs: int
) -> None:
    torch.manual_seed(0)
    plain = model(model_type, **fields)
    ours = copy.deepcopy(plain)
    compiled.compile_layers(ours.base())
    draws = np.random.default_rng(0)
    for number in range(10):
        given = batch(draws, shared=number % 2 == 0)
        for one, other in zip(learned(ours, given), learned(plain, given), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # fp32, sums in another order
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


@pytest.mark.usefixtures("cuda_branch")
def test_layers_that_are_compiled_and_recomputed_selectively_learn_the_same() -> None:
    torch.manual_seed(0)
    plain = model("llama")
    ours = copy.deepcopy(plain)
    recomputation.enable_checkpointing(ours.base(), CheckpointingPolicy.selective)
    compiled.compile_layers(ours.base())
    draws = np.random.default_rng(0)
    for number in range(4):
        given = batch(draws, shared=number % 2 == 0)
        for one, other in zip(learned(ours, given), learned(plain, given), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # fp32, sums in another order
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    ("config", "stage", "has_compiler", "expected"),
    [
        (ModelConfig(), 1, True, True),
        (ModelConfig(), 3, True, False),
        (ModelConfig(), 2, False, False),
        (ModelConfig(compile=False), 1, True, False),
        (ModelConfig(compile=True), 3, True, True),
    ],
    ids=["GPU", "ZeRO-3", "no compiler", "off", "on"],
)
def test_layers_are_compiled_on_a_gpu_unless_something_is_in_the_way(
    monkeypatch: pytest.MonkeyPatch, config: ModelConfig, stage: int, has_compiler: bool, expected: bool
) -> None:
    notices: list[str] = []
    monkeypatch.setattr(compiled, "notice", lambda *words: notices.append(words[0]))
    monkeypatch.setattr("torch.utils._triton.has_triton_package", lambda: True)
    monkeypatch.setattr(compiled.shutil, "which", lambda tool: "/usr/bin/cc" if has_compiler else None)
    assert compiled.settled(config, GPU, stage).compile is expected
    assert notices == ([] if expected or config.compile is not None else [compiled.NOT_COMPILED])
    assert compiled.settled(config, CPU, stage).compile is bool(config.compile)
