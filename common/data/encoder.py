"""Texts -> token ids, without any token that a tokenizer would add; and where BOS and EOS stand.

Also hashes what decides which tokens a text becomes. Does not know turns and does not say what is trained.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from common.data import control
from common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Encoder:
    """Texts as tokens, without any that the tokenizer would add. Short texts are looked up again."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._known: dict[str, list[int]] = {}
        self.added = tokenizer.added_tokens_decoder
        self.bos, self.tokenizer = tokenizer.bos_token_id, tokenizer

    def batch(self, texts: list[str]) -> list[Any]:
        """One encoding per text. What is guarded in it (`control.py`) is encoded as text."""
        if not any(map(control.is_guarded, texts)):
            return self._backend.encode_batch(texts, add_special_tokens=False) if texts else []
        real = control.control_tokens(self.tokenizer).real
        as_text = control.text_backend(self.tokenizer)
        return list(as_text.encode_batch([real(text) for text in texts], add_special_tokens=False))

    def ids(self, text: str) -> list[int]:
        """The tokens of a text."""
        if text not in self._known:
            self._known[text] = self.batch([text])[0].ids
        return self._known[text]

    def ids_inside(self, text: str) -> list[int]:
        """The tokens of a text inside a longer one: some tokenizers add a space at the very beginning."""
        for token, added in self.added.items():
            if not (added.rstrip or added.single_word):
                ids = self.batch([str(added) + text])[0].ids
                if ids[:1] == [token]:
                    return list(ids[1:])
        return list(self.batch([text])[0].ids)


def whole_document(tokens: np.ndarray, tokenizer: PreTrainedTokenizerFast) -> tuple[np.ndarray, int]:
    """Plain text: the BOS this tokenizer writes, if any, and one EOS where the document ends. With the number
    of tokens that are put before it."""
    bos, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    # asked of the backend at each call: settings such as add_bos_token change its post-processor
    adds_bos = bos is not None and tokenizer.backend_tokenizer.encode("a").ids[:1] == [bos]
    before = [bos] if adds_bos else []
    if end is None:
        raise UserError(
            "the tokenizer has no EOS token, so plain text cannot end",
            hint="set its eos_token, or use messages",
        )
    after = [] if len(tokens) and tokens[-1] == end else [end]
    return np.concatenate([np.array(before, np.int32), tokens, np.array(after, np.int32)]), len(before)


def one_bos(tokens: np.ndarray, bos: int | None) -> np.ndarray:
    """Without a second BOS at the beginning: template and tokenizer may both write one."""
    while bos is not None and len(tokens) > 1 and tokens[0] == bos and tokens[1] == bos:
        tokens = tokens[1:]
    return tokens


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """Hash of everything that decides which tokens a text becomes; not of pad token or template."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("truncation", None)  # set by whoever called last
    state.pop("padding", None)
    state["special"] = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    state["special"].pop("pad_token", None)
    return hashlib.blake2b(json.dumps(state, sort_keys=True).encode(), digest_size=16).hexdigest()


def template_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """Hash of the chat template; of the empty string when there is none."""
    template = tokenizer.chat_template or ""
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
