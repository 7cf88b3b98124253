"""The CPU benchmarks in turn: `python -m benchmarks.run_all` (`make bench`).

Each is a program of its own, run as a process; one that fails does not keep the others from running. Says at
the end where the results are; exit status 1 when one failed.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from benchmarks.measure import PROJECT, RESULTS

FOLDER = Path(__file__).resolve().parent
PROGRAMS: tuple[tuple[str, ...], ...] = (
    ("sft_parity",),
    ("sft_cpu",),
    ("sft_cpu", "--dtype", "bf16"),
    ("reward_parity",),
    ("reward_cpu",),
    ("reward_cpu", "--dtype", "bf16"),
    ("dpo_parity",),
    ("dpo_parity", "--loss-type", "ipo"),
    ("dpo_parity", "--loss-type", "hinge"),
    ("dpo_cpu",),
    ("dpo_cpu", "--dtype", "bf16"),
    ("rollout_cpu", "--out", "benchmarks/results"),
    ("ppo_cpu",),
    ("demo_chain",),
    ("real_chain",),
    ("weak_scaling",),
    ("memory_plan",),
    ("chat_templates",),
    ("data_scale",),
    ("kill_resume",),
    ("kill_resume", "--step", "reward", "--kills", "10"),
    ("kill_resume", "--step", "dpo", "--kills", "10"),
    ("kill_resume", "--step", "ppo", "--kills", "10"),
    ("fault_matrix",),
)


def main() -> int:
    """Run those that are there."""
    failed = []
    for name, *arguments in PROGRAMS:
        if not (FOLDER / f"{name}.py").exists():
            continue
        shown = " ".join(["python -m", f"benchmarks.{name}", *arguments])
        print(f"\n--- {shown}", flush=True)
        began = time.monotonic()
        command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
        status = subprocess.run(command, cwd=PROJECT, check=False).returncode
        print(f"--- {'done' if status == 0 else f'FAILED ({status})'} in {time.monotonic() - began:.0f} s")
        if status != 0:
            failed.append(shown)
    print(f"\nresults: {RESULTS}; what they mean: {FOLDER / 'README.md'}")
    for shown in failed:
        print(f"failed: {shown}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
