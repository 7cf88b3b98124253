"""Forward passes that give the logits of next tokens: from a KV cache of slots, or without a cache.

Takes the model and the state of a scheduler; returns logits. Also finds out, on a miniature, whether an
architecture can be decoded from a cache of slots. Chooses no token and no slot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import nn

from common.decoding.graphs import Graphs
from common.decoding.scheduler import CPU_CHUNK_SLOTS, FEWEST_ROWS, LENGTH_STEP, Scheduler, rounded_up
from common.decoding.slots import DecodingStep, SlotCache, decoding_into_slots
from common.errors import UserError
from common.model.adapters import unwrapped
from common.model.attention import packed_arguments, plain_attention, positions_within
from common.model.miniature import device_of, differ, difference, miniature_of, some_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CPU_ROWS = 32
"""On the CPU a forward pass has a multiple of so many rows: two vectors of the widest instructions."""


class PassShape(NamedTuple):
    """How much a pass computes. rows: next tokens, of the slots from 0 on. written: tokens that go into the
    cache. tokens: with padding. kept: rows of logits. documents: prompts, and padding. longest: tokens of the
    longest of these."""

    rows: int
    written: int
    tokens: int
    kept: int
    documents: int
    longest: int


class CachedPasses:
    """From a cache: one token of each slot, and whole prompts, in one flat sequence.

    graphs: passes without prompts are replayed as CUDA graphs where that works; they end with this object, as
    its cache does. The host sends two arrays for each pass, whatever the layers.
    """

    def __init__(self, model: PreTrainedModel, slots: int, capacity: int, *, graphs: bool = False) -> None:
        self.model = model
        self.cache = SlotCache(slots, capacity)
        self.device = device_of(model)
        self.on_cpu = self.device.type == "cpu"
        self.graphs = Graphs(self.device) if graphs else None
        self.chunk_slots = CPU_CHUNK_SLOTS if self.on_cpu else slots
        self.rows_step = CPU_ROWS if self.on_cpu else FEWEST_ROWS
        self.copy, self.rearrange = self.cache.copy, self.cache.rearrange

    def padded(self, count: int) -> int:
        """On a GPU 8, 16, 32, 64 and so on: few shapes, each with a graph."""
        blocks = -(-count // FEWEST_ROWS)
        if not self.on_cpu:
            blocks = 1 << (blocks - 1).bit_length()
        return min(blocks * FEWEST_ROWS, self.cache.slots)

    def logits(
        self, scheduler: Scheduler, rows: int, going_on: np.ndarray, prompts: Sequence[tuple[int, np.ndarray]]
    ) -> torch.Tensor:
        chunks = scheduler.chunks(rows, self.chunk_slots) if rows else []
        # a free slot's row writes behind what it holds, where its next response will write before reading
        tokens, positions = scheduler.last[:rows], scheduler.length[:rows]
        return self.forward(tokens, positions, chunks, going_on, prompts)

    def forward(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        chunks: Sequence[tuple[int, int, int]],
        wanted: np.ndarray,
        prompts: Sequence[tuple[int, np.ndarray]],
    ) -> torch.Tensor:
        """Logits of the rows `wanted` and of the prompts' ends, until the next pass.

        tokens, positions: int64 [M] of the slots 0 to M - 1. chunks: see `DecodingStep`.
        """
        shape, *inputs = self._inputs(tokens, positions, wanted, prompts)
        logits = None
        if self.graphs is not None and not shape.documents:
            logits = self.graphs.run(shape, partial(self._compute, shape, ()), inputs)
        if logits is None:
            sent = (given.to(self.device, non_blocking=True) for given in inputs)
            logits = self._compute(shape, chunks, *sent)
        return logits[: len(wanted) + len(prompts)]

    def _inputs(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        wanted: np.ndarray,
        prompts: Sequence[tuple[int, np.ndarray]],
    ) -> tuple[PassShape, torch.Tensor, torch.Tensor]:
        """What `_compute` takes, on the host: int64 (tokens, their positions, the slots that these go to,
        rows of logits) and int32 (`lengths`, bounds of queries, keys and prompts of `DecodingStep`)."""
        rows, documents = len(tokens), [ids for _, ids in prompts]
        written = rows + sum(map(len, documents))
        short = rounded_up(max(written, 1), self.rows_step) - written
        followed = [*documents, np.zeros(short, np.int64)] if short else documents
        ends = np.cumsum([rows, *map(len, documents)])[1:] - 1
        fewest = FEWEST_ROWS if self.on_cpu else max(FEWEST_ROWS, rows)
        kept = np.concatenate([wanted, ends])
        kept = np.pad(kept, (0, max(0, fewest - len(kept))))
        places = [positions, *(np.arange(len(part)) for part in followed)]
        slots = [np.arange(rows), *(np.full(len(ids), slot) for slot, ids in prompts)]
        lengths = np.ones(rows, np.int64)  # of a free slot one key is read
        lengths[wanted] = positions[wanted] + 1
        starts = np.arange(rows + 1)
        bounds = [np.cumsum([0, *map(len, followed)])] if followed else []
        numbers = np.concatenate([tokens, *followed, *places, *slots, kept]).astype(np.int64)
        sizes = np.concatenate([lengths, starts, starts * self.cache.capacity, *bounds]).astype(np.int32)
        longest = max(map(len, followed), default=0)
        shape = PassShape(rows, written, written + short, len(kept), len(followed), longest)
        return shape, torch.from_numpy(numbers), torch.from_numpy(sizes)

    def _compute(
        self,
        shape: PassShape,
        chunks: Sequence[tuple[int, int, int]],
        numbers: torch.Tensor,
        sizes: torch.Tensor,
    ) -> torch.Tensor:
        """[kept, V]: logits, from what `_inputs` gives, on the device."""
        rows, count = shape.rows, shape.tokens
        ids, places, slots, kept = numbers.split([count, count, shape.written, shape.kept])
        bounds = shape.documents + 1 if shape.documents else 0
        lengths, queries, keys, prompts = sizes.split([rows, rows + 1, rows + 1, bounds])
        step = DecodingStep(
            self.cache, slots, places[: shape.written], lengths, queries, keys, chunks,
            prompts if bounds else None, shape.longest,
        )  # fmt: skip
        output = cast(Any, self.model)(
            input_ids=ids[None],
            position_ids=places[None],
            attention_mask=None,
            use_cache=False,
            logits_to_keep=kept,
            decoding=step,
        )
        return cast(torch.Tensor, output.logits[0])


class UncachedPasses:
    """Without a cache: every response from its prompt on, packed, at every step."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.device = device_of(model)
        self.chunk_slots = CPU_CHUNK_SLOTS

    def padded(self, count: int) -> int:
        return rounded_up(count, FEWEST_ROWS)

    def logits(
        self, scheduler: Scheduler, rows: int, going_on: np.ndarray, prompts: Sequence[tuple[int, np.ndarray]]
    ) -> torch.Tensor:
        documents = [*(scheduler.history(slot) for slot in going_on.tolist()), *(ids for _, ids in prompts)]
        padding = [np.zeros(FEWEST_ROWS, np.int64)] if sum(map(len, documents)) < FEWEST_ROWS else []
        lengths = [*map(len, [*documents, *padding])]
        cu_seqlens = torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)).to(self.device)
        ids = torch.from_numpy(np.concatenate([*documents, *padding]).astype(np.int64)).to(self.device)[None]
        ends = np.cumsum(lengths)[: len(documents)] - 1
        kept = np.pad(ends, (0, max(0, FEWEST_ROWS - len(ends))))
        arguments = packed_arguments(
            ids, positions_within(cu_seqlens, ids.shape[1]), cu_seqlens, max(lengths)
        )
        output = cast(Any, self.model)(**arguments, logits_to_keep=torch.from_numpy(kept).to(self.device))
        return cast(torch.Tensor, output.logits[0, : len(documents)])

    def copy(self, source: int, targets: Sequence[int], length: int) -> None:
        pass

    def rearrange(self, order: Sequence[int], length: int) -> None:
        pass


