"""Known vulnerabilities of the versions in constraints.txt, as pip-audit finds them: `python -m tests.audit`.

Ends with 1 when there is one that `ACCEPTED` does not explain. What could not be looked up is named, and does
not fail: there may be no network, or an index of packages that knows of no vulnerabilities.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PINS = Path(__file__).resolve().parent.parent / "constraints.txt"
ACCEPTED: Mapping[str, str] = {}
"""Vulnerabilities that are none here, by the ID that pip-audit prints, and why."""

Packages = Sequence[Mapping[str, Any]]


class Unanswered(Exception):
    """pip-audit gave no report; says why."""


def main() -> int:
    """Audit the pins; returns the exit status."""
    if importlib.util.find_spec("pip_audit") is None:
        print("there is no pip-audit: make installs it with the extra dev", file=sys.stderr)
        return 1
    pins = [line for line in PINS.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    status = 0
    for line, is_vulnerable in audit(pins, ask, ACCEPTED):
        print(line)
        status |= is_vulnerable
    return status


def audit(
    pins: Sequence[str], ask: Callable[[Sequence[str]], Packages], accepted: Mapping[str, str]
) -> Iterator[tuple[str, bool]]:
    """What there is to say, line by line, and whether it is a vulnerability that has to be dealt with."""
    try:
        packages = ask(pins[:1])
        if any("vulns" in package for package in packages):  # else the others are not asked about
            packages = ask(pins)
    except Unanswered as why:
        yield f"NOT AUDITED: none of {len(pins)} pins was looked up: {why}", False
        return
    skipped = [package["name"] for package in packages if "vulns" not in package]
    if len(skipped) == len(packages):
        why = "the index of packages knows of no vulnerabilities"
        yield f"NOT AUDITED: none of {len(pins)} pins was looked up: {why}", False
        return
    for package in packages:
        for known in package.get("vulns", ()):
            what = f"{package['name']} {package['version']}: {known['id']}"
            if known["id"] in accepted:
                yield f"{what} is accepted: {accepted[known['id']]}", False
            else:
                fixed = " or ".join(known["fix_versions"]) or "no version yet"
                yield f"{what}, fixed in {fixed}: raise the pin, or say in tests/audit.py why not", True
    if skipped:
        yield f"NOT AUDITED: {', '.join(skipped)}", False
    yield f"audited: {len(packages) - len(skipped)} of {len(pins)} pins", False


def ask(pins: Sequence[str]) -> Packages:
    """What pip-audit knows about these versions."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pins.txt"
        file.write_text("\n".join(pins) + "\n", encoding="utf-8")
        options = ["--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off"]
        done = subprocess.run(
            [sys.executable, "-m", "pip_audit", *options, "--requirement", str(file)],
            capture_output=True,
            text=True,
            check=False,
        )
    try:
        packages: Packages = json.loads(done.stdout)["dependencies"]
    except ValueError:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise Unanswered(lines[-1]) from None
    return packages


if __name__ == "__main__":
    sys.exit(main())
