"""What a step records of its rows, and what it says when its policy may have seen them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.artifacts import Artifact, Manifest
from common.data.dataset_types import DEMONSTRATIONS
from common.runtime.distributed import World
from common.stage import Role, Step
from common.training.step_data import load_data
from step1_sft.config import SFTJob
from tests.tiny import CHATML, tiny_tokenizer

SHARES = {"sft": 1.0, "reward": 1.0}


def loaded(
    tmp_path: Path,
    *,
    split: dict[str, float],
    seed: int = 0,
    parent: Any = None,
    variables: dict[str, Any] | None = None,
) -> tuple[Any, list[str]]:
    """What the manifest of a step would say of its data, and the warnings. parent: what its policy's says."""
    rows = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = SFTJob(output_dir=str(tmp_path), seed=seed)
    job.sft.data.path, job.sft.data.stage_split = str(tmp_path / "rows.jsonl"), split
    job.sft.data.chat_template_kwargs = variables or {}
    details = {} if parent is None else {"data": parent}
    policy = Artifact(Path("first/export"), Manifest("artifact", Role.policy, {}, details))
    said: list[str] = []
    world = World(0, 1, 0, None)  # type: ignore[arg-type]
    data = load_data(
        job, Step.sft, job.sft.data, DEMONSTRATIONS, tiny_tokenizer(CHATML), tmp_path, world, said.append,
        policy=policy,
    )  # fmt: skip
    return json.loads(json.dumps(data.fingerprints())), [line for line in said if line.startswith("warning")]


def test_the_record_of_the_data_says_how_rows_were_shared_out(tmp_path: Path) -> None:
    record, _ = loaded(tmp_path, split=SHARES, seed=3)
    assert record["stage_split"] == {"seed": 3, "shares": SHARES}
    assert "stage_split" not in loaded(tmp_path, split={})[0]


def test_the_same_shares_and_seed_as_those_of_the_policy_say_nothing(tmp_path: Path) -> None:
    parent, _ = loaded(tmp_path, split=SHARES)
    assert loaded(tmp_path, split=dict(reversed(SHARES.items())), parent=parent)[1] == []


@pytest.mark.parametrize(
    ("split", "seed", "ours"),
    [
        (SHARES, 1, "{reward: 1, sft: 1} with seed=1"),
        ({"sft": 2.0, "reward": 1.0}, 0, "{reward: 1, sft: 2} with seed=0"),
        ({}, 0, "empty"),
    ],
)
def test_other_shares_or_another_seed_than_the_policys_are_said_in_one_line(
    tmp_path: Path, split: dict[str, float], seed: int, ours: str
) -> None:
    parent = {"stage_split": {"seed": 0, "shares": SHARES}}
    _, (line,) = loaded(tmp_path, split=split, seed=seed, parent=parent)
    assert line == (
        "warning: sft may see rows that its policy first/export was trained on: data.stage_split is "
        f"{ours}, and was {{reward: 1, sft: 1}} with seed=0 there"
    )


@pytest.mark.parametrize(
    "parent", [None, {"train": "x"}, {"stage_split": {"seed": 0, "shares": {"ppo": 1.0}}}]
)
def test_a_policy_that_shared_out_nothing_with_the_step_says_nothing(tmp_path: Path, parent: Any) -> None:
    assert loaded(tmp_path, split={}, parent=parent)[1] == []
    if parent is None or "stage_split" not in parent:
        assert loaded(tmp_path, split=SHARES, parent=parent)[1] == []


def test_variables_of_the_template_are_recorded_and_compared_with_the_policys(tmp_path: Path) -> None:
    quiet = {"quiet": True}
    record, said = loaded(tmp_path, split={}, variables=quiet, parent={"chat_template_kwargs": quiet})
    assert record["chat_template_kwargs"] == quiet and said == []
    plain, (line,) = loaded(tmp_path, split={}, parent=record)
    assert "chat_template_kwargs" not in plain
    assert line.startswith("warning: sft renders its prompts in another way than its policy first/export")
    assert loaded(tmp_path, split={}, variables=quiet)[1] == []  # a model that was not trained here
