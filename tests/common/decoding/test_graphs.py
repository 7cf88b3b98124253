"""The decoder's way on a GPU, on the CPU: flash attention over slots, and passes that are replayed.

torch's op gets the kernel of `test_varlen_on_cpu`; a graph is a function that is called again with the
tensors it was recorded with. What comes out has to be what the CPU's own way gives.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MistralConfig

from common.decoding import decoder, graphs, passes, slots
from common.decoding.decoder import Decoder
from common.decoding.scheduler import FEWEST_ROWS
from common.model import attention, flash_attention
from tests.common.decoding.test_decoder import PARAMS, decode, requests_of, tokens_of
from tests.common.model.test_attention import CONFIGS, SHAPE, tiny
from tests.common.model.test_varlen_on_cpu import forward, varlen

CPU = torch.device("cpu")
WINDOWED = MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=5)


class Replayed:
    """A graph that is there: replaying it computes again from the tensors it was recorded with."""

    def __init__(self, compute: Callable[[], torch.Tensor], output: torch.Tensor) -> None:
        self._compute, self._output = compute, output
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self._output.copy_(self._compute())


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Replayed]:
    """All graphs, in the order in which they are recorded."""
    found: list[Replayed] = []

    def record(compute: Callable[[], torch.Tensor], pool: Any) -> tuple[Replayed, torch.Tensor]:
        output = torch.full_like(compute(), float("nan"))  # recording computes nothing
        found.append(Replayed(compute, output))
        return found[-1], output

    monkeypatch.setattr(graphs, "recorded", record)
    monkeypatch.setattr(graphs, "without_waiting", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return found


class OnGPU(passes.CachedPasses):
    """With the shapes that passes have on a GPU."""

    def __init__(self, model: Any, slots: int, capacity: int, *, graphs: bool = False) -> None:
        super().__init__(model, slots, capacity, graphs=graphs)
        self.on_cpu, self.rows_step, self.chunk_slots = False, FEWEST_ROWS, slots


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    varlen._varlen_attn.register_kernel("cpu")(forward)
    monkeypatch.setattr(flash_attention, "flash_applies", lambda *asked: True)


def as_on_gpu(model: Any, monkeypatch: pytest.MonkeyPatch, slots: int) -> Decoder:
    engine = Decoder(model, slots=slots)
    engine._graphs = True
    monkeypatch.setattr(decoder, "CachedPasses", OnGPU)
    return engine


@pytest.mark.parametrize("window", [None, 3, 1000])
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 4, 32), (4, 2, 64), (6, 1, 16)])
def test_keys_of_slots_are_seen_as_far_as_each_is_long(
    heads: int, groups: int, width: int, window: int | None, flash: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    lengths, capacity = [1, 9, 32, 4, 17, 1, 2, 31], 32
    keys, values = torch.randn(2, 10, groups, capacity, width)  # two slots that no row asks for
    query = torch.randn(heads, len(lengths), width)
    used = torch.tensor(lengths, dtype=torch.int32)
    starts = torch.arange(len(lengths) + 1, dtype=torch.int32)
    places = [torch.arange(len(lengths)), used.long() - 1]
    step = slots.DecodingStep(
        slots.SlotCache(10, capacity), *places, used, starts, starts * capacity, [(0, 8, capacity)]
    )
    scores = attention.Scores(0.3)
    found = slots._attend_to_slots(query, keys, values, step, scores, window)
    monkeypatch.setattr(flash_attention, "flash_applies", lambda *asked: False)
    expected = slots._attend_to_slots(query, keys, values, step, scores, window)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "windows"])
def test_replayed_passes_draw_what_the_cpu_draws(
    kind: str, flash: None, recorded: list[Replayed], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny({**CONFIGS, "windows": WINDOWED}[kind])
    requests = requests_of(20)
    with monkeypatch.context() as plainly:
        plainly.setattr(flash_attention, "flash_applies", lambda *asked: False)
        expected = decode(model, requests, slots=20)
    engine = as_on_gpu(model, monkeypatch, slots=20)
    found = engine.decode(requests, PARAMS)
    assert found is not None and tokens_of(found) == tokens_of(expected)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=5e-6)
    assert len(recorded) > 1 and sum(graph.replays for graph in recorded) > engine.counts.steps / 3


def test_a_shape_is_recorded_after_its_warm_up_and_filled_anew_for_every_replay(
    recorded: list[Replayed],
) -> None:
    def compute(numbers: torch.Tensor) -> torch.Tensor:
        return numbers * 2

    made = graphs.Graphs(CPU)
    for number in range(5):
        for shape in (1, 3):
            out = made.run(shape, compute, [torch.full((shape,), float(number))])
            assert out is not None and out.tolist() == [2 * number] * shape
        assert len(recorded) == (0 if number < graphs.WARM_UP_PASSES else 2)
    assert [graph.replays for graph in recorded] == [5 - graphs.WARM_UP_PASSES] * 2


def test_passes_with_prompts_are_not_recorded(flash: None, recorded: list[Replayed]) -> None:
    model = tiny(CONFIGS["llama"])
    with passes.sampling_from(model, True) as base:
        cached = OnGPU(base, 8, 64, graphs=True)
        rows = np.zeros(8, np.int64)
        for _ in range(graphs.WARM_UP_PASSES + 2):
            cached.forward(rows, rows, [], np.arange(3), [(5, np.full(4, 7))])
        assert not recorded
        for count in (3, 8, 1, 5):  # one shape, however many slots are used
            logits = cached.forward(rows, rows, [], np.arange(count), [])
            assert logits.shape == (count, 64)
    assert len(recorded) == 1 and recorded[0].replays == 2


def test_numbers_of_rows_are_powers_of_two_and_no_more_than_slots() -> None:
    cached = OnGPU(tiny(CONFIGS["llama"]), 200, 64)
    asked = [1, 8, 9, 17, 33, 100, 129, 200]
    assert [cached.padded(count) for count in asked] == [8, 8, 16, 32, 64, 128, 200, 200]
    cached.on_cpu = True
    assert [cached.padded(count) for count in asked] == [8, 8, 16, 24, 40, 104, 136, 200]


def test_where_the_host_has_to_know_lengths_nothing_is_recorded_and_it_is_said_once(
    recorded: list[Replayed], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without flash attention."""
    model, requests = tiny(CONFIGS["llama"]), requests_of(8)
    expected = decode(model, requests)
    engine = as_on_gpu(model, monkeypatch, slots=8)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = engine.decode(requests, PARAMS)
            assert found is not None and tokens_of(found) == tokens_of(expected)
    assert not recorded and caplog.text.count("without CUDA graphs") == 1
    assert "lengths that the host counts" in caplog.text


