from __future__ import annotations

import pytest
import torch

from common.runtime.distributed import World
from common.runtime.performance import performance, training_flops_per_token

CPU = World(0, 1, 0, torch.device("cpu"))
MEMORY = {"perf/memory_gb", "perf/peak_memory_gb"}


class Model(torch.nn.Module):
    """Embedding of 10 x 4, one matrix of 4 x 4, an output projection of 10 x 4."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embed, self.linear = torch.nn.Embedding(10, 4), torch.nn.Linear(4, 4, bias=False)
        self.head = torch.nn.Linear(4, 10, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embed

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_costs_six_operations_per_weight_that_multiplies(tied: bool) -> None:
    # 16 in the matrix, 40 in the projection; looking up an embedding multiplies nothing
    assert training_flops_per_token(Model(tied=tied)) == 6 * (16 + 40)  # type: ignore[arg-type]


def test_a_frozen_weight_has_no_gradient_of_its_own() -> None:
    model = Model(tied=False)
    model.head.requires_grad_(False)
    assert training_flops_per_token(model) == 6 * 16 + 4 * 40  # type: ignore[arg-type]


def test_a_partitioned_weight_counts_whole() -> None:
    model = Model(tied=True)
    model.linear.weight.data = torch.empty(0)
    model.linear.weight.ds_numel = 16  # type: ignore[assignment]
    assert training_flops_per_token(model) == 6 * (16 + 40)  # type: ignore[arg-type]


def test_speed_is_tokens_over_seconds_and_a_cpus_peak_is_not_guessed() -> None:
    metrics = performance(100.0, 600, 2.0, "bf16", CPU)
    assert set(metrics) == {"perf/tokens_per_second", *MEMORY}
    assert metrics["perf/tokens_per_second"] == 300.0
    assert 0.01 < metrics["perf/memory_gb"] <= metrics["perf/peak_memory_gb"] < 1000
    assert set(performance(100.0, 600, None, "bf16", CPU)) == MEMORY
