"""Devices are counted without torch, and ranks find torchrun's environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from common.launch_config import LaunchConfig, Launcher, SlurmConfig
from launch import local
from launch.local import Job, command, count_gpus, environment, ranks_of


@pytest.mark.parametrize(
    ("visible", "count"),
    [(None, 4), ("", 0), ("-1", 0), ("0", 1), ("2,3", 2), ("0,9,1", 1), ("0,-1,1", 1), ("GPU-a1,GPU-b2", 2)],
)
def test_visible_devices_are_counted_as_cuda_does(
    visible: str | None, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_gpus_present", lambda: 4)
    assert count_gpus({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == count


def test_a_machine_without_gpus_has_none_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local, "_gpus_present", lambda: 0)
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "0,1"}) == 0


def test_gpus_are_the_lines_of_the_drivers_own_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\necho "GPU 0: A (UUID: GPU-1)"\necho "  MIG 1g.5gb (UUID: MIG-2)"\necho "GPU 1: A"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert count_gpus({}) == 2


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 1), (1, 1), (8, 8)])
def test_auto_is_one_rank_per_gpu_and_one_without(
    gpus: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "count_gpus", lambda: gpus)
    assert ranks_of(LaunchConfig()) == ranks


def test_a_number_of_ranks_may_be_named_up_to_the_number_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "count_gpus", lambda: 0)
    assert ranks_of(LaunchConfig(nproc_per_node="3")) == 3
    monkeypatch.setattr(local, "count_gpus", lambda: 2)
    assert ranks_of(LaunchConfig(nproc_per_node="2")) == 2
    with pytest.raises(UserError, match=r"launch\.nproc_per_node=3, but this machine offers 2"):
        ranks_of(LaunchConfig(nproc_per_node="3"))


def test_ranks_of_other_machines_are_not_bound_by_the_gpus_of_this_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local, "count_gpus", lambda: 1)
    assert ranks_of(LaunchConfig(Launcher.slurm, nproc_per_node="8")) == 8
    asked = SlurmConfig(gpus_per_node=4)
    assert ranks_of(LaunchConfig(Launcher.slurm, slurm=asked)) == 4
    with pytest.raises(UserError, match=r"nproc_per_node=8, but launch\.slurm\.gpus_per_node=4\n"):
        ranks_of(LaunchConfig(Launcher.slurm, nproc_per_node="8", slurm=asked))


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", ""])
def test_anything_but_a_number_from_one_is_refused(value: str) -> None:
    with pytest.raises(UserError, match="is not allowed"):
        ranks_of(LaunchConfig(nproc_per_node=value))


def test_one_rank_is_started_directly_with_the_whole_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(local, "count_cores", lambda: 6)
    job = Job("step1_sft", ("--config", "resolved.yaml"))
    assert command(job)[:3] == [sys.executable, "-m", "launch.rank"]
    assert command(job)[-3:] == ["step1_sft", "--config", "resolved.yaml"]
    values = environment(job)
    assert {name: values[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")} == {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
    }  # fmt: skip
    assert values["MASTER_ADDR"] == "127.0.0.1" and values["MASTER_PORT"] == "0"  # torch finds one
    assert values["OMP_NUM_THREADS"] == "6"


def test_several_ranks_share_the_cores_and_get_their_environment_from_the_agent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(local, "count_cores", lambda: 6)
    values = environment(Job("m", (), ranks=4))
    assert values["OMP_NUM_THREADS"] == "1"
    assert "RANK" not in values
    assert command(Job("m", (), ranks=4))[2:5] == ["launch.agent", "--ranks", "4"]


def test_a_number_of_threads_that_was_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS" not in environment(Job("m", ()))


def test_few_kernels_are_kept_unless_the_user_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in local.KERNELS:
        monkeypatch.delenv(name, raising=False)
    assert local.KERNELS.items() <= environment(Job("m", ())).items()
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1024")
    assert "ONEDNN_PRIMITIVE_CACHE_CAPACITY" not in environment(Job("m", ()))


def test_freed_memory_is_kept_on_the_cpu_unless_the_user_chose_an_allocator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for library, expected in ((None, local.KEEPING), ("lib.so.4", {"LD_PRELOAD": "lib.so.4"})):
        monkeypatch.setattr(local, "find_library", lambda name, library=library: library)
        assert local.allocator({}) == expected
        for name in ("LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_"):
            assert local.allocator({name: "of the user"}) == {}
        for name in ("LD_PRELOAD", "GLIBC_TUNABLES", *local.KEEPING):
            monkeypatch.delenv(name, raising=False)
        for gpus in (0, 1):
            monkeypatch.setattr(local, "count_gpus", lambda gpus=gpus: gpus)
            values = environment(Job("m", ()))
            assert (expected.items() <= values.items()) == ("DS_ACCELERATOR" in values) == (gpus == 0)


def test_threads_spin_for_a_moment_on_an_idle_machine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for idle in (True, False):
        monkeypatch.setattr(local, "is_idle", lambda idle=idle: idle)
        values = environment(Job("m", ()))
        assert (values.get("GOMP_SPINCOUNT"), values.get("OMP_WAIT_POLICY")) == (
            ("10000", None) if idle else (None, "PASSIVE")
        )
    monkeypatch.setattr(local, "is_idle", lambda: True)
    for name, value in (("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "7")):
        with monkeypatch.context() as set_by_user:
            set_by_user.setenv(name, value)
            assert not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & environment(Job("m", ())).keys()


@pytest.mark.parametrize(
    ("before", "after", "idle"),
    [
        ("cpu  100 0 50 1000 5 0 0 0 0 0", "cpu  101 0 51 1020 6 0 0 0 0 0", True),
        ("cpu  100 0 50 1000 5 0 0 0 0 0", "cpu  110 0 50 1010 5 0 0 0 0 0", False),
        ("cpu  100 0 50 1000 5 0 0 0 0 0", "cpu  100 0 50 1010 15 0 0 0 0 0", True),  # others wait for a disk
        ("cpu  100 0 50 1000 5 0 0 0 0 0", "cpu  100 0 50 1010 5 0 0 10 0 0", False),  # the host is busy
        ("intr 5", "intr 6", False),
    ],
)
def test_a_machine_is_idle_when_its_processors_were(
    before: str, after: str, idle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = iter([before, after])
    monkeypatch.setattr(local.Path, "read_text", lambda self: next(stats) + "\ncpu0 1 1 1 1\n")
    assert local.is_idle(0.0) is idle


def test_the_projects_packages_are_found_before_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert environment(Job("m", ()))["PYTHONPATH"] == os.pathsep.join([str(local.PROJECT), "/elsewhere"])
