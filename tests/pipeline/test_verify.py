"""A flipped bit and a truncated file are found in every kind of file that a run leaves; what is whole is not
blamed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.artifacts import MANIFEST, Manifest, content_sha256, file_sha256, hash_files, write_manifest
from common.config import DataConfig, ModelConfig, TokenizerConfig
from common.data import cache
from common.errors import UserError
from common.files import commit_folder
from common.handoff import TOKEN_FIELDS, parent_record
from common.stage import Role, Step
from pipeline import run, state
from pipeline.config import PipelineConfig
from pipeline.plan import wire_run
from pipeline.verify import PROVES, verify_path

ROLES = {"sft": Role.policy, "reward": Role.reward_model}


def settings() -> PipelineConfig:
    llama = ModelConfig(config={"model_type": "llama"}, tokenizer=TokenizerConfig(None, 512))
    made = PipelineConfig(run_name="a", model=llama, steps=[Step.sft, Step.reward])
    made.sft.data = made.reward.data = DataConfig(path="rows.jsonl")
    made.sft.optim.eps = 1e-8
    return made


def lines(count: int) -> str:
    return "".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in range(1, count + 1))


def make_step(runs: Path, name: str, begun: int) -> None:
    """What a step that is done has left, written by what the controller and the steps write it with."""
    config, run_dir = settings(), runs / "a"
    wired = {step.stage.name.value: step for step in wire_run(config)}[name]
    folder = run_dir / name
    run_dir.mkdir(parents=True, exist_ok=True)
    resolved = state.write_resolved(config, run_dir)
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").write_text('{"vocabulary": ["a", "b"]}')
    (folder / "metrics.jsonl").write_text(lines(12))
    (folder / "samples.jsonl").write_text('{"step": 2, "prompt": "a", "completion": "b"}\n' * 3)
    (folder / "ledger.json").write_text('{"sources": {"rows": {"rows_read": 12}}}')
    checkpoint = folder / "checkpoints" / "step_00000012"
    (checkpoint / "zero").mkdir(parents=True)
    (checkpoint / "zero" / "shard.pt").write_bytes(bytes(range(256)))
    (checkpoint / "counters.json").write_text('{"step": 12}')
    write_manifest(checkpoint, Manifest("checkpoint", None, hash_files(checkpoint), {"step": 12}))
    unfinished = folder / "export.tmp"
    unfinished.mkdir()
    (unfinished / "config.json").write_text('{"model_type": "llama"}')
    (unfinished / "model.safetensors").write_bytes(bytes(range(256)))
    parents = [parent_record(run_dir / "sft" / "export", run_dir)] if name == "reward" else []
    details: dict[str, Any] = {**dict.fromkeys(TOKEN_FIELDS, 1), "parents": parents}
    details["resolved_config_hash"] = file_sha256(resolved)
    write_manifest(unfinished, Manifest("artifact", ROLES[name], hash_files(unfinished), details))
    commit_folder(unfinished, folder / "export")
    part = state.step_config(config, wired.stage)
    inputs = {f"{name}.data.sources[0]": {"bytes": 5, "files": 1, "modified": 7, "sha256": "5" * 64}}
    if parents:
        inputs["reward.policy"] = {"path": "sft/export", "sha256": parents[0]["manifest_sha256"]}  # type: ignore[dict-item]
    ended = {
        "step": name, "status": "running", "config": part, "config_hash": content_sha256(part),
        "inputs": inputs, "started": "2026-01-01", "launched": "2026-01-01", "launch": begun,
        "exit_status": 0,
    }  # fmt: skip
    run.finish(run_dir, wired, ended)


def make_caches(runs: Path) -> None:
    key = {"kind": "documents", "rows": {"rows": "1" * 64}}
    folder = runs / ".cache" / "data" / cache.digest(key)
    with cache.new_folder(folder) as unfinished:
        for number, name in enumerate((cache.ROWS_FILE, cache.INDEX_FILE, cache.LEDGER_FILE)):
            (unfinished / name).write_bytes(bytes([number]) * 99)
        cache.seal(unfinished, key)
    references = runs / ".cache" / "data" / "reference"
    references.mkdir()
    np.savez(references / "0123.npz", train=np.arange(32.0), held_out=np.arange(4.0))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("verified") / "runs"
    make_step(runs, "sft", 1)
    make_step(runs, "reward", 2)
    make_caches(runs)
    return runs


@pytest.fixture
def runs(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "runs"))


def verified(path: Path) -> tuple[int, list[str]]:
    said: list[str] = []
    return verify_path(path, say=said.append), said


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def differing(path: Path) -> str:
    """What is said to differ; something must be."""
    code, said = verified(path)
    found = [line for line in said if line.startswith("DIFFERS")]
    assert (code, bool(found)) == (UserError.EXIT_CODE, True), said
    return "\n".join(found)


def test_whole_runs_are_whole_from_wherever_one_looks(runs: Path) -> None:
    for place in (runs, runs / "a", runs / "a/sft", runs / "a/sft/export", runs / ".cache"):
        code, said = verified(place)
        assert code == 0 and said[-1] == f"all is as it was written; {PROVES}", said
        assert not any(line.startswith(("DIFFERS", "note")) for line in said)
    named = "\n".join(verified(runs)[1])
    files = {path for path in runs.rglob("*") if path.is_file()}
    held = {MANIFEST, *("shard.pt", "counters.json", "config.json", "model.safetensors")}  # by their folder
    held |= {cache.ROWS_FILE, cache.INDEX_FILE, cache.KEY_FILE}
    for path in files:
        in_cache = path.name == cache.LEDGER_FILE and ".cache" in path.parts
        assert path.name in held or in_cache or str(path) in named, path


KINDS = [
    "a/sft/export/model.safetensors", "a/sft/export/config.json", "a/reward/export/manifest.json",
    "a/sft/checkpoints/step_00000012/zero/shard.pt", "a/sft/checkpoints/step_00000012/counters.json",
    "a/sft/checkpoints/step_00000012/manifest.json", "a/lineage.json", "a/resolved.yaml",
    "a/sft/state.json", "a/reward/state.json", "a/sft/metrics.jsonl", "a/sft/samples.jsonl",
    "a/sft/ledger.json", "a/sft/tokenizer/tokenizer.json", ".cache/data/*/rows.arrow",
    ".cache/data/*/index.arrow", ".cache/data/*/ledger.json", ".cache/data/*/key.json",
    ".cache/data/reference/0123.npz",
]  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_a_truncated_file_of_every_kind_is_found_and_named(runs: Path, name: str) -> None:
    (path,) = runs.glob(name)
    cut(path)
    assert path.name in differing(runs)


@pytest.mark.parametrize("name", KINDS)
def test_a_flipped_bit_anywhere_in_a_file_of_every_kind_is_found(runs: Path, name: str) -> None:
    (path,) = runs.glob(name)
    size = path.stat().st_size
    # the headers and directory of an archive hold times and the like, which nobody reads
    places = (
        [size // 3] if path.suffix == ".npz" and "reference" in name else range(0, size, max(1, size // 9))
    )
    for place in places:
        flip(path, place)
        said = differing(runs)
        assert path.name in said or str(path.parent) in said
        flip(path, place)
    assert verified(runs)[0] == 0


@pytest.mark.parametrize(
    "name",
    [
        kind
        for kind in KINDS
        if not kind.endswith(("lineage.json", "resolved.yaml", MANIFEST, "key.json", ".npz"))
    ],
)
def test_a_file_that_is_gone_is_missed(runs: Path, name: str) -> None:
    (path,) = runs.glob(name)
    path.unlink()
    assert path.name in differing(runs)


def test_a_checkpoint_whose_manifest_is_gone_is_damage(runs: Path) -> None:
    checkpoint = runs / "a" / "sft" / "checkpoints" / "step_00000012"
    (checkpoint / "manifest.json").unlink()
    assert f"{checkpoint} is not finished: it has no manifest.json" in differing(runs)


def test_a_step_that_says_done_without_an_artifact_is_found(runs: Path) -> None:
    (runs / "a/sft/export").rename(runs / "elsewhere")
    said = differing(runs / "a")
    assert "state.json says done, but there is no finished" in said


def test_a_step_that_is_done_and_not_in_the_lineage_is_found(runs: Path) -> None:
    body = json.loads((runs / "a/lineage.json").read_text())
    del body["artifacts"]["reward"]
    (runs / "a/lineage.json").write_text(json.dumps(body))
    assert "reward is done, but not in it" in differing(runs)


def rewrite(folder: Path, **changes: object) -> None:
    known = state.read_state(folder)
    assert known is not None
    state.write_state(folder, {**known, **changes})


@pytest.mark.parametrize("name", ["sft/state.json", "lineage.json"])
def test_a_file_of_endless_brackets_is_found(runs: Path, name: str) -> None:
    (runs / "a" / name).write_text("[" * 100_000)
    assert f"{name} is damaged" in differing(runs / "a")


def test_an_artifact_that_nobody_recorded_yet_is_no_fault(runs: Path) -> None:
    body = json.loads((runs / "a/lineage.json").read_text())
    del body["artifacts"]["reward"]
    (runs / "a/lineage.json").write_text(json.dumps(body))
    rewrite(runs / "a/reward", status="running", records={})
    code, said = verified(runs)
    assert code == 0
    assert any("running, with an artifact that the same command will record" in line for line in said)
    assert any(
        line.startswith("note") and "reward was interrupted" in line or "may be at work" in line
        for line in said
    )


def test_a_step_in_another_state_than_any_is_found(runs: Path) -> None:
    rewrite(runs / "a/sft", status="finished")
    assert "unknown status finished" in differing(runs)


def test_a_configuration_that_is_not_the_recorded_one_is_found_also_before_an_export(runs: Path) -> None:
    shutil.rmtree(runs / "a/reward/export")
    (runs / "a/lineage.json").unlink()
    rewrite(runs / "a/reward", status="failed")
    assert verified(runs / "a")[0] == 0
    path = runs / "a/resolved.yaml"
    text = path.read_text()
    assert "eps: 1.0e-08" in text
    path.write_text(text.replace("eps: 1.0e-08", "eps: 1.0e-07"))
    assert "reward.optim.eps" in differing(runs / "a")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (lines(3) + '{"step": 2, "loss": 1.0}\n', "metrics.jsonl:4: step 2 after step 3"),
        ('{"loss": 1.0}\n', "metrics.jsonl:1: no step"),
        ('{"step": 1, "loss": NaN}\n', "metrics.jsonl:1 is no JSON"),
        ('{"step": 1, "loss": "1.0"}\n', "metrics.jsonl:1: loss is no number"),
        ('{"step": 1}\n{"st\n{"step": 2}\n', "metrics.jsonl:2 is no JSON"),
        ("[1]\n", "metrics.jsonl:1 is no JSON object"),
        ("[" * 100_000 + "\n", "metrics.jsonl:1 is no JSON"),
    ],
)
def test_metrics_that_cannot_be_read_or_go_back_are_found_while_a_step_is_not_done(
    runs: Path, text: str, says: str
) -> None:
    rewrite(runs / "a/reward", status="stopped", records={})
    (runs / "a/reward/metrics.jsonl").write_text(text)
    assert says in differing(runs / "a/reward")


def test_a_line_torn_by_a_kill_is_no_fault_for_it_is_dropped(runs: Path) -> None:
    rewrite(runs / "a/reward", status="stopped", records={})
    path = runs / "a/reward/metrics.jsonl"
    path.write_text(lines(3) + '{"step": 4, "lo')
    code, said = verified(runs / "a/reward")
    assert code == 0 and any("3 lines up to step 3" in line for line in said)
    path.write_text(lines(2) + '{"step": 3, "loss": "NaN"}\n{"step": 3, "eval/loss": 2}\n')
    assert verified(runs / "a/reward")[0] == 0


def test_what_is_unfinished_or_set_aside_is_noted_and_not_looked_into(runs: Path) -> None:
    (runs / "a/sft/checkpoints/step_00000013.tmp").mkdir()
    (runs / "a/sft/checkpoints/quarantine/step_00000011").mkdir(parents=True)
    (runs / "a/sft/checkpoints/quarantine/step_00000011/manifest.json").write_text("damaged")
    (runs / ".cache/data/77.tmp-host-1").mkdir()
    code, said = verified(runs)
    notes = [line for line in said if line.startswith("note")]
    assert code == 0 and len(notes) == 3
    assert any("step_00000013.tmp: unfinished" in line for line in notes)
    assert any("quarantine: set aside" in line for line in notes)


def change_weights(artifact: Path) -> None:
    (artifact / "model.safetensors").write_bytes(b"other")


@pytest.mark.parametrize("damage", [change_weights, lambda folder: shutil.rmtree(folder)])
def test_an_artifact_of_another_run_that_this_one_was_made_from_is_looked_at(
    runs: Path, damage: Callable[[Path], None]
) -> None:
    """The lineage goes across runs."""
    other = Path(shutil.copytree(runs / "a/sft/export", runs.parent / "another run's export"))
    export = runs / "a/reward/export"
    details = json.loads((export / MANIFEST).read_text())["details"]
    details["parents"] = [parent_record(other, runs / "a")]
    assert Path(details["parents"][0]["path"]).is_absolute()
    write_manifest(export, Manifest("artifact", Role.reward_model, hash_files(export), details))
    wired = wire_run(settings())[1]
    known = state.read_state(runs / "a/reward")
    assert known is not None
    run.finish(runs / "a", wired, known)
    assert verified(runs)[0] == 0
    damage(other)
    assert str(other) in differing(runs)


def test_caches_of_older_versions_have_no_hashes_and_are_held_against_their_sizes(runs: Path) -> None:
    (path,) = runs.glob(".cache/data/*/key.json")
    body = json.loads(path.read_text())
    del body["sha256"]
    path.write_text(json.dumps(body))
    code, said = verified(runs / ".cache")
    assert code == 0 and any("of an older version, without hashes" in line for line in said)
    cut(path.parent / cache.ROWS_FILE)
    assert cache.ROWS_FILE in differing(runs / ".cache")


def test_states_of_older_versions_have_neither_checksum_nor_records(runs: Path) -> None:
    path = runs / "a/sft/state.json"
    body = json.loads(path.read_text())
    del body["checksum"], body["records"]
    path.write_text(json.dumps(body))
    assert verified(runs)[0] == 0


def test_a_run_that_is_repeated_keeps_the_hashes_of_when_it_was_done(runs: Path) -> None:
    """Else a file that was damaged since would be recorded as it is."""
    flip(runs / "a/sft/metrics.jsonl", 30)
    known = state.read_state(runs / "a/sft")
    assert known is not None
    run.finish(runs / "a", wire_run(settings())[0], known)
    assert "metrics.jsonl" in differing(runs)
