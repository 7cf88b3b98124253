"""Probes of what the system offers a run: folders that can be written, a network, and limits."""

from __future__ import annotations

import errno
import fcntl
import resource
import shutil
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path

from common import jit
from common.files import write_atomically
from pipeline.doctor.findings import GIB, Findings, Machine, note, ok, warning

LEAST_DISK, LITTLE_DISK = GIB // 10, 10 * GIB
LEAST_FILES, FEW_FILES = 256, 1024


def output_folder(machine: Machine) -> Findings:
    """Where runs go; data caches lie there too."""
    return place("output_dir", machine.output_dir, "output_dir=FOLDER on another disk")


def cache_folders(machine: Machine) -> Findings:
    """Where the hub's files, compiled operators and temporary files go."""
    environment = machine.environment
    hub = Path(environment.get("HF_HOME") or machine.folder("XDG_CACHE_HOME", ".cache") / "huggingface")
    extensions = jit.extensions_folder(environment)
    temporary = Path(environment.get("TMPDIR") or tempfile.gettempdir())
    yield from place("hub cache", hub, "HF_HOME=FOLDER on another disk", is_needed=False)
    yield from place("jit cache", extensions, "TORCH_EXTENSIONS_DIR=FOLDER on another disk", is_needed=False)
    yield from place("temporary", temporary, "TMPDIR=FOLDER")


def place(name: str, folder: Path, way_out: str, *, is_needed: bool = True) -> Findings:
    """Whether a folder can be written safely, and how much room there is. is_needed: by every run."""
    there, shown = folder.absolute(), f"{folder}"
    try:
        while not there.exists():
            there = there.parent
            shown = f"{folder} (to be made in {there})"
        try_to_write(there)
    except OSError as error:
        reason = f"{shown}: {error.strerror or error}"
        yield warning(name, reason, way_out) if is_needed else note(name, reason, way_out)
        return
    kind = jit.file_system_of(there)
    yield from judge_room(name, shown, shutil.disk_usage(there).free, kind, way_out, is_needed)


def judge_room(name: str, shown: str, free: int, kind: str, way_out: str, is_needed: bool = True) -> Findings:
    """What a folder that can be written is worth. free: bytes. kind: of the file system."""
    text = f"{shown}: {free / GIB:.1f} GiB free ({kind})"
    if free < LEAST_DISK and is_needed:
        yield warning(name, text, f"free some space, or {way_out}")
    elif free < LITTLE_DISK:
        yield note(name, f"{text}, little for checkpoints of large models")
    elif kind in ("tmpfs", "ramfs"):
        yield note(name, f"{text}: lies in memory, and is gone after a restart")
    else:
        yield ok(name, text)


def try_to_write(folder: Path) -> None:
    """Write a file as commits do (fsync, rename), lock it and remove it. OSError where that is refused."""
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a file is in the way of a folder")
    with tempfile.TemporaryDirectory(prefix=".rlhf_doctor_", dir=folder) as made:
        file = Path(made) / "written"
        write_atomically(file, [b"x" * 4096])
        with file.open("r+b") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)


def network(machine: Machine) -> Findings:
    """Whether ranks can find each other."""
    name = socket.gethostname()
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", 0))
        except OSError as error:
            text = f"ranks of one machine meet at 127.0.0.1, which is refused: {error.strerror}"
            yield warning("network", text, "bring the loopback interface up: ip link set lo up")
            return
    yield from interfaces(machine.environment)
    several = "for runs over several machines: put it into /etc/hosts, or set GLOO_SOCKET_IFNAME"
    try:
        entries = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError as error:
        text = f"the host's own name {name} does not resolve ({error.strerror})"
        yield note("network", text, several)
        return
    addresses = sorted({str(entry[4][0]) for entry in entries})
    text = f"{name} is {', '.join(addresses)}"
    if all(address.startswith("127.") or address == "::1" for address in addresses):
        yield note("network", f"{text}: no other machine finds it there", several)
    elif not any(map(_is_own, addresses)):
        yield note("network", f"{text}, which is not this machine", several)
    else:
        yield ok("network", text)


def interfaces(environment: Mapping[str, str]) -> Findings:
    """Network interfaces that the environment names and that do not exist."""
    present = [name for _, name in socket.if_nameindex()]
    missing = [
        f"GLOO_SOCKET_IFNAME={name}"
        for name in environment.get("GLOO_SOCKET_IFNAME", "").split(",")
        if name and name not in present
    ]
    nccl = environment.get("NCCL_SOCKET_IFNAME", "")
    if nccl and not nccl.startswith("^"):
        exact = nccl.startswith("=")
        wanted = [name for name in nccl.lstrip("=").split(",") if name]
        if not any(name == one if exact else name.startswith(one) for one in wanted for name in present):
            missing.append(f"NCCL_SOCKET_IFNAME={nccl}")
    for setting in missing:
        text = f"{setting}: this machine has {', '.join(present)}"
        yield warning("network", text, "name one of these, or unset it")


def _is_own(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family) as listener:
            listener.bind((address, 0))
    except OSError:
        return False
    return True


def limits(machine: Machine) -> Findings:
    """What the shell allows a process."""
    yield from judge_files(*resource.getrlimit(resource.RLIMIT_NOFILE))
    for name, kind, flag in (("memory", resource.RLIMIT_AS, "v"), ("a file", resource.RLIMIT_FSIZE, "f")):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            text = f"ulimit -{flag} keeps {name} below {soft / GIB:.1f} GiB"
            yield note("limits", text, f"ulimit -{flag} unlimited")


def judge_files(files: int, hard: int) -> Findings:
    """What the number of files that may be open is worth."""
    if files == resource.RLIM_INFINITY or files >= FEW_FILES:
        yield ok("limits", f"{'any number of' if files == resource.RLIM_INFINITY else files} open files")
        return
    say = warning if files < LEAST_FILES else note
    most = "65535" if hard == resource.RLIM_INFINITY else str(hard)
    yield say("limits", f"only {files} open files", f"ulimit -n {most}")
