"""What may change under a run that was begun, and what is refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.stage import Step
from common.training_config import OptimConfig, SchedulerName
from pipeline.config import PipelineConfig
from pipeline.plan import STAGES
from pipeline.resume import Changes, changes
from pipeline.state import step_config


def part(step: Step = Step.sft, **train: Any) -> dict[str, Any]:
    """The configuration of a step of 10 steps with a constant rate, with other settings of its loop."""
    config = PipelineConfig()
    own = getattr(config, step.value)
    own.optim = OptimConfig(scheduler=train.pop("scheduler", SchedulerName.constant))
    if step is Step.ppo:
        own.critic.optim = OptimConfig(scheduler=train.pop("critic", SchedulerName.constant))
    own.train.max_steps, own.train.eval_every = 10, 2
    for name, value in train.items():
        setattr(own.train, name, value)
    return step_config(config, STAGES[step])


def at(folder: Path, step: int, **counters: int) -> Path:
    made = folder / "checkpoints" / f"step_{step:08d}"
    made.mkdir(parents=True)
    (made / "counters.json").write_text(json.dumps({"step": step, **counters}))
    return folder


def between(old: dict[str, Any], new: dict[str, Any], folder: Path, *, ended: bool = False) -> Changes:
    return changes(old, new, Step.sft, folder, ended=ended)


def test_what_is_measured_and_saved_and_the_micro_batch_may_change(tmp_path: Path) -> None:
    new = part(eval_every=5, save_every=3, entropy_every=0, micro_batch_size=4)
    new["sft"]["sampling"]["num_prompts"] = 2
    found = between(part(), new, at(tmp_path, 4))
    assert found.refused == () and not found.is_work
    assert found.taken == (
        "sft.sampling.num_prompts: 8 -> 2", "sft.train.entropy_every: 1 -> 0", "sft.train.eval_every: 2 -> 5",
        "sft.train.micro_batch_size: 1 -> 4", "sft.train.save_every: 0 -> 3",
    )  # fmt: skip


def test_what_decides_the_result_is_refused_and_how_deepspeed_divides_it_is_nothing(tmp_path: Path) -> None:
    new = part(global_batch_size=7)
    new["seed"], new["deepspeed"]["stage"] = 3, 3
    found = between(part(), new, tmp_path)
    assert found.refused == ("seed: 0 -> 3", "sft.train.global_batch_size: 128 -> 7") and not found.taken


def test_a_constant_rate_goes_on_to_any_length_that_is_not_done(tmp_path: Path) -> None:
    folder = at(tmp_path, 8, applied=8)
    found = between(part(), part(max_steps=20), folder)
    assert found == Changes((), ("sft.train.max_steps: 10 -> 20",), is_work=True)
    assert not between(part(), part(max_steps=8), folder).refused
    (line,) = between(part(), part(max_steps=7), folder).refused
    assert line.startswith("sft.train.max_steps: 10 -> 7: 8 are done")


@pytest.mark.parametrize(
    ("scheduler", "applied", "is_taken"),
    [
        (SchedulerName.cosine, 5, False), (SchedulerName.linear, 5, False), (SchedulerName.wsd, 30, True),
        (SchedulerName.wsd, 36, False), (SchedulerName.cosine, 2, True),
        (SchedulerName.inverse_sqrt, 36, True), (SchedulerName.constant_with_warmup, 36, True),
    ],
)  # fmt: skip
def test_a_rate_that_depends_on_the_length_is_refused_once_it_would_have_been_another(
    scheduler: SchedulerName, applied: int, is_taken: bool, tmp_path: Path
) -> None:
    old, new = (part(scheduler=scheduler, max_steps=steps) for steps in (40, 50))
    found = between(old, new, at(tmp_path, applied, applied=applied))
    assert bool(found.taken) is is_taken
    if not is_taken:
        (line,) = found.refused
        assert f"sft.optim.scheduler={scheduler.value} over 40 steps has other learning rates than" in line
        assert f"{applied} are done" in line and "a new run_name" in line


def test_passes_in_place_of_steps_are_taken_where_no_rate_depends_on_them(tmp_path: Path) -> None:
    folder = at(tmp_path, 4, applied=4)
    one, two = (part(max_steps=None, epochs=epochs) for epochs in (1.0, 2.0))
    assert between(one, two, folder).taken == ("sft.train.epochs: 1.0 -> 2.0",)
    assert "set max_steps" in between(two, one, folder).refused[0]
    assert "set max_steps" in between(part(), one, folder).refused[0]
    cosine = [part(max_steps=None, epochs=epochs, scheduler=SchedulerName.cosine) for epochs in (1.0, 2.0)]
    assert "may depend on it" in between(cosine[0], cosine[1], folder).refused[0]
    same = part(max_steps=4, epochs=1.0, scheduler=SchedulerName.cosine)
    assert between(cosine[0], same, folder, ended=True).taken  # the length stays the same


def test_ppo_goes_on_with_constant_rates_of_both_networks(tmp_path: Path) -> None:
    folder = at(tmp_path, 3, updates=6, applied=6)
    found = changes(part(Step.ppo), part(Step.ppo, max_steps=20), Step.ppo, folder, ended=True)
    assert found.taken and found.is_work
    old, new = (part(Step.ppo, max_steps=n, critic=SchedulerName.linear) for n in (10, 20))
    (line,) = changes(old, new, Step.ppo, folder, ended=True).refused
    assert "ppo.critic.optim.scheduler=linear" in line


def test_what_is_newer_than_a_run_is_no_change_at_its_default(tmp_path: Path) -> None:
    old = part()
    del old["sft"]["train"]["export"], old["sft"]["train"]["stop_when"]
    assert between(old, part(), tmp_path) == Changes()
    new = part()
    new["sft"]["train"]["stop_when"] = {"metric": "eval/loss", "patience": 2}
    found = between(old, new, tmp_path)
    assert found.is_work and found.taken[0].startswith("sft.train.stop_when: null -> ")
