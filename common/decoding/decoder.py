"""Continuous batching: sample responses from the live weights of a causal LM.

Takes a transformers model (also one wrapped by peft), prompts as token ids and a sampling rule; returns token
ids, their log-probabilities and whether each response stopped by itself. `slots` responses are decoded
together, each with its slot of the KV cache. A finished response frees its slot for the next request, and the
batch shrinks when no request is left. Requests with the same prompt share its prefill (prefix sharing). The
decoder knows nothing of text, rewards or training; any other `GenerationBackend` can replace it.

A response depends only on the weights, the prompt and the request's key. Each token is the inverse of the
cumulative distribution at a uniform number of the request's own stream. On the CPU in fp32, logits do not
depend on the other slots: matrix products have at least `FEWEST_ROWS` rows (with fewer, other kernels with
other roundings are used), element-wise kernels have no scalar remainder (`CPU_ROWS`), and attention sums the
keys of every slot from its first. On other devices, kernels may round differently for other batch sizes; then
a draw within rounding of the boundary between two tokens may give the other token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.decoding.slots import DecodingStep, SlotCache, decoding_into_slots
from common.errors import UserError
from common.model.adapters import unwrapped
from common.model.attention import packed_arguments, plain_attention, positions_within
from common.model.miniature import differ, difference, miniature_of, some_tokens
from common.notices import notice
from common.runtime.distributed import all_reduce_sum

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FEWEST_ROWS = 8
"""Rows of a forward pass, at least: with fewer, matrix kernels add up in another order."""

CPU_ROWS = 32
"""On the CPU a forward pass has a multiple of so many rows: two vectors of the widest instructions."""

LENGTH_STEP = 64
"""Keys are read in multiples of so many."""

CPU_CHUNK_SLOTS = 16
"""Slots that attend together on the CPU, each as far as the longest of them."""

PROMPT_TOKENS = 4096
"""Prompt tokens that one forward pass takes in, unless a single prompt has more."""

STEPS_BETWEEN_QUESTIONS = 16
"""Forward passes between two questions whether to stop."""

DRAW_BLOCK = 64
"""Tokens whose probabilities are summed up before a draw looks into them."""


@dataclass(frozen=True)
class Request:
    """A prompt to go on from.

    prompt: int32 [T], T >= 1. key: what this response's draws are derived from; requests with the same key
    and prompt get the same response. max_new_tokens: this response's own bound, below the rule's.
    """

    prompt: np.ndarray
    key: tuple[int, ...]
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Completion:
    """A response.

    tokens: int32 [R], R >= 1, with the terminator if `stopped`. logprobs: fp32 [R], log-softmax at the
    temperature over all tokens (greedily: at temperature 1), whatever top_p and top_k left out.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    stopped: bool


@dataclass(frozen=True)
class SamplingRule:
    """How tokens are chosen. temperature 0: the likeliest. top_p 1 and top_k 0: out of all tokens."""

    temperature: float
    max_new_tokens: int
    terminators: tuple[int, ...]
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class DecodingCounts:
    """What a call of `decode` did on this rank. steps: forward passes; rows: next tokens computed in them."""

    steps: int
    tokens: int
    rows: int

    @property
    def slot_utilisation(self) -> float:
        """Share of the computed next tokens that stand in a response."""
        return self.tokens / self.rows if self.rows else 0.0


class GenerationBackend(Protocol):
    """Whatever turns requests into completions."""

    counts: DecodingCounts

    def decode(
        self,
        requests: Sequence[Request],
        rule: SamplingRule,
        *,
        should_stop: Callable[[], bool] | None = None,
        lockstep: bool = False,
    ) -> list[Completion] | None: ...


