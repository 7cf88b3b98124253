"""Every probe finds what is wrong, says the way out, and lets what is right alone."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from common import jit
from common.errors import UserError
from common.files import WRITTEN_WITH
from launch import local
from pipeline.doctor import doctor, hardware, software, system
from pipeline.doctor.examine import PROBES, examine, report
from pipeline.doctor.findings import GIB, Finding, Level, Machine, Probe
from pipeline.doctor.torch_probe import products
from tests.mounts import read_only

PROJECT = Path(__file__).resolve().parents[2]


def machine(folder: Path, **environment: str) -> Machine:
    return Machine({"PATH": os.environ["PATH"], "HOME": str(folder), **environment}, folder / "runs")


def levels(findings: Iterable[Finding]) -> list[Level]:
    return [finding.level for finding in findings]


def only(findings: Iterable[Finding]) -> Finding:
    (finding,) = findings
    return finding


# --- The verb --------------------------------------------------------------------------------------


def test_the_verb_names_a_stale_lock_and_fails_without_a_traceback(tmp_path: Path) -> None:
    lock = tmp_path / "extensions" / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    environment = {
        **os.environ,
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "WANDB_API_KEY": "k" * 40,
    }
    command = [sys.executable, "-m", "pipeline", "doctor", f"output_dir={tmp_path / 'runs'}"]
    ended = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
    lines = ended.stdout.splitlines()
    assert ended.returncode == UserError.EXIT_CODE and ended.stderr == ""
    assert any(line.startswith("WARNING") and str(lock) in line and f"-> rm {lock}" in line for line in lines)
    for probe in PROBES:
        if probe.name != "caches":  # which has a line for each
            assert any(line[9:].startswith(f"{probe.name} ") for line in lines), probe.name
    assert "k" * 40 not in ended.stdout
    assert not (tmp_path / "runs").exists() and sorted(os.listdir(tmp_path)) == ["extensions"]


def test_a_finding_is_one_line_and_only_warnings_fail() -> None:
    lines: list[str] = []
    findings = [Finding(Level.ok, "cpu", "two"), Finding(Level.note, "gpu", "none", "buy one")]
    assert report(findings, lines.append) == 0
    assert lines == ["ok       cpu          two", "note     gpu          none -> buy one", lines[-1]]
    assert "nothing" in lines[-1]
    assert report([*findings, Finding(Level.warning, "disk", "full", "free some")], lines.append) == 2
    assert lines[-2:] == ["WARNING  disk         full -> free some", "1 of these would stop a run"]


@pytest.mark.parametrize("argument", ["--help-me", "runs", "output_dir=", "steps=[sft]"])
def test_other_arguments_are_refused(argument: str) -> None:
    with pytest.raises(UserError, match="doctor output_dir=runs"):
        doctor([argument])


def test_a_probe_that_never_answers_or_fails_costs_one_line_and_not_the_others(tmp_path: Path) -> None:
    answered = threading.Event()

    def fails(_: Machine) -> list[Finding]:
        raise RuntimeError("no such\nthing")

    def hangs(_: Machine) -> list[Finding]:
        answered.wait()
        return []

    chosen = (
        Probe("hanging", hangs, "pull the plug"),
        Probe("failing", fails),
        Probe("fine", lambda _: [Finding(Level.ok, "fine", "yes")]),
    )
    try:
        findings = examine(machine(tmp_path), chosen, limit=0.5)
    finally:
        answered.set()
    assert [finding.name for finding in findings] == ["hanging", "failing", "fine"]
    assert levels(findings) == [Level.warning, Level.note, Level.ok]
    assert findings[0].way_out == "pull the plug"
    assert findings[1].text == "could not be looked at (RuntimeError: no such thing)"


def test_the_controller_stays_without_torch() -> None:
    code = "import sys, pipeline.doctor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=False).returncode == 0


# --- Hardware --------------------------------------------------------------------------------------


def test_memory_below_what_a_rank_takes_is_a_warning_also_in_a_container() -> None:
    assert levels(hardware.judge_memory(8 * GIB, GIB, None, 0)) == [Level.ok]
    assert levels(hardware.judge_memory(8 * GIB, GIB - 1, None, 0)) == [Level.warning]
    inside = only(hardware.judge_memory(64 * GIB, 32 * GIB, 4 * GIB, 3 * GIB + 1))
    assert inside.level is Level.warning and "1.0 of 4.0 GiB free (a container's limit)" in inside.text
    # a limit above what there is limits nothing
    wide = only(hardware.judge_memory(8 * GIB, 4 * GIB, 64 * GIB, 64 * GIB))
    assert (wide.level, wide.text) == (Level.ok, "4.0 of 8.0 GiB free")


def with_nvidia_smi(folder: Path, script: str, **environment: str) -> Machine:
    tool = folder / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    return machine(folder, PATH=f"{tool.parent}:{os.environ['PATH']}", **environment)


def test_gpus_are_listed_as_the_driver_has_them(tmp_path: Path) -> None:
    rows = "echo '0, NVIDIA H200, 4, 143771, 570.1'; echo '1, NVIDIA H200, 143000, 143771, 570.1'"
    findings = list(hardware.gpus(with_nvidia_smi(tmp_path, rows)))
    assert levels(findings) == [Level.ok, Level.note]
    assert findings[0].text == "2 x NVIDIA H200, driver 570.1"
    assert findings[1].text.startswith("GPU 1 (NVIDIA H200): 139.6 of 140.4 GiB are in use")


def test_a_driver_that_fails_where_there_is_no_gpu_is_no_fault(tmp_path: Path) -> None:
    if any(path.name[6:].isdecimal() for path in Path("/dev").glob("nvidia*")):
        pytest.skip("this machine has GPUs")
    finding = only(hardware.gpus(with_nvidia_smi(tmp_path, "echo NVML failed; exit 9")))
    assert finding.level is Level.note and "NVML failed" in finding.text
    assert only(hardware.gpus(machine(tmp_path, PATH=str(tmp_path)))).level is Level.note


def torch_says(**found: Any) -> dict[str, Any]:
    there = {"torch": "2.13.0", "cuda": "13.0", "gloo": True, "nccl": "2.27.3", "apart": [], "error": None}
    return {**there, "devices": [{"name": "H200", "bytes": 1, "bf16": True}] * 2, **found}


def test_what_torch_sees_is_held_against_the_ranks_that_would_be_started() -> None:
    fine = only(hardware.judge_torch(torch_says(), 2))
    assert fine.level is Level.ok and "NCCL 2.27.3" in fine.text and "bf16" in fine.text
    cpu_build = only(hardware.judge_torch(torch_says(cuda=None, devices=[]), 2))
    assert cpu_build.level is Level.warning and "CUDA build" in cpu_build.way_out
    old = only(hardware.judge_torch(torch_says(devices=[], error="driver too old"), 2))
    assert old.level is Level.warning and "0 of 2" in old.text and "driver too old" in old.text
    assert only(hardware.judge_torch(torch_says(nccl=None), 2)).level is Level.warning
    assert only(hardware.judge_torch(torch_says(gloo=False), 0)).level is Level.warning
    # on a machine without GPUs a CUDA build that finds none is as it should be
    assert only(hardware.judge_torch(torch_says(devices=[], error="no driver"), 0)).level is Level.ok


def test_gpus_without_bf16_or_apart_from_each_other_are_noted() -> None:
    older = [{"name": "V100", "bytes": 1, "bf16": False}, {"name": "H200", "bytes": 1, "bf16": True}]
    findings = list(hardware.judge_torch(torch_says(devices=older, apart=[[0, 1]]), 2))
    assert levels(findings) == [Level.ok, Level.note, Level.note]
    assert "model.dtype=fp16" in findings[1].way_out and "0-1" in findings[2].text


def test_the_faster_dtype_is_named_beside_the_one_that_auto_takes() -> None:
    def judged(fp32: float, bf16: float, devices: list[Any]) -> Finding:
        return only(hardware.judge_products({"gflops": {"fp32": fp32, "bf16": bf16}, "devices": devices}))

    slower = judged(165.0, 86.0, [])
    assert slower.level is Level.ok and "auto is fp32 here" in slower.text and "bf16 86" in slower.text
    faster = judged(100.0, 250.0, [])
    assert faster.level is Level.note and faster.way_out.startswith("model.dtype=bf16 is 2.5 times as fast")
    assert judged(50.0, 700.0, [{}]).level is Level.ok  # on a GPU bf16 is what auto takes
    assert list(hardware.judge_products({"gflops": {}, "devices": []})) == []


def test_products_are_measured_in_both_dtypes() -> None:
    speed = products("cpu", seconds=0.001)
    assert speed.keys() == {"fp32", "bf16"} and min(speed.values()) > 0


def test_little_shared_memory_matters_to_several_gpus_only() -> None:
    assert levels(hardware.judge_shared_memory(64 * 2**20, 2)) == [Level.warning]
    assert levels(hardware.judge_shared_memory(64 * 2**20, 1)) == [Level.ok]
    assert levels(hardware.judge_shared_memory(128 * 2**20, 8)) == [Level.ok]


# --- Software --------------------------------------------------------------------------------------

PINS = {"torch": "2.13.0", "hydra-core": "1.3.8"}
WANTED = ["torch>=2.11", "Hydra_Core>=1.3.2,<1.4"]


def judged(**installed: str) -> list[Finding]:
    return list(software.judge_versions(WANTED, ">=3.11", PINS, installed.get))


def test_versions_are_held_against_the_tested_ones_and_the_ranges() -> None:
    assert levels(judged(torch="2.13.0+cpu", Hydra_Core="1.3.8")) == [Level.ok]
    other = only(judged(torch="2.12.1", Hydra_Core="1.3.2"))
    assert other.level is Level.note
    assert "torch 2.12.1 (tested: 2.13.0)" in other.text and "Hydra_Core 1.3.2 (tested: 1.3.8)" in other.text
    outside = only(judged(torch="2.10.0", Hydra_Core="1.3.8"))
    assert outside.level is Level.warning and outside.way_out == "pip install 'torch==2.13.0'"
    missing = only(judged(torch="2.13.0"))
    assert missing.level is Level.warning and "Hydra_Core is not installed" in missing.text
    python = software.judge_versions([], ">=3.99", {}, {}.get)
    assert only(python).level is Level.warning


def test_the_pins_of_this_project_cover_what_it_depends_on(tmp_path: Path) -> None:
    pins = software.parse_pins((PROJECT / "constraints.txt").read_text())
    assert pins["torch"] == "2.13.0" and pins["pyyaml"]
    assert software.parse_pins("# torch==1\nA_b==2\n") == {"a-b": "2"}
    assert all(finding.name == "versions" for finding in software.versions(machine(tmp_path)))


def test_the_allocator_of_ranks_on_the_cpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, str]] = []
    for environment, library in (({}, None), ({}, "lib.so.4"), ({"LD_PRELOAD": "own"}, None)):
        monkeypatch.setattr(local, "find_library", lambda name, library=library: library)
        (found,) = software.allocator(Machine(environment, Path()))
        said.append((found.text, found.way_out))
    assert said[0][0].startswith("glibc, told to keep") and "libtcmalloc" in said[0][1]
    assert said[1:] == [("lib.so.4 for ranks on the CPU", ""), ("chosen by the environment", "")]


def test_a_lock_of_a_compilation_at_work_is_noted_and_a_stale_one_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = jit.Lock(tmp_path / "a" / "lock", 5.0, 1.0, 77, False)
    left = jit.Lock(tmp_path / "b" / "lock", 9000.0, 9000.0, None, False)
    monkeypatch.setattr(jit, "locks_in", lambda folder: [held, left])
    findings = list(software.jit_locks(machine(tmp_path)))
    assert levels(findings) == [Level.warning, Level.note]
    assert findings[0].way_out == f"rm {left.path}" and "2 h old" in findings[0].text
    assert "process 77 holds it" in findings[1].text


# --- Places ----------------------------------------------------------------------------------------


def test_a_folder_is_written_to_and_left_as_it_was(tmp_path: Path) -> None:
    findings = list(system.place("output_dir", tmp_path / "not" / "yet", "elsewhere"))
    assert only(findings).level is not Level.warning and f"to be made in {tmp_path}" in findings[0].text
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_of_a_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    finding = only(system.place("output_dir", tmp_path / "file" / "runs", "output_dir=FOLDER"))
    assert (finding.level, finding.way_out) == (Level.warning, "output_dir=FOLDER")
    spare = only(system.place("hub cache", tmp_path / "file", "HF_HOME=FOLDER", is_needed=False))
    assert spare.level is Level.note


def test_a_folder_that_may_not_be_looked_into_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", refuse)
    finding = only(system.place("output_dir", tmp_path / "runs", "output_dir=FOLDER"))
    assert (finding.level, finding.way_out) == (Level.warning, "output_dir=FOLDER")
    assert f"{tmp_path / 'runs'}: Permission denied" in finding.text


@pytest.mark.parametrize("refuses", ["fsync", "replace"])
def test_a_disk_that_cannot_commit_is_found_and_left_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: str
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, refuses, refuse)
    finding = only(system.place("output_dir", tmp_path, "output_dir=FOLDER"))
    assert finding.level is Level.warning and "Read-only file system" in finding.text
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_disk_is_found(tmp_path: Path) -> None:
    with read_only(tmp_path):
        finding = only(system.place("output_dir", tmp_path / "runs", "output_dir=FOLDER"))
    assert finding.level is Level.warning and "Read-only file system" in finding.text


def test_room_is_judged_by_what_a_run_needs() -> None:
    def level(free: int, kind: str = "ext4", is_needed: bool = True) -> Level:
        return only(system.judge_room("x", "there", free, kind, "elsewhere", is_needed)).level

    assert [level(system.LEAST_DISK - 1), level(system.LEAST_DISK)] == [Level.warning, Level.note]
    assert level(system.LEAST_DISK - 1, is_needed=False) is Level.note
    assert [level(system.LITTLE_DISK), level(system.LITTLE_DISK, "tmpfs")] == [Level.ok, Level.note]


# --- Surroundings ----------------------------------------------------------------------------------


def test_interfaces_that_do_not_exist_are_found() -> None:
    def check(**names: str) -> list[Level]:
        return levels(
            system.interfaces({f"{library}_SOCKET_IFNAME": name for library, name in names.items()})
        )

    assert check() == check(GLOO="lo") == check(NCCL="^docker") == check(NCCL="l") == check(NCCL="=lo") == []
    assert check(GLOO="l") == check(NCCL="=l") == check(NCCL="nosuch,other") == [Level.warning]
    assert check(GLOO="lo,nosuch", NCCL="nosuch") == [Level.warning, Level.warning]


@pytest.mark.parametrize(
    ("answer", "level", "says"),
    [
        (OSError(-2, "Name or service not known"), Level.note, "does not resolve"),
        (["127.0.1.1"], Level.note, "no other machine finds it"),
        (["203.0.113.7"], Level.note, "not this machine"),
    ],
)
def test_a_name_that_leads_nowhere_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Any, level: Level, says: str
) -> None:
    def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
        if isinstance(answer, OSError):
            raise answer
        return [(2, 1, 6, "", (address, 0)) for address in answer]

    monkeypatch.setattr(system.socket, "getaddrinfo", getaddrinfo)
    finding = only(system.network(machine(tmp_path)))
    assert finding.level is level and says in finding.text and "GLOO_SOCKET_IFNAME" in finding.way_out


def test_few_open_files_are_noted_and_very_few_are_a_warning() -> None:
    unlimited = resource.RLIM_INFINITY
    assert (
        levels(system.judge_files(1024, 4096))
        == levels(system.judge_files(unlimited, unlimited))
        == [Level.ok]
    )
    few = only(system.judge_files(1023, 4096))
    assert (few.level, few.way_out) == (Level.note, "ulimit -n 4096")
    assert only(system.judge_files(255, unlimited)).level is Level.warning


def test_where_numbers_go_follows_key_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))

    def look(**environment: str) -> Finding:
        return only(software.tracking(machine(tmp_path, **environment)))

    assert look().text.startswith("offline: there is no key") and look().way_out == "wandb login"
    with_key = look(WANDB_API_KEY="a" * 40)
    assert with_key.level is Level.ok and with_key.text.startswith("online") and "aaaa" not in with_key.text
    assert look(WANDB_API_KEY="a" * 40, WANDB_MODE="offline").text.startswith("offline, because")
    assert look(WANDB_API_KEY="a" * 40, WANDB_DISABLED="true").text.startswith("off, because")
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai login user password secret\n")
    netrc.chmod(0o644)
    assert look().text.startswith("offline: there is no key")
    netrc.chmod(0o600)
    assert look().text.startswith("online")
    assert look(WANDB_BASE_URL="https://another.example").text.startswith("offline")


def test_what_verbs_tell_their_own_processes_is_not_listed() -> None:
    (found,) = software.variables(Machine({WRITTEN_WITH: "output_dir=DIR"}, Path()))
    assert found.text == "no variable that changes runs"


def test_variables_that_change_runs_are_listed_without_credentials(tmp_path: Path) -> None:
    assert only(software.variables(machine(tmp_path, EDITOR="vi"))).level is Level.ok
    finding = only(
        software.variables(machine(tmp_path, NCCL_DEBUG="INFO", HF_TOKEN="hf_abcdefghijkl", EDITOR="vi"))
    )
    assert "NCCL_DEBUG=INFO" in finding.text and "HF_TOKEN=[redacted]" in finding.text
    assert "abcdefgh" not in finding.text and "EDITOR" not in finding.text
    left = list(software.variables(machine(tmp_path, RANK="3", MASTER_ADDR="node1")))
    assert left[1].way_out == "unset RANK MASTER_ADDR"


def test_the_hub_is_described_and_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: Any) -> Callable[..., None]:
        raise AssertionError("the network was used")

    monkeypatch.setattr(system.socket.socket, "connect", connect)
    assert "no token" in only(software.hub(machine(tmp_path))).text
    finding = only(software.hub(machine(tmp_path, HF_TOKEN="hf_abcdefghijkl")))
    assert "a token is there" in finding.text and "abcdef" not in finding.text
    mirror = only(software.hub(machine(tmp_path, HF_ENDPOINT="https://user:secret@mirror")))
    assert "@mirror" in mirror.text and "secret" not in mirror.text
    assert only(software.hub(machine(tmp_path, HF_HUB_OFFLINE="1"))).way_out == "unset HF_HUB_OFFLINE"