@contextmanager
def sampling_from(model: nn.Module, has_cache: bool) -> Iterator[PreTrainedModel]:
    """The transformers model, without gradients, in evaluation mode and with the attention that is needed."""
    base = unwrapped(model)
    training = [module for module in model.modules() if module.training]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # lengths differ at every step
        if has_cache:
            stack.enter_context(decoding_into_slots(base))
        model.eval()
        try:
            yield base
        finally:
            for module in training:
                module.training = True


def fault_of_cache(model: PreTrainedModel) -> str | None:
    """Why an architecture cannot be decoded from a cache of slots; None where it can.

    Two texts, decoded side by side in a miniature, must get the logits that they get at once.
    """
    small = miniature_of(model)
    ids = some_tokens(small, 12)
    try:
        with sampling_from(small, True):
            decoded = _decode_known(small, ids[0].cpu().numpy())
        with sampling_from(small, False), plain_attention(small):
            whole = cast(Any, small)(input_ids=torch.cat([ids, ids.flip(1)]), use_cache=False).logits
    except (AttributeError, TypeError, ValueError, IndexError, KeyError, RuntimeError, UserError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    expected = torch.cat([whole[0, 4:], whole[1, 7:]]).float()
    if not differ(expected, decoded, small.dtype):
        return None
    off = difference(expected, decoded, small.dtype)
    return f"its logits would be off by {off:.2g} of the largest"


def _decode_known(model: PreTrainedModel, ids: np.ndarray) -> torch.Tensor:
    """fp32 [8 + 5, V]: logits of the last 8 of ids [12], in slot 1, and of the last 5 of these in reverse, in
    slot 3; the texts as they were 5 and 8 tokens long, then a token after the other."""
    passes = CachedPasses(model, FEWEST_ROWS, LENGTH_STEP)
    chunks, nothing = [(0, FEWEST_ROWS, LENGTH_STEP)], np.zeros(0, np.int64)
    texts, lengths = {1: ids, 3: ids[::-1]}, {1: 5, 3: 8}
    prompts = [(slot, text[: lengths[slot]]) for slot, text in texts.items()]
    logits = passes.forward(nothing, nothing, [], nothing, prompts)
    rows = {slot: [row] for slot, row in zip(texts, logits, strict=True)}
    for _ in range(7):
        going_on = [slot for slot in texts if lengths[slot] < len(ids)]
        tokens, positions = np.zeros(FEWEST_ROWS, np.int64), np.zeros(FEWEST_ROWS, np.int64)
        for slot in going_on:
            tokens[slot], positions[slot] = texts[slot][lengths[slot]], lengths[slot]
            lengths[slot] += 1
        logits = passes.forward(tokens, positions, chunks, np.array(going_on), [])
        for slot, row in zip(going_on, logits, strict=True):
            rows[slot].append(row)
    return torch.stack([*rows[1], *rows[3]]).float()
