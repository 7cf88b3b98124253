"""What ranks say to each other in a step: numbers and arrays, and nothing that is pickled."""

from __future__ import annotations

import json
from pathlib import Path

from tests.programs import pickles
from tests.runs import Base, finish, write_job
from tests.step3_ppo.runs import Artifacts, make_job

RANKS = 2


def steps_of(run_dir: Path) -> list[list[dict[str, list[str]]]]:
    return [json.loads((run_dir / f"rank_{rank}.json").read_text()) for rank in range(RANKS)]


def test_a_step_of_training_is_agreed_on_in_numbers(base: Base) -> None:
    run_dir = base.write("pickles", base.job(max_steps=2))
    finish(run_dir, RANKS, pickles.main, str(run_dir), "sft")
    for steps in steps_of(run_dir):
        assert [step["pickled"] for step in steps] == [[], []]
        assert all("all_reduce" in step["arrays"] for step in steps)


def test_an_iteration_exchanges_its_responses_and_scores_as_arrays(
    folder: Path, artifacts: Artifacts
) -> None:
    run_dir = folder / "pickles"
    write_job(make_job(folder, artifacts, max_steps=2), run_dir)
    finish(run_dir, RANKS, pickles.main, str(run_dir), "ppo")
    for steps in steps_of(run_dir):
        assert [step["pickled"] for step in steps] == [[], []]
        # responses, scores, and the numbers of tokens: their sizes, and then they themselves
        assert all(step["arrays"].count("all_gather") >= 6 for step in steps)
