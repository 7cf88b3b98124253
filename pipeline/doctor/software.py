"""Probes of what is installed and set: versions, compilers, launchers, W&B, the hub, the environment."""

from __future__ import annotations

import platform
import re
import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from common import jit
from common.files import WRITTEN_WITH
from common.redact import has_wandb_key, redact, redact_text
from common.vllm_fit import FITTING, fits, installed_vllm
from launch.local import KEEPING, PROJECT
from launch.local import allocator as chosen_allocator
from pipeline.doctor.findings import Findings, Machine, note, ok, warning


def versions(machine: Machine) -> Findings:
    """What is installed beside what the project asks for and was tested with."""
    with suppress(OSError):
        project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
        pins = parse_pins((PROJECT / "constraints.txt").read_text())
        yield from judge_versions(
            project["dependencies"], project["requires-python"], pins, installed_version
        )
        return
    yield note("versions", f"there is no pyproject.toml and constraints.txt in {PROJECT} to compare with")


def parse_pins(text: str) -> dict[str, str]:
    """name -> version of a constraints file, names in lower case."""
    pairs = (line.split("==") for line in text.splitlines() if "==" in line and not line.startswith("#"))
    return {_canonical(name): version.strip() for name, version in pairs}


def installed_version(name: str) -> str | None:
    """Version of an installed package."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def judge_versions(
    wanted: list[str], python: str, pins: Mapping[str, str], installed: Callable[[str], str | None]
) -> Findings:
    """wanted: requirements with ranges. python: the range of Python. pins: the tested versions."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    found, other = [], []
    running = platform.python_version()
    if not SpecifierSet(python).contains(running, prereleases=True):
        found.append(warning("versions", f"Python {running}; {python} is supported", "use another Python"))
    for requirement in map(Requirement, wanted):
        version, tested = installed(requirement.name), pins.get(_canonical(requirement.name))
        way_out = f"pip install '{f'{requirement.name}=={tested}' if tested else requirement}'"
        public = (version or "").partition("+")[0]
        if version is None:
            found.append(warning("versions", f"{requirement.name} is not installed", way_out))
        elif not requirement.specifier.contains(public, prereleases=True):
            text = f"{requirement.name} {version}, where {requirement.specifier} is expected"
            found.append(warning("versions", text, way_out))
        elif tested is not None and public != tested:
            other.append(f"{requirement.name} {version} (tested: {tested})")
    if other:
        text = f"within the ranges that should work: {', '.join(other)}"
        found.append(note("versions", text, "pip install -c constraints.txt installs the tested set"))
    yield from found or [ok("versions", f"Python {running}, all {len(wanted)} packages as tested")]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def compilers(machine: Machine) -> Findings:
    """Compilers, which only some settings need."""
    cxx = machine.environment.get("CXX") or next(filter(machine.tool, ("c++", "g++", "clang++")), None)
    home = machine.environment.get("CUDA_HOME", "/usr/local/cuda")
    has_nvcc = machine.tool("nvcc") is not None or Path(home, "bin", "nvcc").exists()
    text = f"{cxx or 'no C++ compiler'}, {'nvcc' if has_nvcc else 'no nvcc'}"
    without = f"{text}: model.compile would not work; nothing else compiles"
    yield note("compilers", without) if cxx is None else ok("compilers", text)


def allocator(machine: Machine) -> Findings:
    """What hands out the memory of ranks on the CPU."""
    chosen = chosen_allocator(machine.environment)
    if not chosen:
        yield ok("allocator", "chosen by the environment")
    elif chosen is KEEPING:
        smaller = "on the CPU, tcmalloc needs less memory"
        yield note(
            "allocator",
            f"glibc, told to keep what was freed; {smaller}",
            "apt-get install libtcmalloc-minimal4",
        )
    else:
        yield ok("allocator", f"{chosen['LD_PRELOAD']} for ranks on the CPU")


def sampler(machine: Machine) -> Findings:
    """Whether roll-outs could be sampled by vLLM; nothing else needs it."""
    found = installed_vllm()
    if found is None:
        yield ok("vllm", "not installed: ppo.rollout.engine=builtin samples")
    elif fits(found[1]):
        yield ok("vllm", f"{' '.join(found)}, for ppo.rollout.engine=vllm")
    else:
        yield note("vllm", f"{' '.join(found)}, where ppo.rollout.engine=vllm expects {FITTING}", "make vllm")


