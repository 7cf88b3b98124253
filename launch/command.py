"""The command that every machine of a run is given.

Takes the overrides as the user typed them, returns the arguments of `python -m pipeline` for any one of the
machines, without its number and without the place where they meet: ssh, SLURM and Kubernetes each add these
in their own way. Also how a rendered file is kept and handed to a cluster.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.errors import UserError

OF_THE_LAUNCHER = (
    "launch", "launch.kind", "launch.nnodes", "launch.node_rank", "launch.rdzv_endpoint", "launch.hostfile",
    "launch.ssh_options", "launch.submit", "launch.slurm", "launch.k8s",
)  # fmt: skip
"""Keys that say how the machines are started; the machines themselves have no use for them."""

_PLAIN = re.compile(r"[A-Za-z0-9_./:-]+")


def machine_arguments(
    overrides: Sequence[str], nnodes: int, set_to: Mapping[str, str | int] | None = None
) -> list[str]:
    """Arguments after `python -m pipeline`: what the user typed, with the launcher's own keys replaced.

    set_to: further keys and their values, which take the place of typed ones.
    """
    values = {"launch": "local", "launch.nnodes": nnodes, **(set_to or {})}
    kept = [text for text in overrides if not _sets(text, (*OF_THE_LAUNCHER, *values))]
    return ["run", *kept, *(override(key, value) for key, value in values.items())]


def override(key: str, value: str | int) -> str:
    """`key=value` as Hydra reads it back, quoted where the value holds signs that mean something to it."""
    text = str(value)
    if isinstance(value, int) or _PLAIN.fullmatch(text):
        return f"{key}={text}"
    inner = re.sub(r'(\\*)"', r'\1\1\\"', text)
    inner = re.sub(r"(\\+)$", r"\1\1", inner)
    return f'{key}="{inner}"'


def one_line(text: str, key: str) -> str:
    """The text, which is refused when it could end the line that it is written into."""
    if not text.isprintable():
        raise UserError(
            f"{key}={text!r} is not one line of text", hint=f"take the control characters out of {key}"
        )
    return text


def keep(text: str, run_dir: Path, folder: str, name: str) -> Path:
    """Write what a launcher rendered to `<run>/<folder>/<name>`; the cluster prints into that folder, too."""
    from common.files import disk_errors, write_text

    path = run_dir / folder / name
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def hand_over(command: Sequence[str], file: Path, *, elsewhere: str, refused: str) -> str:
    """Give a file to a cluster by one of its own programs; returns what that prints.

    elsewhere, refused: the ways out where there is no such program, and where it refuses the file.
    """
    program = command[0]
    if shutil.which(program) is None:
        raise UserError(
            f"there is no {program} on this machine; {file} is written but not submitted", hint=elsewhere
        )
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        said = " ".join(done.stderr.split())[:2000] or f"exit status {done.returncode}"
        raise UserError(
            f"{program} refused {file}: {said}", hint=f"{refused}; launch.submit=false only writes"
        )
    return done.stdout.strip()


def _sets(text: str, keys: Sequence[str]) -> bool:
    """Whether an override sets one of the keys, or something below it (launch.slurm.partition)."""
    name = text.partition("=")[0].lstrip("+~").partition("@")[0]
    below = [key for key in keys if key != "launch"]
    return name in keys or any(name.startswith(f"{key}.") for key in below)
