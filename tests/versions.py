"""The oldest and the newest versions that pyproject.toml admits, each in an environment of its own.

`make versions`. An environment lies above the project's own, whose packages it sees, and has transformers,
datasets, peft and wandb in the oldest or in the newest version of the range. A part of the suite that uses
them runs in both. What fails there leaves the range.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("transformers", "datasets", "peft", "wandb")
TESTS = (
    "tests/common/model", "tests/common/data/test_sources.py",
    "tests/common/runtime/test_wandb_mirror.py", "tests/common/training/test_export.py",
    "tests/common/training/test_import_model.py", "tests/recipes/test_sft_run.py",
)  # fmt: skip


def ranges() -> dict[str, str]:
    """What pyproject.toml asks of each of the libraries, e.g. `>=5.17,<6`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = {}
    for library in LIBRARIES:
        (asked,) = [text for text in project["dependencies"] if text.startswith(f"{library}>=")]
        found[library] = asked.removeprefix(library)
    return found


def wanted(end: str) -> list[str]:
    """Requirements for pip. end: oldest or newest."""
    if end == "newest":
        return [f"{library}{asked}" for library, asked in ranges().items()]
    return [f"{library}=={asked.removeprefix('>=').partition(',')[0]}" for library, asked in ranges().items()]


def make(folder: Path, requirements: Sequence[str]) -> Path:
    """An environment in which the requirements are met, above this one; its Python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    # appended, so that what is installed there comes first
    (site / "above.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
    subprocess.run([*command, *requirements], check=True)
    return python


def installed(folder: Path) -> str:
    """The versions in an environment, of the libraries alone."""
    (site,) = folder.glob("lib/python*/site-packages")
    found = {found.metadata["Name"]: found.version for found in distributions(path=[str(site)])}
    return ", ".join(f"{library} {found.get(library, 'as pinned')}" for library in LIBRARIES)


def main() -> int:
    """Both ends, or the one that is named; the exit status is that of the first that fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("ends", nargs="*", default=["oldest", "newest"], metavar="oldest|newest")
    status = 0
    for end in parser.parse_args().ends:
        with tempfile.TemporaryDirectory(prefix=f"rlhf_{end}_") as folder:
            python = make(Path(folder), wanted(end))
            print(f"{end}: {installed(Path(folder))}", flush=True)
            ended = subprocess.run([str(python), "-m", "pytest", "-q", *TESTS], cwd=ROOT).returncode
            print(f"{end}: {'passed' if ended == 0 else f'FAILED, exit status {ended}'}", flush=True)
            status = status or ended
    return status


if __name__ == "__main__":
    sys.exit(main())
