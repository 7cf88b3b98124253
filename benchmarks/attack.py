"""Runs that strangers attack, from their start to their end: they must end as if nobody had been there.

    python -m benchmarks.attack      (as root: it makes network namespaces)

Two ranks on one machine, then on two. One stranger is another user of machine 0 (`nobody`). The other has a
machine of his own with a cable to each of theirs, and has set routes to all of their addresses. Both do what
`benchmarks/attacker.py` does to every port, process and file of the run, over and over: before the machines
have met, while they train, and while they export; in each phase rank 0 stands still until both have attacked.
Exit status 1 when a run did not end with the losses and weights of one that was left alone, when anything of
theirs ran, or when they got at what is not theirs.

Ports of torchrun's agent and of ranks are torch's own, where a few bytes can be a message of its protocols
and connections pile up: they are spared both. What comes of that shows `tests/launch/test_torch_ports.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.kill_resume import MODEL, VOCABULARY, write_rows
from benchmarks.measure import PROJECT, threads_environment, write_results
from benchmarks.namespaces import ip, network
from benchmarks.sockets import Place, listening
from common.launch_config import LaunchConfig
from launch.channel import Channel
from launch.nodes import secret_file

SECONDS = 1200.0
"""After which a run is taken to hang."""
STEPS = 150
CABLES = {"cable": ("a", "b"), "street": ("a", "n"), "lane": ("b", "n")}
MEETS_AT, PORT = "10.91.0.1", 29500
NEAR = {"10.91.0.1": "10.91.1.1", "10.91.0.2": "10.91.2.1"}
"""Each machine's address on the cable between them, and the one on its cable to the neighbour."""
STOPS = f"point=model,rank=0,do=stop;point=step,rank=0,step={STEPS // 2},do=stop;point=export,rank=0,do=stop"
"""Rank 0 stops itself once in every phase, and is continued when the strangers have attacked in it."""
CREDENTIALS = {"WANDB_API_KEY": "5ec7e7" + "ab" * 17, "RLHF_REWARD_TOKEN": "bearer-of-the-reward-server"}


@dataclass
class Result:
    """What became of a run, and what the strangers did to it."""

    machines: int
    faults: list[str] = field(default_factory=list)
    ports: dict[str, list[str]] = field(default_factory=dict)  # by phase
    strangers: dict[str, Any] = field(default_factory=dict)


class Stranger:
    """One who attacks until the context is left."""

    def __init__(self, namespace: str, told: Path) -> None:
        self._told = told
        program = PROJECT / "benchmarks" / "attacker.py"
        with open(told, "w", encoding="utf-8") as output:
            self._process = subprocess.Popen(
                ["ip", "netns", "exec", namespace, sys.executable, str(program)],
                stdin=subprocess.PIPE,
                stdout=output,
                cwd="/",
            )

    def __enter__(self) -> Stranger:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(120)
        finally:
            self._process.kill()

    def tell(self, order: Mapping[str, Any]) -> None:
        """Give him his newest order."""
        assert self._process.stdin is not None and self._process.poll() is None, "the stranger died"
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()

    @property
    def report(self) -> dict[str, Any]:
        """After the last round that he told of."""
        *lines, _ = self._told.read_text(encoding="utf-8").split("\n")
        return json.loads(lines[-1]) if lines else {"rounds": 0}


