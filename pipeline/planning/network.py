"""The sizes of a network from its config alone, without torch and without its weights.

Takes the fields of a transformers config (or a folder that has one) and returns a `Network`. Parameters are
counted by the formula of a Llama-shaped decoder, or read off the headers of safetensors files where there are
some. Knows nothing of training.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.artifacts import read_json
from common.config import LoraConfig, ModelConfig
from common.tokenizer_files import check_tokenizer_files

WITH_QKV_BIAS = ("qwen2",)
WITH_QK_NORM = ("qwen3",)
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Fields by which configs say how many experts a layer has."""
LONGEST_HEADER = 100 * 2**20
"""Bytes of a safetensors header, at most, as its own reader has it."""


@dataclass(frozen=True)
class Network:
    """A decoder. parameters: of the whole network; is_exact: counted in its files, not by the formula."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    is_tied: bool
    parameters: int
    is_exact: bool = False
    experts: int = 0

    @property
    def query_width(self) -> int:
        """All query heads side by side."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """All keys of a token side by side; its values are as wide."""
        return self.kv_heads * self.head_dim

    @property
    def largest(self) -> int:
        """Numbers of the largest weight: the embeddings or a matrix of the feed-forward network."""
        return self.hidden * max(self.vocabulary, self.intermediate)

    @property
    def linear_sizes(self) -> list[tuple[int, int]]:
        """(in, out) of each linear layer of one decoder layer."""
        h, q, kv, i = self.hidden, self.query_width, self.kv_width, self.intermediate
        return [(h, q), (h, kv), (h, kv), (q, h), (h, i), (h, i), (i, h)]

    def adapter_parameters(self, lora: LoraConfig) -> int:
        """Of low-rank adapters on every linear layer: r (in + out) each, as `all-linear` places them."""
        return self.layers * sum(lora.r * (size_in + size_out) for size_in, size_out in self.linear_sizes)

    def without_head(self) -> Network:
        """The same decoder under a scalar head: an output projection of its own is gone."""
        head = 0 if self.is_tied else self.vocabulary * self.hidden
        return replace(self, parameters=self.parameters - head + self.hidden)


def network_of(model: ModelConfig, vocabulary: int | None = None) -> Network | None:
    """The network that `model` names; None where its sizes are not known without a download.

    vocabulary: tokens of the tokenizer, for a config that leaves vocab_size out. A config of another shape
    than Llama's is counted as if it had that shape, unless there are files to count in.
    """
    folder = None if model.path is None else Path(model.path)
    fields: Any = model.config
    if folder is not None:
        try:
            fields = read_json(folder / "config.json")
        except (OSError, ValueError):
            return None
    try:
        found = from_fields(fields, vocabulary or _vocabulary_of(model))
    except (AttributeError, TypeError, ValueError, OverflowError):  # no fields of a config
        return None
    if found is None or folder is None:
        return found
    counted = parameters_in(folder)
    return found if not counted else replace(found, parameters=counted, is_exact=True)


def from_fields(fields: Mapping[str, Any], vocabulary: int | None = None) -> Network | None:
    """From the fields of a config; None when one of the sizes is missing."""
    vocabulary = fields.get("vocab_size") or vocabulary
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = [fields.get(name) for name in names]
    if not vocabulary or not all(isinstance(size, int) and size > 0 for size in sizes):
        return None
    h, i, layers, heads = (int(size) for size in sizes if size is not None)
    kv_heads = int(fields.get("num_key_value_heads") or heads)
    head_dim = int(fields.get("head_dim") or h // heads)
    tied = bool(fields.get("tie_word_embeddings", False))
    kind = str(fields.get("model_type", ""))
    experts = next((int(fields[name]) for name in EXPERTS if fields.get(name)), 0)
    network = Network(h, i, layers, heads, kv_heads, head_dim, int(vocabulary), tied, 0, experts=experts)
    of_layer = sum(size_in * size_out for size_in, size_out in network.linear_sizes) + 2 * h
    if kind in WITH_QKV_BIAS or fields.get("attention_bias"):
        of_layer += network.query_width + 2 * network.kv_width
    if kind in WITH_QK_NORM:
        of_layer += 2 * head_dim
    embeddings = int(vocabulary) * h * (1 if tied else 2)
    return replace(network, parameters=embeddings + layers * of_layer + h)


def parameters_in(folder: Path) -> int:
    """Numbers in the safetensors files of a folder, by their headers; 0 without such files."""
    return sum(_numbers_in(file) for file in folder.glob("*.safetensors") if file.is_file())


def _numbers_in(file: Path) -> int:
    """A file begins with the length of its header, 8 bytes, then the header, JSON."""
    try:
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(min(length, LONGEST_HEADER)))
        return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return 0


def _vocabulary_of(model: ModelConfig) -> int | None:
    """Tokens of the tokenizer that is named or will be trained."""
    if model.tokenizer.train_vocab_size is not None:
        return model.tokenizer.train_vocab_size
    if model.tokenizer.path is None:
        return None
    check_tokenizer_files(Path(model.tokenizer.path), "model.tokenizer.path")
    try:
        content = read_json(Path(model.tokenizer.path) / "tokenizer.json")
        added = {entry["content"] for entry in content.get("added_tokens", [])}
        return len(added | set(content["model"]["vocab"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
