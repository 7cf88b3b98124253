"""Ranks that share rows: which numbers of them go, and what a plan makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import UserError
from common.launch_config import LaunchConfig
from common.stage import Step
from pipeline import checks
from pipeline.config import PipelineConfig
from pipeline.planning.activations import activations
from pipeline.planning.work import Workload
from pipeline.planning.workload import workload_of
from tests.pipeline.checking import config_in, error_of

SIZES = {"hidden_size": 90, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 9}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PipelineConfig:
    config = config_in(tmp_path, monkeypatch)
    config.model.config |= SIZES
    config.sft.train.global_batch_size = config.sft.train.micro_batch_size = 2
    return config


@pytest.mark.parametrize(
    ("asked", "ranks", "heads", "nearest"),
    [(2, 3, None, 1), (3, 4, None, 2), (4, 8, 6, 2), (2, 6, 9, 1), (8, 12, 12, 6), (16, 8, 32, 8)],
)
def test_a_number_that_ranks_or_heads_cannot_be_divided_by_is_refused_with_the_nearest(
    asked: int, ranks: int, heads: int | None, nearest: int
) -> None:
    launch = LaunchConfig(sequence_parallel=asked)
    with pytest.raises(UserError, match=f"launch.sequence_parallel={asked} does not divide the") as caught:
        launch.check_sequence_parallel(ranks, heads)
    hint = str(caught.value.hint)
    assert hint.startswith(f"launch.sequence_parallel={nearest} divides the {ranks} rank(s)")
    LaunchConfig(sequence_parallel=nearest).check_sequence_parallel(ranks, heads)
    # more ranks are named where they would do
    assert (f"{asked} takes a multiple of {asked} ranks" in hint) == ((heads or 0) % asked == 0)


def test_all_numbers_that_go_are_named() -> None:
    with pytest.raises(UserError) as caught:
        LaunchConfig(sequence_parallel=5).check_sequence_parallel(12, 8)
    assert caught.value.message == "launch.sequence_parallel=5 does not divide the 8 attention heads"
    line = "launch.sequence_parallel=4 divides the 12 rank(s) and the 8 attention heads, and so do 2, 1"
    assert caught.value.hint == line


def test_heads_in_a_config_are_looked_at_before_anything_starts(config: PipelineConfig) -> None:
    config.launch.sequence_parallel = 3
    checks.check(config, ranks=6)
    config.launch.sequence_parallel = 2
    assert "does not divide the 9 attention heads" in error_of(config, ranks=6).message


def test_one_of_several_machines_may_have_fewer_ranks_than_share_a_row(config: PipelineConfig) -> None:
    config.launch.sequence_parallel, config.launch.nnodes = 9, 3
    checks.check(config, ranks=3)  # those of this machine, before it has met the others
    checks.check(config, 9, [3, 3, 3])
    with pytest.raises(UserError, match=r"does not divide the 6 rank\(s\)"):
        checks.check(config, 6, [3, 3])


def test_the_global_batch_is_shared_by_groups_of_ranks(config: PipelineConfig) -> None:
    config.launch.sequence_parallel = 3
    checks.check(config, ranks=6)
    config.launch.sequence_parallel = 1
    assert "less than the 6 ranks" in error_of(config, ranks=6).message


def test_a_rank_has_a_share_of_the_activations(config: PipelineConfig) -> None:
    def bytes_of_share(shared: int) -> float:
        config.launch.sequence_parallel = shared
        work = workload_of(config, Step.sft, 9, gpu=True)
        assert work is not None and work.sharding.ranks == 9
        return activations(work, work.networks[0])

    config.sft.data.max_length, config.sft.train.global_batch_size = 252, 9
    config.sft.train.micro_batch_size = 1
    assert bytes_of_share(3) == pytest.approx(bytes_of_share(1) / 3)
    assert bytes_of_share(9) == pytest.approx(bytes_of_share(1) / 9)


def test_ranks_of_ppo_share_activations_and_no_caches(config: PipelineConfig) -> None:
    config.ppo.data.max_length, config.ppo.train.global_batch_size = 252, 9
    config.ppo.train.micro_batch_size = 1

    def work(shared: int) -> Workload:
        config.launch.sequence_parallel = shared
        found = workload_of(config, Step.ppo, 9, gpu=True)
        assert found is not None
        return found

    whole, slices = work(1), work(9)
    for network in range(2):  # actor and critic
        kept = [activations(each, each.networks[network]) for each in (whole, slices)]
        assert kept[1] == pytest.approx(kept[0] / 9)
    assert slices.decoding == whole.decoding is not None
