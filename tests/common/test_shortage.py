"""The kernel's count of processes that it killed for want of memory, wherever it is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.shortage import oom_kills

VMSTAT = {"proc/vmstat": "pgfault 9\noom_kill 5\n"}
GROUPS = "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("files", "count"),
    [
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                f"{GROUPS}/a/b/memory.events": "oom 7\noom_kill 2\noom_group_kill 0\n",
            },
            2,
        ),
        ({"proc/self/cgroup": "0::/\n"}, 5),  # the root counts none of its own
        (
            {
                "proc/self/cgroup": "5:cpu:/x\n4:memory:/c\n0::/\n",
                f"{GROUPS}/memory/c/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
            },
            3,
        ),
        ({}, 5),
    ],
)
def test_the_control_groups_own_count_comes_before_that_of_the_machine(
    files: dict[str, str], count: int, tmp_path: Path
) -> None:
    for name, text in {**VMSTAT, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert oom_kills(tmp_path) == count


def test_a_system_that_counts_none_has_none(tmp_path: Path) -> None:
    assert oom_kills(tmp_path) == 0
