"""What an artifact was made from is followed into the caches, and no nonsense in a run's files ends in a
traceback."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from common.artifacts import MANIFEST, Manifest, file_sha256, hash_files, read_manifest, write_manifest
from common.data import cache
from common.stage import Role
from pipeline import run, state
from pipeline.config import PipelineConfig
from pipeline.plan import wire_run
from pipeline.verify import PROVES
from tests.pipeline import test_verify
from tests.pipeline.test_verify import differing, flip, make_caches, make_step, settings, verified


def make_traced(runs: Path) -> None:
    """A run of SFT whose artifact records what it was made from, in the caches beside it."""
    make_caches(runs)
    make_step(runs, "sft", 1)
    rows, reference = folder_of_rows(runs), runs / ".cache/data/reference/0123.npz"
    recorded = {
        "data": {
            "train": f"{rows.name}-train", "held_out": None, "rows_sha256": cache.rows_sha256(rows),
            "ptx": f"{rows.name}-train", "ptx_rows_sha256": cache.rows_sha256(rows),
        },
        "reference": {"file": reference.name, "sha256": file_sha256(reference)},
    }  # fmt: skip
    export = runs / "a/sft/export"
    details = {**read_manifest(export).details, **recorded}
    write_manifest(export, Manifest("artifact", Role.policy, hash_files(export), details))
    known = state.read_state(runs / "a/sft")
    assert known is not None
    run.finish(runs / "a", wire_run(test_verify.settings())[0], known)


def folder_of_rows(runs: Path) -> Path:
    (key,) = runs.glob(f".cache/data/*/{cache.KEY_FILE}")
    return key.parent


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("traced") / "runs"
    make_traced(runs)
    return runs


@pytest.fixture
def runs(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "runs"))


def test_what_an_artifact_was_made_from_is_followed_from_its_run_and_its_step(runs: Path) -> None:
    rows = folder_of_rows(runs)
    for place in (runs, runs / "a", runs / "a/sft"):
        code, said = verified(place)
        assert code == 0
        export = runs / "a/sft/export"
        found = [line for line in said if line.startswith(f"ok       {export} ")]
        reference = rows.with_name("reference") / "0123.npz"
        assert found == [
            f"ok       {export} rows: {rows} holds those that it was made from",
            f"ok       {export} rows of ptx_data: {rows} holds those that it was made from",
            f"ok       {export} reference log-probabilities: {reference} holds those that it was made from",
        ]
        assert said.count(f"ok       {rows}: tokenized rows, 297 bytes") == 1, said


def test_the_last_line_says_what_is_proved(runs: Path) -> None:
    assert verified(runs)[1][-1] == f"all is as it was written; {PROVES}"
    flip(runs / "a/sft/metrics.jsonl", 9)
    assert verified(runs)[1][-1] == f"1 of them differ; {PROVES}"
    assert "damage, not malice" in PROVES


def test_damaged_rows_are_found_from_the_run_with_what_that_means(runs: Path) -> None:
    flip(folder_of_rows(runs) / cache.ROWS_FILE, 7)
    said = differing(runs / "a")
    assert said.count("\n") == 0 and "rows.arrow: content differs" in said
    assert "no artifact is harmed by that: a run that would read it notices and makes it anew" in said


def test_rows_that_were_replaced_are_whole_and_yet_not_those_of_the_artifact(runs: Path) -> None:
    folder = folder_of_rows(runs)
    key = json.loads((folder / cache.KEY_FILE).read_text())["key"]
    (folder / cache.ROWS_FILE).write_bytes(b"other rows")
    cache.seal(folder, key)
    assert verified(runs / ".cache")[0] == 0 and cache.is_intact(folder)
    said = differing(runs / "a")
    assert f"{folder} holds other rows (" in said and f"{folder} holds other rows of ptx_data (" in said
    assert said.count("DIFFERS") == 2
    assert "they were written anew since; the artifact is unharmed, but it was not trained on these" in said


def test_rows_of_which_a_part_is_gone_are_damaged(runs: Path) -> None:
    (folder_of_rows(runs) / cache.INDEX_FILE).unlink()
    assert "index.arrow: missing" in differing(runs / "a")
    (folder_of_rows(runs) / cache.KEY_FILE).unlink()
    assert "key.json" in differing(runs / "a")


def test_a_cache_that_was_cleaned_away_is_no_damage_and_that_is_said(runs: Path) -> None:
    shutil.rmtree(runs / ".cache")
    code, said = verified(runs / "a")
    gone = [line for line in said if "no longer in" in line]
    assert code == 0 and len(gone) == 3
    assert all("; that is no damage: the same data gives them again" in line for line in gone)


def test_other_reference_log_probabilities_are_found(runs: Path) -> None:
    file = runs / ".cache/data/reference/0123.npz"
    np.savez(file, train=np.arange(1.0, 33.0), held_out=np.arange(4.0))
    assert verified(runs / ".cache")[0] == 0
    assert f"{file} holds other reference log-probabilities (" in differing(runs / "a")


def test_the_cache_is_where_the_runs_settings_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere() -> PipelineConfig:
        made = settings()
        made.sft.data.cache_dir = str(tmp_path / "elsewhere")
        return made

    monkeypatch.setattr(test_verify, "settings", elsewhere)
    make_traced(tmp_path / "runs")
    assert "\n".join(verified(tmp_path / "runs/a")[1]).count("no longer in") == 2
    (tmp_path / "runs/.cache/data").rename(tmp_path / "elsewhere")
    code, said = verified(tmp_path / "runs/a")
    assert code == 0 and [line.split()[2] for line in said if "holds those" in line] == ["rows:", "reference"]


DEEP = 3_000
NONSENSE = {
    "deep lists": b"[" * DEEP + b"]" * DEEP, "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "not UTF-8": b'{"status": "\xff"}', "a number": b"7", "a text": b'"text"', "a list": b"[1, [2], null]",
    "NaN": b"NaN", "infinite": b'{"artifacts": 1e999, "status": 1e999}', "nothing": b"", "null": b"null",
    "half a character": b'{"artifacts": {"\\ud800": 1}, "status": "\\ud800"}',
    "lists for objects": b'{"artifacts": [[1, 2], ["a", 3]], "status": [], "config": [], "inputs": []}',
    "numbers for texts": b'{"artifacts": {"sft": 5}, "status": 7, "config": 7, "inputs": 7, "key": 7}',
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "a/sft/state.json", "a/lineage.json", "a/resolved.yaml", "a/sft/metrics.jsonl", "a/sft/ledger.json",
        "a/sft/export/manifest.json", "a/sft/checkpoints/step_00000012/manifest.json",
        ".cache/data/*/key.json", ".cache/data/reference/0123.npz",
    ],
)  # fmt: skip
def test_nonsense_in_a_file_of_any_kind_is_called_a_difference(runs: Path, name: str) -> None:
    (path,) = runs.glob(name)
    for what, content in NONSENSE.items():
        path.write_bytes(content)
        for place in (runs, runs / "a"):
            code, said = verified(place)
            assert code == 2 and len("\n".join(said)) < 20_000, what


def test_a_lock_of_a_process_that_cannot_be_is_no_traceback(runs: Path) -> None:
    known = state.read_state(runs / "a/sft")
    assert known is not None
    state.write_state(runs / "a/sft", {**known, "status": "running"})
    (runs / "a" / state.LOCK).write_text(f"{state._holder(10**30)}\n")
    assert any("was interrupted" in line for line in verified(runs)[1])


def test_what_is_beside_the_recorded_files_and_what_is_only_linked_is_listed(runs: Path) -> None:
    export, checkpoints = runs / "a/sft/export", runs / "a/sft/checkpoints"
    for number in range(7):
        (export / f"plot_{number}.svg").write_text("")
    checkpoints.rename(runs.parent / "scratch")
    checkpoints.symlink_to(runs.parent / "scratch")
    code, said = verified(runs)
    named = ", ".join(f"plot_{number}.svg" for number in range(5))
    assert code == 0 and any(line.endswith(f"beside them, in no record: {named} and 2 more") for line in said)
    linked = f"note     {checkpoints}: a link to {runs.parent / 'scratch'}, which is verified by that name"
    assert linked in said
    (export / "code").symlink_to(runs.parent / "scratch")
    assert "code: a link to a folder, which nobody recorded" in differing(runs)


def test_a_folder_that_may_not_be_looked_into_is_not_passed_over(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith(("checkpoints", "hidden")):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert f"{runs / 'a/sft/checkpoints'}: cannot be read (Permission denied)" in differing(runs)
    (runs / "a/sft/export/hidden").mkdir()
    assert f"{runs / 'a/sft/export/hidden'} cannot be read: Permission denied" in differing(runs)
    assert (runs / "a/sft/export" / MANIFEST).exists()
