"""`verify` of runs as the controller leaves them: artifacts, checkpoints and who was made from whom."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from common.artifacts import Manifest, hash_files, write_manifest
from common.errors import UserError
from common.stage import Role
from pipeline.verify import verify_path
from tests.pipeline.fakes import DPO, REWARD, SFT, config, from_policy, go, make_policy

pytestmark = pytest.mark.usefixtures("fake_steps")


def test_verify_checks_every_artifact_checkpoint_and_parent_of_a_run(
    capsys: pytest.CaptureFixture[str],
) -> None:

    go()
    checkpoint = Path("runs/a/sft/checkpoints/step_00000002")
    checkpoint.mkdir(parents=True)
    (checkpoint / "shard.pt").write_bytes(b"state")
    write_manifest(checkpoint, Manifest("checkpoint", None, hash_files(checkpoint)))
    assert verify_path(Path("runs/a")) == 0
    shown = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines()[:-1])
    assert shown["ok       runs/a/sft/checkpoints/step_00000002"] == "checkpoint, 1 files, 5 bytes"
    assert {"ok       runs/a/sft/export", "ok       runs/a/lineage.json sft"} < shown.keys()

    (checkpoint / "shard.pt").write_bytes(b"stale")
    assert verify_path(Path("runs/a")) == 2
    assert "shard.pt: content differs" in capsys.readouterr().out
    assert verify_path(checkpoint) == 2
    assert verify_path(Path("runs/a/sft/export")) == 0


def test_verify_finds_an_artifact_that_was_exchanged_for_another(capsys: pytest.CaptureFixture[str]) -> None:

    go()
    export = Path("runs/a/sft/export")
    (export / "config.json").write_text('{"other": 1}')
    write_manifest(export, Manifest("artifact", Role.policy, hash_files(export)))
    assert verify_path(export) == 0  # whole in itself, but not the one that the run made
    assert verify_path(Path("runs/a")) == 2
    assert "another artifact" in capsys.readouterr().out


def test_verify_of_a_folder_without_anything_finished_is_an_error() -> None:
    Path("runs/a").mkdir(parents=True)
    with pytest.raises(UserError, match="holds nothing to verify"):
        verify_path(Path("runs/a"))
    with pytest.raises(UserError, match="no such folder"):
        verify_path(Path("nowhere"))


def test_verify_follows_parents_inside_and_outside_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    make_policy("here")
    go(from_policy(DPO, "here"))
    assert verify_path(Path("runs/a")) == 0
    assert f"made from policy {Path('here').absolute()}" in capsys.readouterr().out
    (Path("here") / "config.json").write_text("[]")  # damaged, with the same manifest
    assert verify_path(Path("runs/a")) == 2
    assert "config.json: " in capsys.readouterr().out
    make_policy("here", '{"other": 1}')  # made again
    assert verify_path(Path("runs/a")) == 2
    shown = capsys.readouterr().out
    assert "DIFFERS" in shown and "the policy that runs/a/dpo/export was made from" in shown
    shutil.rmtree("here")
    assert verify_path(Path("runs/a")) == 2


def test_verify_finds_a_policy_of_the_run_that_was_made_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    go(config(SFT, REWARD))
    assert verify_path(Path("runs/a")) == 0
    assert "made from policy sft/export" in capsys.readouterr().out
    monkeypatch.setenv("FAKE_WEIGHTS", '{"other": 1}')
    go(config(SFT, seed=1, force=True))
    assert verify_path(Path("runs/a")) == 2
    differing = [line for line in capsys.readouterr().out.splitlines() if line.startswith("DIFFERS")]
    assert len(differing) == 1 and "the policy that runs/a/reward/export was made from" in differing[0]


def test_verify_finds_a_lineage_that_tells_of_other_parents_than_the_manifest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    go(config(SFT, REWARD))
    path = Path("runs/a/lineage.json")
    lineage = json.loads(path.read_text())
    lineage["artifacts"]["reward"]["parents"] = []
    path.write_text(json.dumps(lineage))
    assert verify_path(Path("runs/a")) == 2
    assert "names other parents" in capsys.readouterr().out
