"""What `doctor` looks at: each probe takes a machine and returns findings, worst and best alike.

A probe reads what the system offers (files under /proc, other programs' answers, a file it writes and removes
again) and changes nothing. A warning is what would stop or hang a run; a note is what one may want to know.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

from common import jit
from common.config import Dtype, dtype_on
from common.credentials import has_wandb_key
from common.redact import redact, redact_text
from launch.local import PROJECT, count_cores, count_gpus

GIB = 2**30
LEAST_MEMORY = GIB
"""What one rank of the smallest model takes, its imports included."""
LEAST_DISK, LITTLE_DISK = GIB // 10, 10 * GIB
LEAST_SHARED = 128 * 2**20
"""/dev/shm through which GPUs of one machine talk; containers offer 64 MiB unless told otherwise."""
LEAST_FILES, FEW_FILES = 256, 1024
FASTER = 1.2
"""By which factor another dtype has to be faster to be worth a word."""


class Level(Enum):
    ok = "ok"
    note = "note"
    warning = "WARNING"


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: Level
    name: str
    text: str
    way_out: str = ""


@dataclass(frozen=True)
class Machine:
    """What probes are given: this process's environment, where runs would go, how long a child may take."""

    environment: Mapping[str, str]
    output_dir: Path
    child_seconds: float = 60.0

    def tool(self, name: str) -> str | None:
        """The path of a program."""
        return shutil.which(name, path=self.environment.get("PATH", os.defpath))

    def answer(self, *command: str, seconds: float = 8.0) -> subprocess.CompletedProcess[str]:
        """Run a program to its end, in bounded time."""
        return subprocess.run(
            command, env=dict(self.environment), stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=seconds, check=False, errors="replace",
        )  # fmt: skip


@dataclass(frozen=True)
class Probe:
    """A probe and its name; when_late: the way out when it does not answer."""

    name: str
    look: Callable[[Machine], list[Finding]]
    when_late: str = ""
    starts_child: bool = False


def ok(name: str, text: str) -> Finding:
    return Finding(Level.ok, name, text)


def note(name: str, text: str, way_out: str = "") -> Finding:
    return Finding(Level.note, name, text, way_out)


def warning(name: str, text: str, way_out: str) -> Finding:
    return Finding(Level.warning, name, text, way_out)


# --- Hardware --------------------------------------------------------------------------------------


def cores(machine: Machine) -> list[Finding]:
    """CPU cores that a run may use, and whether they are free."""
    usable, present = count_cores(), os.cpu_count() or 1
    limited = f" of {present} (affinity or a container's quota)" if usable < present else ""
    found = [ok("cpu", f"{usable} core(s){limited}, {platform.machine()}")]
    load = os.getloadavg()[0]  # of the last minute: the other probes are at work now
    if load > usable / 2:
        found.append(note("cpu", f"other work is going on (load {load:.1f}): runs will be slower"))
    threads = machine.environment.get("OMP_NUM_THREADS")
    if threads is not None and threads.isdecimal() and int(threads) > usable:
        text = f"OMP_NUM_THREADS={threads} on {usable} core(s): threads take turns"
        found.append(note("cpu", text, "unset OMP_NUM_THREADS: it is then cores divided by ranks"))
    return found


def memory(machine: Machine) -> list[Finding]:
    """Memory that is free, also within a container's limit."""
    fields = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text()))
    total, free = (1024 * int(fields[name]) for name in ("MemTotal", "MemAvailable"))
    return judge_memory(total, free, *_container_memory())


def judge_memory(total: int, free: int, limit: int | None, used: int) -> list[Finding]:
    """What memory is worth. limit, used: a container's, in bytes."""
    within = ""
    if limit is not None and limit < total:
        total, free = limit, min(free, max(0, limit - used))
        within = " (a container's limit)"
    text = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free{within}"
    if free >= LEAST_MEMORY:
        return [ok("memory", text)]
    return [
        warning("memory", f"{text}; a rank takes about {LEAST_MEMORY / GIB:.0f} GiB", "end something else")
    ]