class Attacked:
    """A run, and what the strangers are told of it."""

    def __init__(self, folder: Path, machines: int, namespaces: Mapping[str, str]) -> None:
        self.folder, self.namespaces, self.result = folder, namespaces, Result(machines)
        self.secrets = [value.encode() for value in CREDENTIALS.values()]
        self.recorded: list[bytes] = []
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, stack: contextlib.ExitStack, *overrides: str) -> None:
        """Start the command on the next machine."""
        number = len(self.processes)
        namespace, output = self.namespaces["ab"[number]], self.folder / f"machine_{number}.txt"
        self.processes.append(stack.enter_context(started(self.folder, namespace, output, overrides)))

    @property
    def is_running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    @property
    def output(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("machine_*.txt")))

    @property
    def phase(self) -> str:
        """What the run does: "start", "training" or "shutdown"."""
        done = len(losses(self.folder))
        return "start" if done == 0 else "training" if done < STEPS else "shutdown"

    def is_attacked_by(self, name: str) -> bool:
        """Whether the stranger can reach it: of one machine a neighbour cannot."""
        return name == "user" or self.result.machines == 2

    def go_on(self, strangers: Mapping[str, Stranger]) -> None:
        """Continue ranks that have stopped themselves once all strangers have attacked in this phase."""
        if all(
            one.report.get("connections", {}).get(self.phase)
            for name, one in strangers.items()
            if self.is_attacked_by(name)
        ):
            for process in (number for one in self.processes for number in listening(one.pid)):
                if is_stopped(process):
                    os.kill(process, signal.SIGCONT)

    def orders(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """For the other user of machine 0, and for the neighbour."""
        phase = self.phase
        families = [listening(process.pid) for process in self.processes]
        known = self.result.ports.setdefault(phase, [])
        for process, ports in (pair for family in families for pair in family.items()):
            texts = [f"{'torch: ' if is_torchs(process) else ''}{port}" for port in ports]
            known += [text for text in texts if text not in known]
        order = {
            "phase": phase,
            "canary": str(self.folder / "canary" / "ran"),
            "recorded": [text.hex() for text in self.recorded],
            "looks_for": [secret.hex() for secret in self.secrets],
        }
        user = {
            "ports": ports_of(families[:1], torchs=False),
            "torch": ports_of(families[:1], torchs=True),
            "processes": [process for family in families for process in family],
            "folders": [str(self.folder / "runs"), str(self.folder / "tmp")],
        }
        neighbour = {
            "ports": from_outside(ports_of(families, torchs=False)),
            "torch": from_outside(ports_of(families, torchs=True)),
            "processes": [],
            "folders": [],
        }
        return order | user, order | neighbour


def ports_of(families: Sequence[Mapping[int, list[Place]]], *, torchs: bool) -> list[Place]:
    """Where torchrun's agent and the ranks listen, or all others."""
    pairs = [pair for family in families for pair in family.items()]
    return [port for process, ports in pairs for port in ports if is_torchs(process) == torchs]


def is_torchs(process: int) -> bool:
    """Whether it is torchrun's agent or a rank, whose ports are torch's."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return words == [b""] or b"launch.agent" in words or b"launch.rank" in words  # nothing: it is ending


def is_stopped(process: int) -> bool:
    """Whether a signal has stopped it."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def from_outside(ports: Sequence[Place]) -> list[Place]:
    """What a neighbour tries for these: the address itself, and those that are near to him."""
    tcp = [port for port in ports if not isinstance(port, str)]
    tried = [*tcp, *((near, port) for _, port in tcp for near in NEAR.values())]
    return [(address, port) for address, port in tried if not address.startswith("127.")]


def attack(machines: int, whole: Path, namespaces: Mapping[str, str]) -> Result:
    """Attack a run on so many machines; `whole` is the folder of one that was left alone."""
    with folder_for_all() as folder:
        run = Attacked(folder, machines, namespaces)
        strangers = {
            "user": Stranger(namespaces["a"], folder / "user.jsonl"),
            "neighbour": Stranger(namespaces["n"], folder / "neighbour.jsonl"),
        }

        def tell() -> None:
            for stranger, order in zip(strangers.values(), run.orders(), strict=True):
                stranger.tell(order)

        with contextlib.ExitStack() as stack:
            for stranger in strangers.values():
                stack.enter_context(stranger)
            if machines == 1:
                run.start(stack, "launch.nproc_per_node=2")
            else:
                meeting = ("launch.nnodes=2", f"launch.rdzv_endpoint={MEETS_AT}:{PORT}")
                run.start(stack, *meeting, "launch.node_rank=0")
                be_recorded(run)
                wait_while(lambda: tell() or any(one.report["rounds"] < 1 for one in strangers.values()), run)
                run.start(stack, *meeting, "launch.node_rank=1")
            wait_while(lambda: tell() or run.go_on(strangers) or run.is_running, run)
        run.result.strangers = {name: stranger.report for name, stranger in strangers.items()}
        judge(run, whole)
        return run.result


def be_recorded(run: Attacked) -> None:
    """Machine 0 waits for the other one, whose first words are recorded. What they share is a secret."""
    launch = LaunchConfig(rdzv_endpoint=f"{MEETS_AT}:{PORT}")
    file = secret_file(run.folder / "runs" / "a", launch)
    wait_while(lambda: not file.exists() or file.stat().st_size == 0, run)
    secret = file.read_bytes()
    run.secrets += [secret, secret.hex().encode()]
    command = [sys.executable, "-c", "from benchmarks.attack import record; record()"]
    there = ["ip", "netns", "exec", run.namespaces["b"], *command]
    recorded = subprocess.run(there, input=secret, stdout=subprocess.PIPE, check=True, cwd=PROJECT)
    run.recorded.append(recorded.stdout)


def record() -> None:
    """Write to stdout what a machine with the secret on stdin says until its hello, which is held back."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        own, way = socket.create_connection(listener.getsockname()), listener.accept()[0]
    wire = socket.create_connection((MEETS_AT, PORT))
    other = Channel(own, sys.stdin.buffer.read(), is_machine_0=False)
    said = way.recv(1 << 16)
    wire.sendall(said)
    while not other.receive(0.2):
        way.sendall(wire.recv(1 << 16))
    other.send("hello", node_rank=1, ranks=1, command={}, host="b")
    sys.stdout.buffer.write(said + way.recv(1 << 16))


def judge(run: Attacked, whole: Path) -> None:
    """Note as a fault whatever is not as it would have been, and what was not really attacked."""
    result, folder = run.result, run.folder
    faults = result.faults
    statuses = [process.poll() for process in run.processes]
    if any(statuses):
        faults.append(f"ended with {statuses}: {run.output[-3000:]}")
    if losses(folder) != losses(whole) or len(losses(folder)) != STEPS:
        faults.append("the losses differ")
    if weights(folder) != weights(whole):
        faults.append("the weights differ")
    if any((folder / "canary").iterdir()):
        faults.append("what a stranger sent was run")
    told = [*run.secrets, str(folder).encode(), b"Traceback"]
    for name, report in result.strangers.items():
        faults += [f"{name}: {text}" for text in report["got_at"]]
        heard = [bytes.fromhex(text) for text in report.pop("heard")]
        faults += [f"{name} was told {text!r}" for text in heard if any(secret in text for secret in told)]
        report["heard"] = sorted({repr(re.sub(rb"[0-9a-f]{64}", b"HEX", text))[:300] for text in heard})
        attacked = run.is_attacked_by(name)
        for phase in ("start", "training", "shutdown") if attacked else ():
            if report["connections"].get(phase, 0) == 0:
                faults.append(f"{name} did not attack during {phase}")
        if result.machines == 2 and report["most_at_once"] < 1000:  # of one machine only torch listens
            faults.append(f"{name} held only {report['most_at_once']} connections")
        if not attacked and report["connections"]:
            faults.append(f"{name} reached a run of one machine")


@contextlib.contextmanager
def folder_for_all() -> Iterator[Path]:
    """A folder that every user may enter, with a place for temporary files and one for canaries."""
    with tempfile.TemporaryDirectory(prefix="attack_") as name:
        folder = Path(name)
        folder.chmod(0o755)
        write_rows(folder / "rows.jsonl")
        for inner in ("tmp", "canary"):
            (folder / inner).mkdir()
            (folder / inner).chmod(0o1777)
        yield folder


@contextlib.contextmanager
def started(
    folder: Path,
    namespace: str,
    output: Path,
    overrides: Sequence[str],
    *,
    wandb: str = "offline",
    faults: str = STOPS,
) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a namespace, which prints into a file; killed when the context is left."""
    command = [
        sys.executable, "-m", "pipeline", "run", "steps=[sft]", "run_name=a", f"output_dir={folder}/runs",
        *(f"model.config.{key}={value}" for key, value in MODEL.items()), "model.dtype=fp32",
        f"model.tokenizer.train_vocab_size={VOCABULARY}", f"sft.data.path={folder}/rows.jsonl",
        "sft.data.max_length=96", "sft.data.eval_fraction=0.1", f"sft.train.max_steps={STEPS}",
        "sft.train.global_batch_size=4", "sft.train.micro_batch_size=2", "sft.optim.lr=1e-3",
        "sft.sampling.num_prompts=0", "deepspeed=zero2", f"tracking.wandb={wandb}", *overrides,
    ]  # fmt: skip
    environment = {**os.environ, **threads_environment(1), **CREDENTIALS}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(PROJECT), "TMPDIR": str(folder / "tmp")}
    environment |= {"RLHF_FAULT": faults, "RLHF_COLLECTIVE_SECONDS": str(SECONDS)}
    environment.pop("GLOO_SOCKET_IFNAME", None)
    with open(output, "wb") as file:
        process = subprocess.Popen(
            ["ip", "netns", "exec", namespace, *command],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=folder,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def run_alone(folder: Path, namespace: str) -> None:
    """The run with two ranks that nobody attacks."""
    output = folder / "alone.txt"
    with started(folder, namespace, output, ["launch.nproc_per_node=2"], wandb="off", faults="") as process:
        assert process.wait(SECONDS) == 0, output.read_text()[-3000:]


def losses(folder: Path) -> list[float]:
    """Of the steps that are logged, as they are logged."""
    path = folder / "runs/a/sft/metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    with contextlib.suppress(ValueError):  # the last line is being written
        return [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    return []


def weights(folder: Path) -> dict[str, str]:
    """Hashes of the artifact's weights."""
    files = (folder / "runs/a/sft/export").glob("*.safetensors")
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def wait_while(condition: Callable[[], Any], run: Attacked) -> None:
    """Return once it is not so any more."""
    end = time.monotonic() + SECONDS
    while condition():
        assert time.monotonic() < end, run.output[-3000:]
        time.sleep(0.2)


@contextlib.contextmanager
def neighbourhood() -> Iterator[dict[str, str]]:
    """Machines `a` and `b` with a cable, and `n`, with one to each and routes to their other addresses."""
    with network(CABLES) as namespaces:
        for address, near in NEAR.items():
            ip("-n", namespaces["n"], "route", "add", address, "via", near)
        yield namespaces


def main() -> int:
    """Attack both kinds of runs; returns the exit status."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    with neighbourhood() as namespaces, folder_for_all() as whole:
        run_alone(whole, namespaces["a"])
        results = []
        for machines in (1, 2):
            results.append(asdict(attack(machines, whole, namespaces)))
            print(json.dumps(results[-1]), flush=True)
    write_results("attack", {"results": results})
    return int(any(result["faults"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
