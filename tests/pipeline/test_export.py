from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.artifacts import Manifest, hash_files, verify, write_manifest
from common.config import SchedulerName
from common.errors import UserError
from common.stage import Step
from pipeline.__main__ import dispatch
from pipeline.export import checkpoint_of, lay_out
from tests import runs, tiny_run

PPO_STEPS = {2: {"step": 1, "update": 0}, 3: {"step": 1, "update": 1}, 4: {"step": 2, "update": 0}}


def checkpoint(folder: Path, number: int, **counters: int | None) -> Path:
    made = folder / "checkpoints" / f"step_{number:08d}"
    made.mkdir(parents=True)
    (made / "counters.json").write_text(json.dumps({"step": number, **counters}))
    write_manifest(made, Manifest("checkpoint", None, hash_files(made), {}))
    return made


def refusal(path: Path, wanted: str = "best") -> UserError:
    with pytest.raises(UserError) as error:
        checkpoint_of(path, wanted)
    return error.value


def test_a_checkpoint_is_meant_by_best_last_number_step_run_or_itself(tmp_path: Path) -> None:
    sft = tmp_path / "sft"
    two, four, six = (checkpoint(sft, number, best_step=4) for number in (2, 4, 6))
    (sft / "checkpoints" / "step_00000008").mkdir()  # not finished
    for path, wanted, folder in (
        (tmp_path, "best", four), (tmp_path, "last", six), (sft, "2", two), (two, "best", two),
    ):  # fmt: skip
        assert checkpoint_of(path, wanted).folder == folder
    found = checkpoint_of(tmp_path, "best")
    assert (found.run, found.step, found.counters["step"]) == (tmp_path, Step.sft, 4)
    dpo = checkpoint(tmp_path / "dpo", 3)
    assert checkpoint_of(tmp_path, "best").folder == dpo  # no best is known: the last, of the latest step


def test_what_is_no_checkpoint_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    assert refusal(tmp_path / "r").message.endswith("does not exist")
    assert refusal(tmp_path).message == f"{tmp_path} has no checkpoints"
    sft = tmp_path / "sft"
    (sft / "checkpoints").mkdir(parents=True)
    assert "has no checkpoint yet" in refusal(tmp_path).message
    checkpoint(sft, 2), checkpoint(sft, 4)
    assert refusal(tmp_path, "3").hint == "kept are 2, 4; or best, last"
    assert refusal(tmp_path, "lst").hint == "did you mean --step last?"
    for damaged in ("{", "[]", '{"step": null}', "{}"):
        (sft / "checkpoints" / "step_00000004" / "counters.json").write_text(damaged)
        assert "step_00000004 is damaged" in refusal(tmp_path).message


def test_a_run_without_its_configuration_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "sft", 2)
    with pytest.raises(UserError, match=r"resolved\.yaml cannot be read"):
        dispatch(["export", str(tmp_path)])
    assert [path.name for path in (tmp_path / "sft").iterdir()] == ["checkpoints"]


def test_a_checkpoint_within_an_iteration_is_not_exported(tmp_path: Path) -> None:
    made = {
        number: checkpoint(tmp_path / "ppo", number, **counters) for number, counters in PPO_STEPS.items()
    }
    assert checkpoint_of(tmp_path, "1").folder == made[2]
    assert checkpoint_of(tmp_path, "last").folder == made[4]
    error = refusal(made[3])
    assert error.message == f"{made[3]} is in the midst of an iteration" and "1, 2" in str(error.hint)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    checkpoint(tmp_path / "sft", 2)
    (tmp_path / "sft" / "export.step_2").mkdir()
    with pytest.raises(UserError, match=r"export\.step_2 exists, and nothing is overwritten"):
        dispatch(["export", str(tmp_path)])


def test_a_step_of_two_ranks_under_zero_3_is_exported_by_one_as_the_run_had_it(tmp_path: Path) -> None:
    base = runs.Base.make(tmp_path)
    job = base.job(max_steps=4, save_every=2, eval_every=0)
    job.deepspeed.stage = 3
    job.sft.optim.scheduler, job.sft.optim.warmup_ratio = SchedulerName.constant, 0.0
    run = base.run("whole", job, ranks=2)
    job.sft.train.max_steps = 2
    half = base.run("half", job, ranks=2)
    for number, wanted in ((2, half), (4, run)):
        out = tmp_path / f"step_{number}"
        lay_out(checkpoint_of(run, str(number)), out)
        runs.finish(out, 1)
        assert verify(out / "sft" / "export").files == verify(wanted / "sft" / "export").files


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["sft,reward,ppo", "sft,dpo"])
def test_the_last_checkpoint_of_each_step_gives_the_artifact_that_the_step_left(
    steps: str, tmp_path: Path
) -> None:
    short = [f"{step}.train.max_steps=2" for step in steps.split(",")]
    options = ["run_name=r", f"output_dir={tmp_path}", "tracking=off", "ppo.rollout.prompts=8"]
    options += ["ppo.train.global_batch_size=16", "ppo.ema_decay=0.5"]
    tiny_run.finish(["experiment=demo", f"steps=[{steps}]", *options, *short])
    for step in steps.split(","):
        assert dispatch(["export", str(tmp_path / "r" / step), "--step", "last"]) == 0
        made, own = (verify(tmp_path / "r" / step / name) for name in ("export.step_2", "export"))
        assert made.files == own.files
        assert made.details["metrics"] == own.details["metrics"]
