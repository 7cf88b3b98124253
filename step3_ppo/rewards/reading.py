"""Responses as text, in the tokens of a reward model with another tokenizer or chat template.

Takes prompts and completions as text; returns token ids. The score is read at the last one: for a published
model the token where plain transformers reads the score of this conversation alone, for ours the terminator.
Knows no network and no rank.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.artifacts import Artifact
from common.chat_template import RenderError, limit
from common.config import ModelConfig
from common.data import control
from common.data.encoder import Encoder, one_bos
from common.data.prompts import turns_again
from common.data.render import ChatTemplate, read_template, render
from common.data.types import Conversation, Message, Place
from common.errors import UserError
from common.handoff import PAD, model_of, scores_text
from common.model.tokenizer import load_tokenizer
from step3_ppo.rewards.functions import Columns, Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def reader_of(model: ModelConfig, reward_model: Artifact | None) -> TextReader | None:
    """For a reward model that is given text; None for one of ours. model: the job's."""
    if reward_model is None or not scores_text(reward_model):
        return None
    return TextReader(reward_model, load_tokenizer(model_of(model, reward_model.path)))


class TextReader:
    """Prompts and completions as token ids of a reward model that is given text."""

    def __init__(self, artifact: Artifact, tokenizer: PreTrainedTokenizerFast) -> None:
        """tokenizer: the artifact's."""
        details = artifact.manifest.details
        self._path, self._pad = artifact.path, details.get("imported", {}).get(PAD)
        self._ends = None if scores_text(artifact) else details["terminators"]
        self._context: int | None = details.get("context_length")
        self._template, self._encoder = read_template(tokenizer), Encoder(tokenizer)
        self._control = control.control_tokens(tokenizer)

    def __call__(self, prompts: Prompts, completions: Sequence[str], columns: Columns) -> list[np.ndarray]:
        """int32 [T] each. Arguments as reward functions get them.

        UserError for what its template refuses, or what is longer than its context.
        """
        conversations = []
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            others = {name: values[number] for name, values in columns.items()}
            turns, context = turns_again(prompt, others)
            said = (*turns, Message("assistant", completion))
            conversations.append(Conversation(said, None, "", Place("responses", number + 1), 0, context))
        name, places = self._template.name, [conversation.place for conversation in conversations]
        guarded = [self._control.guarded(conversation) for conversation in conversations]
        render_one = functools.partial(_rendered, template=self._template, path=self._path)
        texts = limit(render_one, guarded, name, places)
        found = [
            one_bos(np.array(encoding.ids, np.int32), self._encoder.bos)
            for encoding in self._encoder.batch(texts)
        ]
        return [self._to_scored(ids, text) for ids, text in zip(found, texts, strict=True)]

    def _to_scored(self, ids: np.ndarray, text: str) -> np.ndarray:
        """Through the last terminator, or the last token that is not the pad of the model's own config."""
        if self._ends is not None:
            read = np.flatnonzero(np.isin(ids, self._ends))
        else:
            read = np.flatnonzero(ids != self._pad) if self._pad is not None else np.arange(len(ids))
        if not len(read):
            raise UserError(f"the reward model {self._path} reads nothing in {text[:60]!r}")
        end = int(read[-1]) + 1
        if self._context is not None and end > self._context:
            raise UserError(
                f"the reward model {self._path} reads at most {self._context:,} tokens, and a prompt with "
                f"its response has {end:,} of its own",
                hint="lower data.max_length, or name another reward model",
            )
        return ids[:end]


def _rendered(conversation: Conversation, template: ChatTemplate, path: Path) -> str:
    try:
        return render(conversation.messages, template, conversation.context)[0]
    except RenderError as error:
        raise UserError(
            f"the reward model {path} cannot read a response: {error}",
            hint="name one whose chat template takes the roles and tools of your prompts",
        ) from error
