"""Ranks that share a sequence compute its attention as one rank does, and its gradients add up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import UserError
from common.launch_config import LaunchConfig
from common.model.one_by_one import run_one_by_one
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


def test_networks_that_cannot_share_rows_are_refused() -> None:
    shared = LaunchConfig(sequence_parallel=2)
    refuse_unsliced(network_with(), shared, 6)
    with pytest.raises(UserError, match="does not divide the 2 attention heads"):
        refuse_unsliced(network_with(), LaunchConfig(sequence_parallel=3), 6)
    by_length = network_with(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    refuse_unsliced(by_length, LaunchConfig(), 6)
    with pytest.raises(UserError, match="rotary embeddings depend on how long the row is"):
        refuse_unsliced(by_length, shared, 6)
    alone = network_with()
    run_one_by_one(alone, "layers of its own")
    with pytest.raises(UserError, match="cannot share rows: layers of its own"):
        refuse_unsliced(alone, shared, 6)