def _container_memory() -> tuple[int | None, int]:
    """Limit and use of a container, in bytes; file caches, which can be given back, do not count as used."""
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError, KeyError):
        stats = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stats["inactive_file"])
        return int((group / "memory.max").read_text()), max(0, used)  # or the word max: no limit
    return None, 0


def gpus(machine: Machine) -> list[Finding]:
    """GPUs as the driver sees them."""
    tool = machine.tool("nvidia-smi")
    nodes = [path for path in Path("/dev").glob("nvidia*") if path.name[6:].isdecimal()]
    if tool is None:
        if nodes:
            return [note("gpu", f"{len(nodes)} in /dev, but there is no nvidia-smi to ask about them")]
        return [note("gpu", "none: runs use the CPU")]
    fields = "index,name,memory.used,memory.total,driver_version"
    answer = machine.answer(tool, f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    lines = [line for line in answer.stdout.splitlines() if line.strip()]
    if answer.returncode != 0 or not lines:
        said = " ".join((answer.stderr or answer.stdout).split())[:200] or "no GPU"
        if not nodes:
            return [note("gpu", f"none: runs use the CPU (nvidia-smi: {said})")]
        way_out = "repair the driver, or CUDA_VISIBLE_DEVICES= to run on the CPU"
        return [warning("gpu", f"{len(nodes)} in /dev, but nvidia-smi fails: {said}", way_out)]
    return judge_gpus([[field.strip() for field in line.split(",")] for line in lines], machine.environment)


def judge_gpus(rows: list[list[str]], environment: Mapping[str, str]) -> list[Finding]:
    """What the driver's rows are worth: index, name, MiB used, MiB in all, version of the driver."""
    names = [row[1] for row in rows]
    listed = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    found = [ok("gpu", f"{listed}, driver {rows[0][4]}")]
    for index, name, used, total, _ in rows:
        if used.isdecimal() and total.isdecimal() and int(used) > 0.1 * int(total):
            text = f"GPU {index} ({name}): {int(used) / 1024:.1f} of {int(total) / 1024:.1f} GiB are in use"
            found.append(note("gpu", text, "nvidia-smi says by whom"))
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        offered = count_gpus(environment)
        text = f"CUDA_VISIBLE_DEVICES={visible} leaves {offered} of {len(rows)}"
        found.append(note("gpu", text, "unset it to use all" if offered < len(rows) else ""))
    return found


def torch(machine: Machine) -> list[Finding]:
    """What torch makes of the devices, asked in a process of its own."""
    command = (sys.executable, "-m", "pipeline.torch_probe")
    environment = {**machine.environment, "PYTHONPATH": str(PROJECT)}
    if more := machine.environment.get("PYTHONPATH"):
        environment["PYTHONPATH"] += os.pathsep + more
    child = Machine(environment, machine.output_dir)
    try:
        answer = child.answer(*command, seconds=machine.child_seconds)
    except subprocess.TimeoutExpired:
        text = f"did not import and look at the devices within {machine.child_seconds:.0f} s"
        return [warning("torch", text, "see whether `python -c 'import torch; torch.cuda.init()'` ends")]
    if answer.returncode != 0:
        said = (answer.stderr.strip().splitlines() or [f"exit status {answer.returncode}"])[-1]
        return [warning("torch", f"cannot be imported: {said}", "install it again: see constraints.txt")]
    found = json.loads(answer.stdout.strip().splitlines()[-1])
    return [*judge_torch(found, count_gpus(machine.environment)), *judge_products(found)]


def judge_torch(found: Mapping[str, Any], offered: int) -> list[Finding]:
    """What torch's answer is worth where the launcher would start a rank on each of `offered` GPUs."""
    devices, cuda = found["devices"], found["cuda"]
    if not found["gloo"]:
        return [
            warning("torch", f"{found['torch']} has no gloo, over which ranks agree", "install another build")
        ]
    if len(devices) < offered:
        if cuda is None:
            way_out = "install a CUDA build of torch, or CUDA_VISIBLE_DEVICES= to run on the CPU"
            return [warning("torch", f"{found['torch']} is for the CPU, on {offered} GPU(s)", way_out)]
        said = f": {found['error']}" if found["error"] else ""
        text = f"{found['torch']} (CUDA {cuda}) sees {len(devices)} of {offered} GPU(s){said}"
        return [
            warning("torch", text, "the driver may be older than this CUDA: install another build of torch")
        ]
    if not devices:
        built = "for the CPU" if cuda is None else f"CUDA {cuda}, unused"
        return [ok("torch", f"{found['torch']} ({built}), gloo")]
    if found["nccl"] is None:
        return [
            warning("torch", f"{found['torch']} has no NCCL, over which GPUs talk", "install another build")
        ]
    bf16 = all(device["bf16"] for device in devices)
    built = f"{found['torch']} (CUDA {cuda}, NCCL {found['nccl']})"
    findings = [ok("torch", f"{built}, {len(devices)} GPU(s){', bf16' if bf16 else ''}")]
    if not bf16:
        text = "not all GPUs compute in bf16, which is the default"
        findings.append(note("torch", text, "model.dtype=fp16 or fp32"))
    if found["apart"]:
        pairs = ", ".join(f"{one}-{other}" for one, other in found["apart"][:8])
        findings.append(
            note("torch", f"GPUs that do not reach each other's memory: {pairs}: slower collectives")
        )
    return findings


def judge_products(found: Mapping[str, Any]) -> list[Finding]:
    """Which dtype would be faster here, beside the one that `model.dtype=auto` stands for."""
    speed = found["gflops"]
    if not speed:
        return []
    chosen = dtype_on(Dtype.auto, gpu=bool(found["devices"])).value
    other = next(name for name in speed if name != chosen)
    measured = ", ".join(f"{name} {gflops:,.0f}" for name, gflops in speed.items())
    text = f"model.dtype=auto is {chosen} here; matrix products in GFLOP/s: {measured}"
    ratio = speed[other] / speed[chosen]
    if ratio < FASTER:
        return [ok("dtype", text)]
    rounding = ", with more rounding" if other == Dtype.bf16.value else ""
    return [note("dtype", text, f"model.dtype={other} is {ratio:.1f} times as fast in these{rounding}")]


def shared_memory(machine: Machine) -> list[Finding]:
    """/dev/shm, which NCCL uses between the GPUs of a machine."""
    return judge_shared_memory(shutil.disk_usage("/dev/shm").free, count_gpus(machine.environment))


def judge_shared_memory(free: int, devices: int) -> list[Finding]:
    """What /dev/shm is worth to so many devices."""
    text = f"{free / GIB:.1f} GiB free"
    if devices > 1 and free < LEAST_SHARED:
        text += f", too little for {devices} GPUs to talk through"
        return [warning("/dev/shm", text, "start the container with --shm-size=8g (or --ipc=host)")]
    return [ok("/dev/shm", text)]


# --- Software --------------------------------------------------------------------------------------


def versions(machine: Machine) -> list[Finding]:
    """What is installed beside what the project asks for and was tested with."""
    with suppress(OSError):
        project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
        pins = parse_pins((PROJECT / "constraints.txt").read_text())
        return judge_versions(project["dependencies"], project["requires-python"], pins, installed_version)
    return [note("versions", f"there is no pyproject.toml and constraints.txt in {PROJECT} to compare with")]


def parse_pins(text: str) -> dict[str, str]:
    """name -> version of a constraints file, names in lower case."""
    pairs = (line.split("==") for line in text.splitlines() if "==" in line and not line.startswith("#"))
    return {_canonical(name): version.strip() for name, version in pairs}


def installed_version(name: str) -> str | None:
    """Version of an installed package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def judge_versions(
    wanted: list[str], python: str, pins: Mapping[str, str], installed: Callable[[str], str | None]
) -> list[Finding]:
    """wanted: requirements with ranges. python: the range of Python. pins: the tested versions."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    found, other = [], []
    running = platform.python_version()
    if not SpecifierSet(python).contains(running, prereleases=True):
        found.append(warning("versions", f"Python {running}; {python} is supported", "use another Python"))
    requirements = [Requirement(text) for text in wanted]
    for requirement in requirements:
        version, tested = installed(requirement.name), pins.get(_canonical(requirement.name))
        pin = f"{requirement.name}=={tested}" if tested else str(requirement)
        if version is None:
            found.append(warning("versions", f"{requirement.name} is not installed", f"pip install '{pin}'"))
        elif not requirement.specifier.contains(version.partition("+")[0], prereleases=True):
            text = f"{requirement.name} {version}, where {requirement.specifier} is expected"
            found.append(warning("versions", text, f"pip install '{pin}'"))
        elif tested is not None and version.partition("+")[0] != tested:
            other.append(f"{requirement.name} {version} (tested: {tested})")
    if other:
        text = f"within the ranges that should work: {', '.join(other)}"
        found.append(note("versions", text, "pip install -c constraints.txt installs the tested set"))
    return found or [ok("versions", f"Python {running}, all {len(requirements)} packages as tested")]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def compilers(machine: Machine) -> list[Finding]:
    """Compilers, which only some settings need."""
    cxx = machine.environment.get("CXX") or next(filter(machine.tool, ("c++", "g++", "clang++")), None)
    home = machine.environment.get("CUDA_HOME", "/usr/local/cuda")
    has_nvcc = machine.tool("nvcc") is not None or Path(home, "bin", "nvcc").exists()
    text = f"{cxx or 'no C++ compiler'}, {'nvcc' if has_nvcc else 'no nvcc'}"
    if cxx is not None:
        return [ok("compilers", text)]
    return [note("compilers", f"{text}: model.compile=true would not work; nothing else compiles")]


def jit_locks(machine: Machine) -> list[Finding]:
    """Compilations that were killed and left a lock, for which the next one would wait for ever."""
    folder = jit.extensions_folder(machine.environment)
    locks = jit.locks_in(folder)
    stale = [lock for lock in locks if lock.is_stale]
    found = [
        warning("jit", f"stale lock of a killed compilation: {jit.described(lock)}", f"rm {lock.path}")
        for lock in stale
    ]
    found += [
        note("jit", f"a compilation seems to be at work: {jit.described(lock)}")
        for lock in locks
        if not lock.is_stale
    ]
    return found or [ok("jit", f"no locks in {folder}")]


# --- Places ----------------------------------------------------------------------------------------


def output_folder(machine: Machine) -> list[Finding]:
    """Where runs go; data caches lie there too."""
    return place("output_dir", machine.output_dir, "output_dir=FOLDER on another disk")


def cache_folders(machine: Machine) -> list[Finding]:
    """Where the hub's files, compiled operators and temporary files go."""
    environment = machine.environment
    caches = environment.get("XDG_CACHE_HOME") or str(
        Path(environment.get("HOME", "~"), ".cache").expanduser()
    )
    hub = environment.get("HF_HOME") or str(Path(caches, "huggingface"))
    found = place("hub cache", Path(hub), "HF_HOME=FOLDER on another disk", is_needed=False)
    extensions = jit.extensions_folder(environment)
    found += place("jit cache", extensions, "TORCH_EXTENSIONS_DIR=FOLDER on another disk", is_needed=False)
    found += place("temporary", Path(environment.get("TMPDIR") or tempfile.gettempdir()), "TMPDIR=FOLDER")
    return found


def place(name: str, folder: Path, way_out: str, *, is_needed: bool = True) -> list[Finding]:
    """Whether a folder can be written safely, and how much room there is. is_needed: by every run."""
    there, shown = folder.absolute(), f"{folder}"
    try:
        while not there.exists():
            there = there.parent
            shown = f"{folder} (to be made in {there})"
        try_to_write(there)
    except OSError as error:
        reason = f"{shown}: {error.strerror or error}"
        return [warning(name, reason, way_out) if is_needed else note(name, reason, way_out)]
    kind = jit.file_system_of(there)
    return judge_room(name, shown, shutil.disk_usage(there).free, kind, way_out, is_needed)


def judge_room(
    name: str, shown: str, free: int, kind: str, way_out: str, is_needed: bool = True
) -> list[Finding]:
    """What a folder that can be written is worth. free: bytes. kind: of the file system."""
    text = f"{shown}: {free / GIB:.1f} GiB free ({kind})"
    if free < LEAST_DISK and is_needed:
        return [warning(name, text, f"free some space, or {way_out}")]
    if free < LITTLE_DISK:
        return [note(name, f"{text}, little for checkpoints of large models")]
    if kind in ("tmpfs", "ramfs"):
        return [note(name, f"{text}: lies in memory, and is gone after a restart")]
    return [ok(name, text)]


def try_to_write(folder: Path) -> None:
    """Write a file as commits do (fsync, rename, lock) and remove it. OSError where that is refused."""
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a file is in the way of a folder")
    descriptor, written = tempfile.mkstemp(prefix=".rlhf_doctor_", dir=folder)
    renamed = f"{written}.renamed"
    try:
        os.write(descriptor, b"x" * 4096)
        os.fsync(descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(written, renamed)
        whole = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(whole)
        finally:
            os.close(whole)
    finally:
        os.close(descriptor)
        for left in (written, renamed):
            with suppress(OSError):
                os.unlink(left)


# --- Surroundings ----------------------------------------------------------------------------------


def network(machine: Machine) -> list[Finding]:
    """Whether ranks can find each other."""
    name = socket.gethostname()
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", 0))
        except OSError as error:
            text = f"ranks of one machine meet at 127.0.0.1, which is refused: {error.strerror}"
            return [warning("network", text, "bring the loopback interface up: ip link set lo up")]
    found = interfaces(machine.environment)
    several = "for runs over several machines: put it into /etc/hosts, or set GLOO_SOCKET_IFNAME"
    try:
        addresses = sorted(
            {str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}
        )
    except OSError as error:
        return [
            *found,
            note("network", f"the host's own name {name} does not resolve ({error.strerror})", several),
        ]
    text = f"{name} is {', '.join(addresses)}"
    if all(address.startswith("127.") or address == "::1" for address in addresses):
        return [*found, note("network", f"{text}: no other machine finds it there", several)]
    if not any(map(_is_own, addresses)):
        return [*found, note("network", f"{text}, which is not this machine", several)]
    return [*found, ok("network", text)]


def interfaces(environment: Mapping[str, str]) -> list[Finding]:
    """Network interfaces that the environment names and that do not exist."""
    present = [name for _, name in socket.if_nameindex()]
    found = []
    gloo = [name for name in environment.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    for name in gloo:
        if name not in present:
            text = f"GLOO_SOCKET_IFNAME={name}: this machine has {', '.join(present)}"
            found.append(warning("network", text, "name one of these, or unset it"))
    nccl = environment.get("NCCL_SOCKET_IFNAME", "")
    if nccl and not nccl.startswith("^"):
        exact = nccl.startswith("=")
        wanted = [name for name in nccl.lstrip("=").split(",") if name]
        if not any(name == one if exact else name.startswith(one) for one in wanted for name in present):
            text = f"NCCL_SOCKET_IFNAME={nccl}: this machine has {', '.join(present)}"
            found.append(warning("network", text, "name one of these, or unset it"))
    return found


def _is_own(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family) as listener:
            listener.bind((address, 0))
    except OSError:
        return False
    return True


def limits(machine: Machine) -> list[Finding]:
    """What the shell allows a process."""
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = judge_files(files, hard)
    for name, kind, flag in (("memory", resource.RLIMIT_AS, "v"), ("a file", resource.RLIMIT_FSIZE, "f")):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            text = f"ulimit -{flag} keeps {name} below {soft / GIB:.1f} GiB"
            found.append(note("limits", text, f"ulimit -{flag} unlimited"))
    return found


def judge_files(files: int, hard: int) -> list[Finding]:
    """What the number of files that may be open is worth."""
    if files == resource.RLIM_INFINITY or files >= FEW_FILES:
        return [ok("limits", f"{'any number of' if files == resource.RLIM_INFINITY else files} open files")]
    most = "65535" if hard == resource.RLIM_INFINITY else str(hard)
    text = f"only {files} open files"
    if files < LEAST_FILES:
        return [warning("limits", text, f"ulimit -n {most}")]
    return [note("limits", text, f"ulimit -n {most}")]


def launchers(machine: Machine) -> list[Finding]:
    """Which ways of starting runs are there."""
    ways = {"ssh": "launch=ssh", "sbatch": "launch=slurm", "kubectl": "launch=k8s"}
    there = [f"{way} ({tool})" for tool, way in ways.items() if machine.tool(tool) is not None]
    text = ", ".join(["launch=local", *there])
    if job := machine.environment.get("SLURM_JOB_ID"):
        text += f"; inside of SLURM job {job}"
    return [ok("launchers", text)]


def tracking(machine: Machine) -> list[Finding]:
    """Where numbers go beside metrics.jsonl, with tracking.wandb=auto."""
    environment = machine.environment
    asked = environment.get("WANDB_MODE", "").lower()
    if asked in ("disabled", "offline", "dryrun") or environment.get("WANDB_DISABLED", "").lower() == "true":
        where = "off" if asked in ("", "disabled") else "offline"
        return [note("wandb", f"{where}, because the environment says so")]
    server = environment.get("WANDB_BASE_URL", "https://api.wandb.ai")
    if not has_wandb_key(server, environment):
        return [
            note("wandb", "offline: there is no key (files are kept, and can be sent later)", "wandb login")
        ]
    return [ok("wandb", f"online, {redact_text(server)} (a key is there; not tried)")]


def hub(machine: Machine) -> list[Finding]:
    """How models and data of the hub are reached; nothing is tried over the network."""
    environment = machine.environment
    offline = [
        name
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
        if environment.get(name, "").upper() in ("1", "TRUE", "YES", "ON")
    ]
    if offline:
        return [note("hub", f"{offline[0]} is set: only what is in the cache", f"unset {offline[0]}")]
    home = environment.get("HF_HOME") or str(
        Path(environment.get("HOME", "~"), ".cache/huggingface").expanduser()
    )
    file = Path(environment.get("HF_TOKEN_PATH") or Path(home, "token"))
    token = (
        "a token is there" if environment.get("HF_TOKEN") or file.exists() else "no token: public ones only"
    )
    server = redact_text(environment.get("HF_ENDPOINT", "https://huggingface.co"))
    return [ok("hub", f"{server} ({token}; not tried)")]


CHANGES_RUNS = re.compile(
    r"OMP_|MKL_|KMP_|GOMP_|CUDA_|NVIDIA_|NCCL_|GLOO_|TORCH|PYTORCH_|DS_|DEEPSPEED_|HF_|TRANSFORMERS_|TOKENIZERS_"
    r"|WANDB_|RLHF_|TRITON_|MASTER_(ADDR|PORT)$|(LOCAL_)?(RANK|WORLD_SIZE)$|LD_PRELOAD$|PYTHONHASHSEED$"
)
"""Environment variables that a run takes notice of."""
LAUNCHER_S = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def variables(machine: Machine) -> list[Finding]:
    """Environment variables that change runs, credentials hidden."""
    there = {name: value for name, value in sorted(machine.environment.items()) if CHANGES_RUNS.match(name)}
    if not there:
        return [ok("environment", "no variable that changes runs")]
    shown = ", ".join(f"{name}={value}" for name, value in redact(there).items())
    found = [note("environment", shown)]
    if left := [name for name in LAUNCHER_S if name in there]:
        text = f"{', '.join(left)}: of another launcher's; a run sets its own"
        found.append(note("environment", text, f"unset {' '.join(left)}"))
    return found


_DISK = "a disk that does not answer: name another one"

PROBES: tuple[Probe, ...] = (
    Probe("cpu", cores),
    Probe("memory", memory),
    Probe("gpu", gpus, "the driver hangs: nvidia-smi should answer at once"),
    Probe("torch", torch, starts_child=True),
    Probe("/dev/shm", shared_memory),
    Probe("versions", versions),
    Probe("compilers", compilers),
    Probe("jit", jit_locks, f"{_DISK} with TORCH_EXTENSIONS_DIR=FOLDER"),
    Probe("output_dir", output_folder, f"{_DISK} with output_dir=FOLDER"),
    Probe("caches", cache_folders, f"{_DISK} with HF_HOME, TORCH_EXTENSIONS_DIR or TMPDIR"),
    Probe("network", network, "the name server does not answer: put the host's own name into /etc/hosts"),
    Probe("limits", limits),
    Probe("launchers", launchers),
    Probe("wandb", tracking),
    Probe("hub", hub),
    Probe("environment", variables),
)