class Decoder:
    """The engine in this process. The model's weights may change between calls of `decode`, not during one.

    model: a causal LM with packed attention. slots: responses decoded side by side. An architecture that
    cannot decode from a cache of slots (found out here, with a few tokens) is decoded without a cache, which
    is slow and said in a notice. Under ZeRO-3 with partitioned parameters all ranks make it together.
    """

    def __init__(self, model: nn.Module, *, slots: int, prompt_tokens: int = PROMPT_TOKENS) -> None:
        if slots < 1:
            raise ValueError(f"slots={slots}")
        self.model, self.slots, self.prompt_tokens = model, slots, prompt_tokens
        self.counts = DecodingCounts(0, 0, 0)
        fault = fault_of_cache(unwrapped(model))
        self.has_cache = fault is None
        if fault is not None:
            notice(
                "responses are sampled without a key/value cache",
                f"model_type={unwrapped(model).config.model_type} cannot decode from one: {fault}",
                "several times as slow, more so for longer ones",
            )

    def decode(
        self,
        requests: Sequence[Request],
        rule: SamplingRule,
        *,
        should_stop: Callable[[], bool] | None = None,
        lockstep: bool = False,
    ) -> list[Completion] | None:
        """Completions in the order of the requests; None as soon as `should_stop` was seen to be true.

        lockstep: forward passes are collectives, so every rank (with requests or without) makes as many as
        the one that needs most, and all leave when one is told to. Leaves the modes and the attention of the
        model and all generators as they were. UserError for a prompt that leaves the model's context no room,
        and when the logits are not finite.
        """
        run = _Run(requests, rule, self.slots, self.prompt_tokens, _context(unwrapped(self.model)))
        with _sampling_from(self.model, self.has_cache) as base:
            passes = _SlotPasses(base, run.slots, run.capacity) if self.has_cache else _WholePasses(base)
            finished = _until_done(run, passes, should_stop, lockstep)
        self.counts = DecodingCounts(run.steps, int(run.made.sum()), run.computed_rows)
        return run.completions() if finished else None


def _until_done(run: _Run, passes: _Passes, should_stop: Callable[[], bool] | None, lockstep: bool) -> bool:
    """Forward passes until nothing is left to do; false when told to stop.

    lockstep: what goes wrong on one rank is raised when the others know, so that none waits for it in a pass.
    """
    failed: UserError | None = None
    while True:
        stop = should_stop is not None and run.steps % STEPS_BETWEEN_QUESTIONS == 0 and should_stop()
        busy = run.busy
        if lockstep:
            told, working = all_reduce_sum([stop or failed is not None, busy])
            stop, busy = told > 0, working > 0
        if failed is not None:
            raise failed
        if stop or not busy:
            return not stop
        try:
            run.step(passes)
        except UserError as error:
            if not lockstep:
                raise
            failed = error


# --- The state of one call ---------------------------------------------------------------------------


@dataclass
class _Held:
    """The prompt at the head of the queue, when some of its requests have begun and others wait."""

    prompt: int
    slot: int
    logits: torch.Tensor


