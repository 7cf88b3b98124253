"""Continuous batching: which request is in which slot, and what becomes of it.

Takes requests and forward passes; steps until each request has its completion. A finished response frees its
slot for the next request, and the batch shrinks when no request is left. Requests with the same prompt share
its prefill (prefix sharing). Knows neither the model nor how its cache is laid out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from common.decoding.draws import Drawn, choose, uniforms
from common.decoding.requests import Completion, Request, SamplingParams
from common.errors import UserError

FEWEST_ROWS = 8
"""Rows of a forward pass, at least: with fewer, matrix kernels add up in another order."""

LENGTH_STEP = 64
"""Keys are read in multiples of so many."""

CPU_CHUNK_SLOTS = 16
"""Slots that attend together on the CPU, each as far as the longest of them."""

PROMPT_TOKENS = 4096
"""Prompt tokens that one forward pass takes in, unless a single prompt has more."""


class Passes(Protocol):
    """Forward passes of a scheduler, and what they keep of one for the next.

    chunk_slots: slots that attend together, each as far as the longest of them.
    """

    chunk_slots: int

    def padded(self, count: int) -> int:
        """Rows of next tokens that a pass has for the first `count` slots."""
        ...

    def logits(
        self, scheduler: Scheduler, rows: int, going_on: np.ndarray, prompts: Sequence[tuple[int, np.ndarray]]
    ) -> torch.Tensor:
        """[len(going_on) + len(prompts), V]: of the next tokens of slots and of prompts (slot, ids [T]).

        rows: slots up to the last of `going_on`, padded.
        """
        ...

    def copy(self, source: int, targets: Sequence[int], length: int) -> None: ...

    def rearrange(self, order: Sequence[int], length: int) -> None: ...


@dataclass
class _Held:
    """The prompt at the head of the queue, when some of its requests have begun and others wait."""

    prompt: int
    slot: int
    logits: torch.Tensor


class Scheduler:
    """Which request is in which slot, and what each has become. Host arrays; one transfer per step.

    By slot: request (-1: free), length (tokens cached), last (its newest token), draws [S, most tokens].
    By request: made (tokens so far), limit, tokens and logprobs [B, most tokens], stopped. context: positions
    that the model has; None: no bound.
    """

    def __init__(
        self, requests: Sequence[Request], params: SamplingParams, slots: int, context: int | None
    ) -> None:
        self.params, self.requests = params, requests
        self.prompts, self.queue = _queued(requests)
        self.limit = np.array([token_limit(request, params, context) for request in requests], np.int64)
        most = int(self.limit.max(initial=1))
        wanted = [len(request.prompt) + most for request, most in zip(requests, self.limit, strict=True)]
        self.capacity = rounded_up(max(wanted, default=1), LENGTH_STEP)
        self.slots = rounded_up(max(1, min(slots, len(requests))), FEWEST_ROWS)
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
        return bool(self.queue) or bool((self.request >= 0).any())

    def step(self, passes: Passes) -> list[int]:
        """One forward pass: the next token of every response under way, the first of those that begin.

        Returns the requests whose responses have ended with it.
        """
        self._tidy(passes)
        going_on = np.flatnonzero(self.request >= 0)
        begun, joined = self._admit(passes)
        rows = passes.padded(int(going_on[-1]) + 1) if len(going_on) else 0
        prompts = [(slots[0], self.prompts[prompt]) for prompt, slots in begun]
        logits = passes.logits(self, rows, going_on, prompts)
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
            return []
        self._hold(begun, logits, len(going_on))
        if chosen != list(range(len(logits))):
            logits = logits[torch.tensor(chosen).to(logits.device, non_blocking=True)]
        return self._draw(np.array(slots), logits)

    def _admit(self, passes: Passes) -> tuple[list[tuple[int, list[int]]], list[int]]:
        """Fill free slots: prompts to compute with their slots, and slots whose prompt is computed."""
        begun: list[tuple[int, list[int]]] = []
        joined: list[int] = []
        tokens = 0
        for slot in np.flatnonzero(self.request[: self.usable] < 0).tolist():
            if not self.queue:
                break
            prompt, request = self.queue[0]
            if self.held is not None and self.held.prompt == prompt:
                joined.append(slot)
            elif begun and begun[-1][0] == prompt:
                begun[-1][1].append(slot)
            elif begun and tokens + len(self.prompts[prompt]) > PROMPT_TOKENS:
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

    def _draw(self, slots: np.ndarray, logits: torch.Tensor) -> list[int]:
        """Choose a token for each of these slots and note what has become of its request; those that end."""
        requests = self.request[slots]
        made = self.made[requests]
        numbers = torch.from_numpy(self.draws[slots, made]).to(logits.device, non_blocking=True)
        host = _on_host(choose(logits, numbers, self.params))
        unsure = np.flatnonzero(host[2] == 0)
        if len(unsure):
            rows = torch.from_numpy(unsure).to(logits.device, non_blocking=True)
            again = choose(logits[rows], numbers[rows], self.params, most=logits.shape[1])
            host[:, unsure] = _on_host(again)
        tokens, logprobs = host[0].astype(np.int64), np.log(host[1])
        if not np.isfinite(logprobs).all():
            raise not_finite(int(self.length[slots].max()))
        self.tokens[requests, made], self.logprobs[requests, made] = tokens, logprobs
        self.last[slots] = tokens
        self.made[requests] = made + 1
        self.stopped[requests] = np.isin(tokens, self.params.terminators)
        done = self.stopped[requests] | (made + 1 >= self.limit[requests])
        self.request[slots[done]] = -1
        return requests[done].tolist()

    def _tidy(self, passes: Passes) -> None:
        """Move the longest responses to the front where that saves more than it costs."""
        going_on = self.request >= 0
        count = int(going_on.sum())
        if not count or self.steps - self.tidied_at < 8:
            return
        lengths = np.sort(self.length[going_on])[::-1]
        ideal_rows = passes.padded(count)
        rows = passes.padded(int(np.flatnonzero(going_on)[-1]) + 1)
        size = passes.chunk_slots
        ideal = sum(end_length * size for end_length in lengths[::size])
        read = sum((end - begin) * length for begin, end, length in self.chunks(rows, size))
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
            (begin, min(begin + size, rows), rounded_up(most, LENGTH_STEP))
            for begin, most in zip(begins, longest, strict=True)
        ]

    def history(self, slot: int) -> np.ndarray:
        request = self.request[slot]
        return np.concatenate([self.requests[request].prompt, self.tokens[request, : self.made[request]]])

    def completions(self) -> list[Completion]:
        """Of all requests, in their order."""
        return [self.completion(request) for request in range(len(self.requests))]

    def completion(self, request: int) -> Completion:
        """What has become of a request so far."""
        made = int(self.made[request])
        tokens, logprobs = (found[request, :made].copy() for found in (self.tokens, self.logprobs))
        return Completion(tokens, logprobs, bool(self.stopped[request]))


def _on_host(drawn: Drawn) -> np.ndarray:
    """float64 [3, M]: tokens, probabilities, is_sure, in one transfer: float64 holds every token id."""
    return torch.stack([part.double() for part in drawn]).cpu().numpy()


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


def not_finite(tokens: int) -> UserError:
    """What is said of logits that are not finite after so many tokens."""
    return UserError(
        f"the policy's logits are not finite after {tokens} tokens",
        hint="go back to an earlier checkpoint and lower the learning rate",
    )


def token_limit(request: Request, params: SamplingParams, context: int | None) -> int:
    """Tokens that a response may have. UserError for a prompt that leaves `context` no room."""
    length = len(request.prompt)
    if not length:
        raise ValueError("a prompt without tokens has nothing to go on from")
    if context is not None and length >= context:
        raise UserError(
            f"a prompt of {length} tokens leaves no room in the model's context of {context}",
            hint="lower the length that prompts are cut or dropped at",
        )
    room = params.max_new_tokens if context is None else min(params.max_new_tokens, context - length)
    return max(1, room if request.max_new_tokens is None else min(room, request.max_new_tokens))


def rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step
