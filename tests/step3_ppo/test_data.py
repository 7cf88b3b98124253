"""Which prompts an iteration has, and the room that they leave for responses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.distributed import HashStore

from common.data.stored import PromptDataset
from common.errors import UserError
from common.runtime.distributed import World
from common.stage import Step
from common.training.step_data import StepData, load_data
from common.training_config import TrainConfig
from step3_ppo.config import PPOConfig, PPOJob, RolloutConfig
from step3_ppo.data import PromptOrder, dataset_type_of, held_out_sample
from tests.tiny import CHATML, tiny_tokenizer


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> None:
    """What two ranks tell each other by, in one process."""
    shared = HashStore()
    monkeypatch.setattr("torch.distributed.distributed_c10d._get_default_store", lambda: shared)


def loaded(
    tmp_path: Path,
    count: int = 40,
    *,
    rank: int = 0,
    rows: list[dict[str, Any]] | None = None,
    **options: Any,
) -> StepData[PromptDataset]:
    """The prompts of a step: these rows, or `count` of one or two letters and the reference."""
    rows = rows or [{"prompt": f"{n}", "reference": f"{n}"} for n in range(count)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = PPOJob(output_dir=str(tmp_path), ppo=PPOConfig(), seed=5)
    job.ppo.data.path = str(tmp_path / "rows.jsonl")
    for name, value in options.items():
        setattr(job.ppo.rollout if name == "max_new_tokens" else job.ppo.data, name, value)
    world = World(rank, 2, rank, None)  # type: ignore[arg-type]
    tokenizer, kind = tiny_tokenizer(CHATML), dataset_type_of(job)
    return load_data(job, Step.ppo, job.ppo.data, kind, tokenizer, tmp_path, world, lambda line: None)


def order(data: StepData[PromptDataset], per_iteration: int, seed: int = 0) -> PromptOrder:
    return PromptOrder(data.train, per_iteration, seed, data.weights)


def test_prompts_leave_room_for_the_longest_response(tmp_path: Path) -> None:
    options: dict[str, Any] = {"eval_fraction": 0.0, "max_length": 50}
    every = loaded(tmp_path, max_new_tokens=29, **options).train
    assert len(every) == 40 and every.lengths.max() == 21  # those of two digits
    assert len(loaded(tmp_path, max_new_tokens=30, **options).train) == 10
    with pytest.raises(
        UserError, match=r"longer than data.max_length=50 less the 31 tokens .*max_new_tokens"
    ):
        loaded(tmp_path, max_new_tokens=31, **options)


def test_every_rank_has_the_same_prompts_and_the_first_writes_the_ledger(tmp_path: Path) -> None:
    first = loaded(tmp_path)
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    assert ledger["sources"][0]["rows_kept"] == 40 and ledger["sources"][0]["format"] == "prompt"
    (tmp_path / "ledger.json").unlink()
    second = loaded(tmp_path, rank=1)
    assert first.fingerprints() == second.fingerprints() and not (tmp_path / "ledger.json").exists()
    assert [first.train[i].prompt for i in range(38)] == [second.train[i].prompt for i in range(38)]


def test_every_iteration_is_full_and_every_pass_has_every_prompt_once(tmp_path: Path) -> None:
    data = loaded(tmp_path, eval_fraction=0.0)
    iterations = [order(data, 16).prompts_of(k) for k in range(5)]
    assert [len(prompts) for prompts in iterations] == [16] * 5
    asked = sum(iterations, [])  # 80: two passes over 40
    assert sorted(asked[:40]) == sorted(asked[40:]) == list(range(40))
    assert asked[:40] != asked[40:] and asked[:40] != list(range(40))
    assert [order(data, 16).epoch_of(k) for k in (0, 1, 5)] == [0.0, 0.4, 2.0]


@pytest.mark.parametrize(
    ("prompts", "epochs", "per_iteration", "iterations", "of_the_next_pass"),
    [
        (276, 1.0, 256, 2, 236),  # 20 are left after the first
        (256, 1.0, 256, 1, 0),
        (40, 2.0, 16, 5, 0),
        (40, 2.5, 16, 7, 12),
        (10, 0.3, 1, 3, 0),
        (20, 1.0, 128, 1, 108),
        (3, 0.01, 2, 1, 1),
    ],
)
def test_a_run_has_as_many_whole_iterations_as_its_passes_need(
    prompts: int, epochs: float, per_iteration: int, iterations: int, of_the_next_pass: int
) -> None:
    ppo = PPOConfig(rollout=RolloutConfig(prompts=per_iteration), train=TrainConfig(epochs=epochs))
    assert ppo.iterations_over(prompts) == iterations
    said = ppo.filling(prompts)
    assert (said is not None) == (of_the_next_pass > 0)
    assert said is None or f"filled up with {of_the_next_pass} prompts of the next pass" in said
    by_steps = replace(ppo, train=TrainConfig(epochs=epochs, max_steps=9))
    assert by_steps.iterations_over(prompts) == 9 and by_steps.filling(prompts) is None


def test_the_prompts_of_an_iteration_follow_from_the_seed_alone(tmp_path: Path) -> None:
    data = loaded(tmp_path, eval_fraction=0.0)
    asked_late, again = order(data, 16), order(data, 16)
    late = asked_late.prompts_of(7)
    assert [again.prompts_of(k) for k in range(8)][7] == late
    assert order(data, 16, seed=1).prompts_of(7) != late
    assert all(type(index) is int for index in late)


def test_an_iteration_larger_than_the_data_goes_on_with_further_passes(tmp_path: Path) -> None:
    asked = order(loaded(tmp_path, eval_fraction=0.0), 128).prompts_of(1)  # the 128th prompt to the 255th
    assert len(asked) == 128 and sorted(asked[32:72]) == sorted(asked[72:112]) == list(range(40))
    assert asked[32:72] != asked[72:112]


def test_a_sources_weight_says_how_often_an_epoch_has_its_prompts(tmp_path: Path) -> None:
    data = loaded(tmp_path, eval_fraction=0.0)
    twice = PromptOrder(data.train, 80, 0, {"rows": 2.0})
    assert np.bincount(twice.prompts_of(0)).tolist() == [2] * 40 and twice.prompts_per_epoch == 80


def test_held_out_prompts_are_a_seeded_choice_in_their_order(tmp_path: Path) -> None:
    held_out = loaded(tmp_path, eval_fraction=0.5).held_out
    assert held_out is not None and len(held_out) == 20
    chosen = held_out_sample(held_out, 6, seed=0)
    assert len(set(chosen)) == 6 and chosen == sorted(chosen) and max(chosen) < 20
    assert chosen == held_out_sample(held_out, 6, seed=0) != held_out_sample(held_out, 6, seed=1)
    assert held_out_sample(held_out, 500, seed=0) == list(range(20))
    assert held_out_sample(held_out, 0, seed=0) == held_out_sample(None, 6, seed=0) == []


def test_columns_of_mixed_types_reach_reward_functions_as_the_rows_had_them(tmp_path: Path) -> None:
    others: list[dict[str, Any]] = [
        {"answer": "Elbe", "tags": ["a", "b"], "meta": {"level": 1}},
        {"answer": "Oslo", "tags": []},
        {"answer": 7, "tags": None, "meta": "x"},
        {"answer": ["oak", "elm"], "tags": [1, [2]], "meta": 3.5},
    ]
    rows = [{"prompt": f"{n}", **row} for n, row in enumerate(others)]
    prompts = loaded(tmp_path, rows=rows, eval_fraction=0.0).train
    assert [prompts[i].columns for i in range(4)] == others