class _Run:
    """Which request is in which slot, and what each has become. Host arrays; one transfer per step.

    By slot: request (-1: free), length (tokens cached), last (its newest token), draws [S, most tokens].
    By request: made (tokens so far), limit, tokens and logprobs [B, most tokens], stopped.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        rule: SamplingRule,
        slots: int,
        prompt_tokens: int,
        context: int | None,
    ) -> None:
        self.rule, self.requests, self.prompt_tokens = rule, requests, prompt_tokens
        self.prompts, self.queue = _queued(requests)
        self.limit = np.array([_limit(request, rule, context) for request in requests], np.int64)
        most = int(self.limit.max(initial=1))
        wanted = [len(request.prompt) + most for request, most in zip(requests, self.limit, strict=True)]
        self.capacity = _rounded_up(max(wanted, default=1), LENGTH_STEP)
        self.slots = _rounded_up(max(1, min(slots, len(requests))), FEWEST_ROWS)
        self.usable = min(slots, self.slots)
        self.request = np.full(self.slots, -1, np.int64)
        self.length, self.last = np.zeros(self.slots, np.int64), np.zeros(self.slots, np.int64)
        self.draws = np.zeros((self.slots, most))
        self.made = np.zeros(len(requests), np.int64)
        self.tokens = np.zeros((len(requests), most), np.int32)
        self.logprobs = np.zeros((len(requests), most), np.float32)
        self.stopped = np.zeros(len(requests), bool)
        self.held: _Held | None = None
        self.steps = self.computed_rows = self.tidied_at = 0

    @property
    def busy(self) -> bool:
        """Whether a response is unfinished."""
        return bool(self.queue) or bool((self.request >= 0).any())

    def step(self, passes: _Passes) -> None:
        """One forward pass: the next token of every response under way, the first of those that begin."""
        self._tidy(passes)
        going_on = np.flatnonzero(self.request >= 0)
        begun, joined = self._admit(passes)
        rows = _rounded_up(int(going_on[-1]) + 1, FEWEST_ROWS) if len(going_on) else 0
        ids = [self.prompts[prompt] for prompt, _ in begun]
        logits = passes.logits(
            self, rows, going_on, [(slots[0], new) for (_, slots), new in zip(begun, ids, strict=True)]
        )
        self.steps += 1
        self.computed_rows += rows + sum(len(slots) for _, slots in begun) + len(joined)
        self.length[going_on] += 1
        slots, chosen = [*going_on.tolist()], [*range(len(going_on))]
        for number, (prompt, into) in enumerate(begun):
            passes.copy(into[0], into[1:], len(self.prompts[prompt]))
            slots += into
            chosen += [len(going_on) + number] * len(into)
        if joined:
            assert self.held is not None
            logits = torch.cat([logits, self.held.logits[None]])
            slots += joined
            chosen += [len(logits) - 1] * len(joined)
        if not slots:  # a pass that only keeps step with other ranks
            return
        self._hold(begun, logits, len(going_on))
        if chosen != list(range(len(logits))):
            logits = logits[torch.tensor(chosen, device=logits.device)]
        self._draw(np.array(slots), logits)

    def _admit(self, passes: _Passes) -> tuple[list[tuple[int, list[int]]], list[int]]:
        """Fill free slots: prompts to compute with their slots, and slots whose prompt is computed."""
        begun: list[tuple[int, list[int]]] = []
        joined: list[int] = []
        tokens = 0
        if not self.queue:
            return begun, joined
        for slot in np.flatnonzero(self.request[: self.usable] < 0).tolist():
            if not self.queue:
                break
            prompt, request = self.queue[0]
            if self.held is not None and self.held.prompt == prompt:
                joined.append(slot)
            elif begun and begun[-1][0] == prompt:
                begun[-1][1].append(slot)
            elif begun and tokens + len(self.prompts[prompt]) > self.prompt_tokens:
                break
            else:
                begun.append((prompt, [slot]))
                tokens += len(self.prompts[prompt])
            self.queue.popleft()
            self.request[slot], self.length[slot] = request, len(self.prompts[prompt])
            limit = self.limit[request]
            self.draws[slot, :limit] = uniforms(self.requests[request].key, int(limit))
        if joined and self.held is not None:
            others = [slot for slot in joined if slot != self.held.slot]
            passes.copy(self.held.slot, others, len(self.prompts[self.held.prompt]))
        return begun, joined

    def _hold(self, begun: list[tuple[int, list[int]]], logits: torch.Tensor, first_row: int) -> None:
        """Keep what requests still in the queue need of the last prompt computed."""
        head = self.queue[0][0] if self.queue else -1
        if begun and begun[-1][0] == head:
            row = first_row + len(begun) - 1
            self.held = _Held(head, begun[-1][1][0], logits[row].clone())
        elif self.held is not None and self.held.prompt != head:
            self.held = None

    def _draw(self, slots: np.ndarray, logits: torch.Tensor) -> None:
        """Choose a token for each of these slots and note what has become of its request."""
        requests = self.request[slots]
        made = self.made[requests]
        numbers = torch.from_numpy(self.draws[slots, made]).to(logits.device)
        chosen, probabilities = choose(logits, numbers, self.rule)
        # in one transfer: float64 holds every token id
        host = torch.stack([chosen.double(), probabilities.double()]).cpu().numpy()
        tokens, logprobs = host[0].astype(np.int64), np.log(host[1])
        if not np.isfinite(logprobs).all():
            raise UserError(
                f"the policy's logits are not finite after {int(self.length[slots].max())} tokens",
                hint="go back to an earlier checkpoint and lower the learning rate",
            )
        self.tokens[requests, made], self.logprobs[requests, made] = tokens, logprobs
        self.last[slots] = tokens
        self.made[requests] = made + 1
        self.stopped[requests] = np.isin(tokens, self.rule.terminators)
        done = self.stopped[requests] | (made + 1 >= self.limit[requests])
        self.request[slots[done]] = -1

    def _tidy(self, passes: _Passes) -> None:
        """Move the longest responses to the front where that saves more than it costs."""
        going_on = self.request >= 0
        count = int(going_on.sum())
        if not count or self.steps - self.tidied_at < 8:
            return
        lengths = np.sort(self.length[going_on])[::-1]
        ideal_rows = _rounded_up(count, FEWEST_ROWS)
        rows = _rounded_up(int(np.flatnonzero(going_on)[-1]) + 1, FEWEST_ROWS)
        ideal = sum(end_length * CPU_CHUNK_SLOTS for end_length in lengths[::CPU_CHUNK_SLOTS])
        read = sum((end - begin) * length for begin, end, length in self.chunks(rows, CPU_CHUNK_SLOTS))
        waiting = bool(self.queue)
        if not (rows > 1.2 * ideal_rows and not waiting) and read < 1.3 * ideal + LENGTH_STEP * rows:
            return
        order = np.argsort(np.where(going_on, -self.length, 1), kind="stable")
        longest = int(lengths[0])
        if self.held is not None:
            longest = max(longest, len(self.prompts[self.held.prompt]))
            self.held.slot = int(np.flatnonzero(order == self.held.slot)[0])
        passes.rearrange(order.tolist(), longest)
        for array in (self.request, self.length, self.last):
            array[:] = array[order]
        self.draws = self.draws[order]
        self.tidied_at = self.steps

    def chunks(self, rows: int, size: int) -> list[tuple[int, int, int]]:
        """(begin, end, length): of every `size` slots, how many keys the longest response needs read."""
        begins = range(0, rows, size)
        needed = np.where(self.request[:rows] >= 0, self.length[:rows] + 1, 1)
        longest = np.maximum.reduceat(needed, list(begins)).tolist()
        return [
            (begin, min(begin + size, rows), _rounded_up(most, LENGTH_STEP))
            for begin, most in zip(begins, longest, strict=True)
        ]

    def history(self, slot: int) -> np.ndarray:
        """Prompt and response so far of the request in a slot."""
        request = self.request[slot]
        return np.concatenate([self.requests[request].prompt, self.tokens[request, : self.made[request]]])

    def completions(self) -> list[Completion]:
        """Of all requests, in their order."""
        return [
            Completion(self.tokens[i, :made].copy(), self.logprobs[i, :made].copy(), bool(self.stopped[i]))
            for i, made in enumerate(self.made.tolist())
        ]


def _queued(requests: Sequence[Request]) -> tuple[list[np.ndarray], deque[tuple[int, int]]]:
    """Different prompts, and (prompt, request) so that the requests of a prompt follow each other."""
    places: dict[bytes, int] = {}
    prompts: list[np.ndarray] = []
    of_prompt: list[list[int]] = []
    for index, request in enumerate(requests):
        ids = request.prompt.astype(np.int32)
        place = places.setdefault(ids.tobytes(), len(prompts))
        if place == len(prompts):
            prompts.append(ids)
            of_prompt.append([])
        of_prompt[place].append(index)
    return prompts, deque((place, index) for place, indices in enumerate(of_prompt) for index in indices)


def _limit(request: Request, rule: SamplingRule, context: int | None) -> int:
    """Tokens that a response may have."""
    length = len(request.prompt)
    if not length:
        raise ValueError("a prompt without tokens has nothing to go on from")
    if context is not None and length >= context:
        raise UserError(
            f"a prompt of {length} tokens leaves no room in the model's context of {context}",
            hint="lower the length that prompts are cut or dropped at",
        )
    room = rule.max_new_tokens if context is None else min(rule.max_new_tokens, context - length)
    return max(1, room if request.max_new_tokens is None else min(room, request.max_new_tokens))


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _context(model: PreTrainedModel) -> int | None:
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


# --- Forward passes ----------------------------------------------------------------------------------


class _Passes(Protocol):
    """Forward passes of a run, and what they keep of one for the next."""

    def logits(
        self, run: _Run, rows: int, going_on: np.ndarray, prompts: Sequence[tuple[int, np.ndarray]]
    ) -> torch.Tensor:
        """[len(going_on) + len(prompts), V]: of the next tokens of slots and of prompts (slot, ids [T]).

        rows: slots up to the last of `going_on`, rounded up.
        """
        ...

    def copy(self, source: int, targets: Sequence[int], length: int) -> None: ...

    def rearrange(self, order: Sequence[int], length: int) -> None: ...


class _SlotPasses:
    """From a cache: one token of each slot, and whole prompts, in one flat sequence."""

    def __init__(self, model: PreTrainedModel, slots: int, capacity: int) -> None:
        self.model = model
        self.cache = SlotCache(slots, capacity)
        self.device = _device(model)
        on_cpu = self.device.type == "cpu"
        self.chunk_slots = CPU_CHUNK_SLOTS if on_cpu else slots
        self.rows_step = CPU_ROWS if on_cpu else FEWEST_ROWS
        self.copy, self.rearrange = self.cache.copy, self.cache.rearrange

    def logits(
        self, run: _Run, rows: int, going_on: np.ndarray, prompts: Sequence[tuple[int, np.ndarray]]
    ) -> torch.Tensor:
        chunks = run.chunks(rows, self.chunk_slots) if rows else []
        # a free slot's row writes behind what it holds, where its next response will write before reading
        tokens, positions = run.last[:rows], run.length[:rows]
        return self.forward(tokens, positions, chunks, going_on, prompts)

    def forward(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        chunks: Sequence[tuple[int, int, int]],
        wanted: np.ndarray,
        prompts: Sequence[tuple[int, np.ndarray]],
    ) -> torch.Tensor:
        """Logits of the rows `wanted` and of the prompts' ends.

        tokens, positions: int64 [M] of the slots 0 to M - 1. chunks: see `DecodingStep`.
        """
        documents, slots = [ids for _, ids in prompts], [slot for slot, _ in prompts]
        count = len(tokens) + sum(map(len, documents))
        short = _rounded_up(max(count, 1), self.rows_step) - count
        padding = [np.zeros(short, np.int64)] if short else []
        ends = np.cumsum([len(tokens), *map(len, documents)])[1:] - 1
        ids = np.concatenate([tokens, *documents, *padding]).astype(np.int64)
        places = np.concatenate([positions, *(np.arange(len(part)) for part in [*documents, *padding])])
        boundaries = np.cumsum([0, *map(len, [*documents, *padding])]).astype(np.int32)
        into = [*slots, *(None for _ in padding)]
        step = DecodingStep(
            self.cache,
            self._tensor(positions),
            chunks,
            (into, torch.from_numpy(boundaries).to(self.device)) if into else None,
        )
        kept = np.concatenate([wanted, ends])
        padded = np.pad(kept, (0, max(0, FEWEST_ROWS - len(kept))))
        output = cast(Any, self.model)(
            input_ids=self._tensor(ids)[None],
            position_ids=self._tensor(places.astype(np.int64))[None],
            attention_mask=None,
            use_cache=False,
            logits_to_keep=self._tensor(padded.astype(np.int64)),
            decoding=step,
        )
        return cast(torch.Tensor, output.logits[0, : len(kept)])

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, copy=True)


class _WholePasses:
    """Without a cache: every response from its prompt on, packed, at every step."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.device = _device(model)

    def logits(
        self, run: _Run, rows: int, going_on: np.ndarray, prompts: Sequence[tuple[int, np.ndarray]]
    ) -> torch.Tensor:
        documents = [*(run.history(slot) for slot in going_on.tolist()), *(ids for _, ids in prompts)]
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
def _sampling_from(model: nn.Module, has_cache: bool) -> Iterator[PreTrainedModel]:
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
        with _sampling_from(small, True):
            decoded = _decode_known(small, ids[0].cpu().numpy())
        with _sampling_from(small, False), plain_attention(small):
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
    passes = _SlotPasses(model, FEWEST_ROWS, LENGTH_STEP)
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