@pytest.mark.parametrize("at", ["warm-up", "recording"])
def test_what_cannot_be_recorded_is_computed_as_usual(
    at: str, flash: None, recorded: list[Replayed], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    @contextlib.contextmanager
    def refused(*asked: Any) -> Any:
        raise RuntimeError("called a synchronizing CUDA operation\nand more lines")
        yield

    name = {"warm-up": "without_waiting", "recording": "recorded"}[at]
    monkeypatch.setattr(graphs, name, refused if at == "warm-up" else lambda *asked: refused().__enter__())
    model, requests = tiny(CONFIGS["llama"]), requests_of(8)
    engine = as_on_gpu(model, monkeypatch, slots=8)
    with caplog.at_level(logging.WARNING):
        found = engine.decode(requests, PARAMS)
    assert found is not None and tokens_of(found) == tokens_of(decode(model, requests))
    assert "allows none: called a synchronizing CUDA operation (" in caplog.text


def test_the_cpu_records_nothing() -> None:
    assert not Decoder(tiny(CONFIGS["llama"]), slots=4)._graphs


def test_an_older_torch_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    cuda = torch.device("cuda")
    with caplog.at_level(logging.WARNING):
        flash_attention.say_without_used_keys(cuda, torch.bfloat16)
        assert not caplog.text
        monkeypatch.setattr(flash_attention, "_varlen_keywords", lambda: frozenset({"window_size", "scale"}))
        flash_attention.say_without_used_keys(CPU, torch.bfloat16)
        flash_attention.say_without_used_keys(cuda, torch.float32)
        assert not caplog.text
        flash_attention.say_without_used_keys(cuda, torch.bfloat16)
    assert "does not take seqused_k" in caplog.text
