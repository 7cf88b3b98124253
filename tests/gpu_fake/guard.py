"""The device guard: compiled once for the installed torch, and loaded before torch is imported.

Without it a CPU build of torch refuses tensors whose device is cuda. Needs g++ and nothing of CUDA.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")


def compiler() -> str | None:
    """The g++ that there is."""
    return shutil.which("g++")


def build() -> Path:
    """The compiled guard; three seconds when it is not there yet."""
    key = SOURCE.read_bytes() + importlib.metadata.version("torch").encode() + sys.version.encode()
    library = (
        Path(tempfile.gettempdir())
        / f"rlhf-gpu-fake-{os.getuid()}"
        / f"{hashlib.sha256(key).hexdigest()[:16]}.so"
    )
    if not library.exists():
        library.parent.mkdir(mode=0o700, exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}")
        torch = _folder_of_torch()
        includes = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
        options = ["-O0", "-std=c++20", "-shared", "-fPIC", "-w", *includes, str(SOURCE)]
        libraries = [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", "-o", str(made)]
        subprocess.run([compiler() or "g++", *options, *libraries], check=True)
        made.rename(library)
    return library


def load() -> None:
    """Load the guard into this process. RuntimeError after torch is imported: it would not look again."""
    if "torch" in sys.modules:
        raise RuntimeError("the guard has to be loaded before torch is imported")
    for name in ("libtorch_global_deps.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_folder_of_torch() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)


def _folder_of_torch() -> Path:
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent
