"""Runs every probe at once, each in a thread of its own and for a limited time; prints a line
per finding, in the order of the probes. Takes nothing but the folder for runs; returns 2 when something would
stop or hang a run, else 0. Changes nothing, and asks nothing of other machines but the name server.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from common.errors import UserError
from pipeline.doctor import hardware, software, system
from pipeline.doctor.findings import Finding, Level, Machine, Probe, note, warning
from pipeline.options import Options

SECONDS = 10.0
"""How long a probe may take; a disk or a name server that is away can take for ever."""
TORCH_SECONDS = 60.0
"""And the one that imports torch, which on a busy machine takes its time."""

_DISK = "a disk that does not answer: name another one"

PROBES: tuple[Probe, ...] = (
    Probe("cpu", hardware.cores),
    Probe("memory", hardware.memory),
    Probe("gpu", hardware.gpus, "the driver hangs: nvidia-smi should answer at once"),
    Probe("torch", hardware.torch, starts_child=True),
    Probe("/dev/shm", hardware.shared_memory),
    Probe("versions", software.versions),
    Probe("compilers", software.compilers),
    Probe("allocator", software.allocator),
    Probe("vllm", software.sampler),
    Probe("jit", software.jit_locks, f"{_DISK} with TORCH_EXTENSIONS_DIR=FOLDER"),
    Probe("output_dir", system.output_folder, f"{_DISK} with output_dir=FOLDER"),
    Probe("caches", system.cache_folders, f"{_DISK} with HF_HOME, TORCH_EXTENSIONS_DIR or TMPDIR"),
    Probe(
        "network", system.network, "the name server does not answer: put the host's own name into /etc/hosts"
    ),
    Probe("limits", system.limits),
    Probe("launchers", software.launchers),
    Probe("wandb", software.tracking),
    Probe("hub", software.hub),
    Probe("environment", software.variables),
)


def doctor(arguments: Sequence[str], *, say: Callable[[str], None] = print) -> int:
    """The verb. Returns 0, or 2 when a finding would stop a run."""
    parser = Options(
        "doctor", "output_dir=runs", "What this machine can do, and what would stop a run on it."
    )
    parser.add_argument("settings", nargs="*", metavar="output_dir=FOLDER", help="where runs would be kept")
    output_dir = Path("runs")
    for argument in parser.parse_args(list(arguments)).settings:
        key, _, value = argument.partition("=")
        if key != "output_dir" or not value:
            parser.error(f"takes output_dir=FOLDER or nothing, not {argument}")
        output_dir = Path(value)
    machine = Machine(dict(os.environ), output_dir)
    return report(examine(machine), say)


def examine(
    machine: Machine,
    probes: Sequence[Probe] = PROBES,
    limit: float = SECONDS,
    torch_limit: float = TORCH_SECONDS,
) -> list[Finding]:
    """What the probes find, in their order; one that is late or fails is a finding itself."""
    machine = Machine(machine.environment, machine.output_dir, child_seconds=torch_limit)
    answers: queue.Queue[tuple[int, list[Finding]]] = queue.Queue()

    def answer(number: int) -> None:
        answers.put((number, examined(probes[number], machine)))

    for number in range(len(probes)):
        threading.Thread(target=answer, args=(number,), daemon=True).start()
    begin, found = time.monotonic(), dict[int, list[Finding]]()
    while missing := [number for number in range(len(probes)) if number not in found]:
        limits = [torch_limit + limit if probes[number].starts_child else limit for number in missing]
        try:
            number, findings = answers.get(timeout=max(0.0, begin + max(limits) - time.monotonic()))
        except queue.Empty:
            found |= {number: [late(probes[number], limits[at])] for at, number in enumerate(missing)}
        else:
            found[number] = findings
    return [finding for number in range(len(probes)) for finding in found[number]]


def examined(probe: Probe, machine: Machine) -> list[Finding]:
    """A probe's findings; what it cannot cope with is one, and never a traceback."""
    try:
        return list(probe.look(machine))
    except Exception as error:
        words = " ".join(str(error).split())
        return [note(probe.name, f"could not be looked at ({type(error).__name__}: {words})")]


def late(probe: Probe, seconds: float) -> Finding:
    """The finding that a probe did not answer."""
    text = f"did not answer within {seconds:.0f} s, and a run would hang there too"
    return warning(probe.name, text, probe.when_late)


def report(findings: Sequence[Finding], say: Callable[[str], None]) -> int:
    """Print the findings and a closing line; returns the exit status."""
    for finding in findings:
        way_out = f" -> {finding.way_out}" if finding.way_out else ""
        say(f"{finding.level.value:<7}  {finding.name:<12} {finding.text}{way_out}")
    warnings = sum(finding.level is Level.warning for finding in findings)
    if not warnings:
        say("nothing here would stop a run")
        return 0
    say(f"{warnings} of these would stop a run")
    return UserError.EXIT_CODE
