"""A step that trains nothing: it leaves an artifact, or does what FAKE_STEP says.

done (default): leave an artifact. crash, user-error, no-export: end in that way. wait: write the
process ids of rank and parent, then end with 143 when told to stop, as a step that saved.
"""

import os
import signal
import sys
import time
from pathlib import Path

from common.artifacts import Manifest, commit_folder, hash_files, write_manifest
from common.stage import Role

RANK = os.environ["RANK"]


def leave_artifact(run_dir: Path) -> None:
    if RANK != "0" or (run_dir / "sft" / "export").exists():
        return
    tmp = run_dir / "sft" / "export.tmp"
    tmp.mkdir(parents=True)
    (tmp / "config.json").write_text("{}")
    write_manifest(tmp, Manifest("artifact", Role.policy, hash_files(tmp)))
    commit_folder(tmp, run_dir / "sft" / "export")
    (run_dir / "sft" / "samples.jsonl").write_text("{}\n")


def wait(run_dir: Path) -> int:
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    signal.signal(signal.SIGUSR1, lambda number, frame: told.append(number))
    (run_dir / f"pid_{RANK}.tmp").write_text(f"{os.getpid()} {os.getppid()}")
    (run_dir / f"pid_{RANK}.tmp").rename(run_dir / f"pid_{RANK}")
    while not told:
        time.sleep(0.02)
    (run_dir / f"told_{RANK}").write_text(" ".join(map(str, told)))
    return 143


def main() -> int:
    arguments = sys.argv[1:]
    if "--preview" in arguments:
        text = Path(arguments[arguments.index("--config") + 1]).read_text()
        print("previewing", "max_length: 256" in text, flush=True)
        return int(os.environ.get("FAKE_STATUS", "0"))
    run_dir = Path(arguments[arguments.index("--run-dir") + 1])
    with open(run_dir / f"launches_{RANK}", "a") as file:
        file.write(f"{os.environ['WORLD_SIZE']} {os.environ['MASTER_ADDR']}\n")
    behaviour = os.environ.get("FAKE_STEP", "done")
    if behaviour == "wait":
        return wait(run_dir)
    if behaviour == "crash" and os.environ.get("FAKE_RANK", "0") == RANK:
        raise RuntimeError("the fake step crashed")
    if behaviour == "user-error":
        print("error: the fake step found something", file=sys.stderr)
        return 2
    if behaviour != "no-export":
        leave_artifact(run_dir)
    return 0


sys.exit(main())