def _device(model: PreTrainedModel) -> torch.device:
    return cast(nn.Embedding, model.get_input_embeddings()).weight.device


# --- Draws -------------------------------------------------------------------------------------------


def uniforms(key: tuple[int, ...], count: int) -> np.ndarray:
    """float64 [count] in [0, 1): the beginning of the stream that belongs to `key`."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).random(count)


def choose(
    logits: torch.Tensor, numbers: torch.Tensor, rule: SamplingRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens int64 [M] and their probabilities fp32 [M], from logits [M, V] and a uniform number each.

    The probabilities are those of the distribution at the temperature before top_p and top_k.
    """
    scores = logits.float()
    if rule.temperature not in (0, 1):
        scores = scores / rule.temperature
    p = scores.softmax(1)
    tokens = scores.argmax(1) if rule.temperature == 0 else _inverse(_filtered(p, rule), numbers)
    return tokens, p.gather(1, tokens[:, None])[:, 0]


def _filtered(p: torch.Tensor, rule: SamplingRule) -> torch.Tensor:
    """Probabilities [M, V] with those of the tokens left out set to 0; they need not sum to 1."""
    limited = 0 < rule.top_k < p.shape[1]
    if not limited and rule.top_p >= 1:
        return p
    ordered, ids = p.sort(dim=1, descending=True, stable=True)
    if limited:
        ordered[:, rule.top_k :] = 0
    if rule.top_p < 1:
        # of what top_k leaves; a token is in while those before it are not enough
        wanted = rule.top_p * ordered.sum(1, keepdim=True, dtype=torch.float64)
        ordered[ordered.cumsum(1, dtype=torch.float64) - ordered >= wanted] = 0
    return torch.zeros_like(p).scatter_(1, ids, ordered)


