"""A step that trains nothing: it leaves an artifact, or does what FAKE_STEP says.

done (default): leave an artifact. crash, user-error, no-export: end in that way. wait: write the
process ids of rank and parent, then end with 143 when told to stop, as a step that saved.
FAKE_WEIGHTS is what is in the artifact, FAKE_TOKENIZER the hash of its tokenizer, FAKE_ACCURACY the share of
held-out pairs that a reward model orders. `fake_reward`, `fake_dpo` and `fake_ppo` do the same, from the
artifacts that resolved.yaml names.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from common.artifacts import Manifest, hash_files, write_manifest
from common.files import commit_folder
from common.handoff import parent_record
from common.stage import Role, Step

RANK = os.environ.get("RANK", "0")
FAKES = {Step.sft: "fake_step", Step.reward: "fake_reward", Step.dpo: "fake_dpo", Step.ppo: "fake_ppo"}

TOKENS: dict[str, Any] = {
    "tokenizer_hash": "t1",
    "chat_template_hash": "c1",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "terminators": [2],
}


def leave_artifact(run_dir: Path, name: str, role: Role, details: dict[str, Any]) -> None:
    if RANK != "0" or (run_dir / name / "export").exists():
        return
    tmp = run_dir / name / "export.tmp"
    tmp.mkdir(parents=True)
    (tmp / "config.json").write_text(os.environ.get("FAKE_WEIGHTS", "{}"))
    write_manifest(tmp, Manifest("artifact", role, hash_files(tmp), details))
    commit_folder(tmp, run_dir / name / "export")
    (run_dir / name / "samples.jsonl").write_text("{}\n")


def details_of(run_dir: Path, name: str) -> dict[str, Any]:
    """What the manifest says of tokenizer and parents."""
    part = yaml.safe_load((run_dir / "resolved.yaml").read_text())[name]
    tokenizer = {**TOKENS, "tokenizer_hash": os.environ.get("FAKE_TOKENIZER", "t1")}
    if name == "sft":
        return {**tokenizer, "parents": []}
    made_from = [part[role] for role in ("policy", "reward_model") if part.get(role) is not None]
    details = {**tokenizer, "parents": [parent_record(Path(path), run_dir) for path in made_from]}
    if name == "reward" and "FAKE_ACCURACY" in os.environ:
        accuracy = float(os.environ["FAKE_ACCURACY"])
        details["calibration"] = {"mean": 0.0, "std": 1.0, "accuracy": accuracy, "pairs": 20}
        details["metrics"] = {"eval/accuracy": accuracy}
    return details


def preview(name: str, config: Path) -> int:
    """Say what the step was told, and leave a tokenizer as SFT does where it trains one."""
    job = yaml.safe_load(config.read_text())
    print("previewing", job[name]["data"]["max_length"] == 256, flush=True)
    print(
        f"{name}: policy {job[name].get('policy')}, tokenizer {job['model']['tokenizer']['path']}", flush=True
    )
    if name == "sft" and "FAKE_TRAINS_TOKENIZER" in os.environ:
        (config.parent / "sft" / "tokenizer").mkdir(parents=True)
    return int(os.environ.get("FAKE_STATUS", "0"))


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


def main(name: str = "sft", role: Role = Role.policy) -> int:
    arguments = sys.argv[1:]
    if "--preview" in arguments:
        return preview(name, Path(arguments[arguments.index("--config") + 1]))
    if "--check" in arguments:
        return 0
    run_dir = Path(arguments[arguments.index("--run-dir") + 1])
    with open(run_dir / f"launches_{RANK}", "a") as file:
        file.write(f"{os.environ['WORLD_SIZE']} {os.environ['MASTER_ADDR']}\n")
    with open(run_dir / f"{name}_launches", "a") as file:
        file.write("launched\n")
    behaviour = os.environ.get("FAKE_STEP", "done")
    if behaviour == "wait":
        return wait(run_dir)
    if behaviour == "crash" and os.environ.get("FAKE_RANK", "0") == RANK:
        raise RuntimeError("the fake step crashed")
    if behaviour == "user-error":
        print("error: the fake step found something", file=sys.stderr)
        return 2
    if behaviour != "no-export":
        leave_artifact(run_dir, name, role, details_of(run_dir, name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
