"""Sizes in `model.config`, the fields of a network that is made anew: which of them a network can have.

Says nothing of fields that are no sizes; transformers reads those.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.fields import require

SIZES = (
    "vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size", "head_dim",
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "n_positions", "n_embd", "n_layer", "n_head",
)  # fmt: skip
"""Fields of `model.config` that no network has at 0."""
DIVIDED = (
    ("num_attention_heads", "num_key_value_heads"), ("hidden_size", "num_attention_heads", "head_dim"),
    ("n_embd", "n_head"),
)  # fmt: skip
"""Fields of which the first is a multiple of the second, unless the third is given."""


def check_sizes(config: Mapping[str, Any], at: str) -> None:
    """UserError where a size is 0, or heads do not divide what they share. at: key of `config` and a dot."""
    given = {name: size for name in SIZES if (size := config.get(name)) is not None}
    for name, size in given.items():
        is_size = isinstance(size, int) and 1 <= size <= 10_000_000
        require(is_size, f"{at}{name}", size, "a whole number, 1 to 10,000,000")
    for name, part, *instead in DIVIDED:
        if name in given and part in given and not given.keys() & set(instead):
            allowed = f"a multiple of {at}{part}={given[part]}"
            allowed += "".join(f", or set {at}{other} as well" for other in instead)
            require(given[name] % given[part] == 0, f"{at}{name}", given[name], allowed)