def _inverse(p: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """int64 [M]: the token in whose share of [0, 1) the number falls. p fp32 [M, V], need not sum to 1.

    Sums of blocks first, then one block's probabilities: a cumulative sum over everything, in float64, would
    take longer than the rest of the step. A token of probability 0 is never chosen.
    """
    blocks = F.pad(p, (0, -p.shape[1] % DRAW_BLOCK)).view(len(p), -1, DRAW_BLOCK)
    shares = blocks.sum(2)
    block, rest = _first_above(shares, shares.sum(1, dtype=torch.float64) * numbers)
    within, _ = _first_above(blocks[torch.arange(len(p), device=p.device), block], rest)
    return block * DRAW_BLOCK + within


def _first_above(shares: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per row the first place where the running sum passes what is wanted, and how far that is into it."""
    sums = shares.cumsum(1, dtype=torch.float64)
    # rounding must not carry it to the very end, where only tokens of probability 0 might be left
    wanted = torch.minimum(wanted, sums[:, -1].nextafter(torch.zeros_like(wanted)))
    place = torch.searchsorted(sums, wanted[:, None], right=True).clamp_(max=shares.shape[1] - 1)
    before = (sums.gather(1, place) - shares.gather(1, place))[:, 0]
    return place[:, 0], (wanted - before).clamp_min(0)
