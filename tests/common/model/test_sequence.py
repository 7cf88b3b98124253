"""Ranks that share a sequence compute its attention as one rank does, and its gradients add up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import UserError
from common.model.packed import refuse_unsliced
from tests import forked
from tests.programs import sliced

# fp32, whose sums over slices are taken in another order
TOLERANCE = 2e-6


def test_slices_of_four_ranks_are_attended_to_like_the_whole(tmp_path: Path) -> None:
    out = tmp_path / "errors.pt"
    forked.run(sliced.main, (str(out),), 4, tmp_path / "printed.txt")
    errors = torch.load(out)
    assert set(errors) == {asked.name for asked in sliced.CASES}
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.slow  # two processes that compile
def test_compiled_layers_exchange_slices_without_breaking_a_graph(tmp_path: Path) -> None:
    forked.run(sliced.compiled_layers, (), 2, tmp_path / "printed.txt")


def network_with(**fields: Any) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=8, **sizes, **fields))


def test_rotary_embeddings_that_look_at_the_length_of_a_row_are_refused() -> None:
    refuse_unsliced(network_with())
    with pytest.raises(UserError, match="rotary embeddings depend on how long the row is"):
        refuse_unsliced(
            network_with(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
        )