def jit_locks(machine: Machine) -> Findings:
    """Compilations that were killed and left a lock, for which the next one would wait for ever."""
    folder = jit.extensions_folder(machine.environment)
    locks = sorted(jit.locks_in(folder), key=lambda lock: not lock.is_stale)
    for lock in locks:
        if lock.is_stale:
            text = f"stale lock of a killed compilation: {jit.described(lock)}"
            yield warning("jit", text, f"rm {lock.path}")
        else:
            yield note("jit", f"a compilation seems to be at work: {jit.described(lock)}")
    if not locks:
        yield ok("jit", f"no locks in {folder}")


def launchers(machine: Machine) -> Findings:
    """Which ways of starting runs are there."""
    ways = {"ssh": "launch=ssh", "sbatch": "launch=slurm", "kubectl": "launch=k8s"}
    there = [f"{way} ({tool})" for tool, way in ways.items() if machine.tool(tool) is not None]
    job = machine.environment.get("SLURM_JOB_ID")
    yield ok(
        "launchers", ", ".join(["launch=local", *there]) + (f"; inside of SLURM job {job}" if job else "")
    )


def tracking(machine: Machine) -> Findings:
    """Where numbers go beside metrics.jsonl, with tracking.wandb=auto."""
    environment = machine.environment
    asked = environment.get("WANDB_MODE", "").lower()
    server = environment.get("WANDB_BASE_URL", "https://api.wandb.ai")
    if asked in ("disabled", "offline", "dryrun") or environment.get("WANDB_DISABLED", "").lower() == "true":
        where = "off" if asked in ("", "disabled") else "offline"
        yield note("wandb", f"{where}, because the environment says so")
    elif not has_wandb_key(server, environment):
        yield note("wandb", "offline: there is no key (files are kept, and can be sent later)", "wandb login")
    else:
        yield ok("wandb", f"online, {redact_text(server)} (a key is there; not tried)")


def hub(machine: Machine) -> Findings:
    """How models and data of the hub are reached; nothing is tried over the network."""
    environment = machine.environment
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        if environment.get(name, "").upper() in ("1", "TRUE", "YES", "ON"):
            yield note("hub", f"{name} is set: only what is in the cache", f"unset {name}")
            return
    file = Path(
        environment.get("HF_TOKEN_PATH") or machine.folder("HF_HOME", ".cache", "huggingface") / "token"
    )
    has_token = environment.get("HF_TOKEN") or file.exists()
    token = "a token is there" if has_token else "no token: public ones only"
    server = redact_text(environment.get("HF_ENDPOINT", "https://huggingface.co"))
    yield ok("hub", f"{server} ({token}; not tried)")


CHANGES_RUNS = re.compile(
    r"OMP_|MKL_|KMP_|GOMP_|CUDA_|NVIDIA_|NCCL_|GLOO_|TORCH|PYTORCH_|DS_|DEEPSPEED_|HF_|TRANSFORMERS_|TOKENIZERS_"
    r"|WANDB_|RLHF_|TRITON_|MASTER_(ADDR|PORT)$|(LOCAL_)?(RANK|WORLD_SIZE)$|LD_PRELOAD$|PYTHONHASHSEED$"
)
"""Environment variables that a run takes notice of."""
LAUNCHER_S = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def changes_runs(name: str) -> bool:
    """Whether a variable does, of those that are not our own to each other."""
    return CHANGES_RUNS.match(name) is not None and name != WRITTEN_WITH


def variables(machine: Machine) -> Findings:
    """Environment variables that change runs, credentials hidden."""
    there = {name: value for name, value in sorted(machine.environment.items()) if changes_runs(name)}
    if not there:
        yield ok("environment", "no variable that changes runs")
        return
    yield note("environment", ", ".join(f"{name}={value}" for name, value in redact(there).items()))
    if left := [name for name in LAUNCHER_S if name in there]:
        text = f"{', '.join(left)}: of another launcher's; a run sets its own"
        yield note("environment", text, f"unset {' '.join(left)}")
