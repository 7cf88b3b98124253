"""Which rows belong together, and which are held out: decided by their content, not by their position.

Everything is a pure function of the rows and the seed. Which step of a pipeline a row belongs to is in
`stages.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from common.data.types import NO_CONTEXT, Conversation, Message, Preference, Prompt


def question(row: Conversation | Preference | Prompt) -> str:
    """The first user turn, or the whole text without one; surrounding white space is ignored."""
    if isinstance(row, Conversation) and row.text is not None:
        return row.text
    turns = row.prompt if isinstance(row, Preference) else row.messages
    asked = (message.content for message in turns if message.role == "user")
    return next(asked, "\n".join(message.content for message in turns))


def split_hash(row: Conversation | Preference | Prompt, seed: int) -> int:
    """Rows with the same hash stay on one side of the held-out split.

    Demonstrations share a hash when their texts are equal; preferences and prompts, when their questions are:
    two transcripts that begin with one question are not independent of each other.
    """
    if isinstance(row, Conversation):
        return _hash(row.text, row.messages, seed)
    return _hash(None, (Message("user", question(row).strip()),), seed)


def prompt_hash(prompt: Prompt, seed: int) -> int:
    """Prompts with the same hash are the same to a policy: turns and what the template is given besides."""
    given = {"tools": prompt.context.tools, "variables": prompt.context.variables}
    more = () if prompt.context == NO_CONTEXT else (Message("", "", given),)
    return _hash(None, (*prompt.messages, *more), seed)


def _hash(text: str | None, messages: Sequence[Message], seed: int) -> int:
    """64 bits, different for each seed."""
    turns = [(message.role, message.content, message.extra) for message in messages]
    said = json.dumps([text, turns], sort_keys=True, default=str).encode()
    digest = hashlib.blake2b(said, digest_size=8, key=str(seed).encode()[:64])
    return int.from_bytes(digest.digest(), "big")


def held_out(hashes: np.ndarray, source_ids: np.ndarray, fraction: float) -> set[int]:
    """The hashes (`split_hash`) that go to the held-out part: `fraction` of each source's rows, at least one.

    hashes: uint64 [R] of all rows. Equal rows stay together, across sources too, so the part can be
    larger than asked for; a source whose rows are all equal gives none.
    """
    chosen: set[int] = set()
    for source in np.unique(source_ids) if fraction > 0 else ():
        values, counts = np.unique(hashes[source_ids == source], return_counts=True)
        wanted = max(1, round(fraction * int(counts.sum())))
        enough = int(np.searchsorted(np.cumsum(counts), wanted)) + 1
        chosen.update(values[: min(enough, len(values) - 1)].tolist())
    return chosen
