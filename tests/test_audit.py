"""What ruff and pip-audit say of our code and of the versions we pin; each exception has its reason."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from tests.audit import PINS, Packages, Unanswered, audit
from tests.forked import ROOT

KNOWN = {"id": "PYSEC-1", "fix_versions": ["2.1", "3"], "aliases": ["CVE-1"], "description": "text"}
CLEAN = {"name": "a", "version": "1", "vulns": []}
HIT = {"name": "b", "version": "2", "vulns": [KNOWN]}
SKIPPED = {"name": "c", "skip_reason": "not found"}


def said(*answers: Packages | Unanswered, accepted: Any = ()) -> tuple[list[tuple[str, bool]], list[int]]:
    """What is said of three pins, and how many were asked about each time."""
    asked, left = [], list(answers)

    def ask(pins: Sequence[str]) -> Packages:
        asked.append(len(pins))
        answer = left.pop(0)
        if isinstance(answer, Unanswered):
            raise answer
        return answer

    return list(audit(["a==1", "b==2", "c==3"], ask, dict(accepted))), asked


def test_a_known_vulnerability_fails_unless_its_reason_is_listed() -> None:
    lines, asked = said([CLEAN], [CLEAN, HIT, SKIPPED])
    assert asked == [1, 3]
    assert lines == [
        ("b 2: PYSEC-1, fixed in 2.1 or 3: raise the pin, or say in tests/audit.py why not", True),
        ("NOT AUDITED: c", False),
        ("audited: 2 of 3 pins", False),
    ]
    lines, _ = said([CLEAN], [CLEAN, HIT, CLEAN], accepted={"PYSEC-1": "we never call it"})
    assert lines[0] == ("b 2: PYSEC-1 is accepted: we never call it", False)


def test_what_cannot_be_looked_up_is_said_and_asked_about_once() -> None:
    none = "NOT AUDITED: none of 3 pins was looked up: "
    assert said(Unanswered("no route to host")) == ([(f"{none}no route to host", False)], [1])
    assert said([SKIPPED]) == ([(f"{none}the index of packages knows of no vulnerabilities", False)], [1])


def test_every_pin_names_one_version() -> None:
    lines = PINS.read_text().splitlines()[1:]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9a-z.]+", line)] == []


@pytest.mark.parametrize(
    ("code", "rule"),
    [
        ("import subprocess\n\nsubprocess.run('rm x', shell=True)\n", "S602"),
        ("import pickle\n\npickle.loads(b'')\n", "S301"),
        ("import random\n\nsecret = random.random()\n", "S311"),
        ("import yaml\n\nyaml.load('', Loader=yaml.Loader)\n", "S506"),
        ("eval('1')\n", "S307"),
    ],
)
def test_code_that_trusts_too_much_is_refused(code: str, rule: str) -> None:
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--stdin-filename", "launch/new.py", "-"]
    done = subprocess.run(command, input=code, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1 and rule in done.stdout


def test_every_exception_from_a_rule_of_security_has_its_reason() -> None:
    exceptions = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for folder in ("pipeline", "common", "launch", "step*", "demo", "tests", "benchmarks")
        for path in ROOT.glob(f"{folder}/**/*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"# noqa: [^-]*\bS\d", line)
    ]
    assert len(exceptions) >= 9
    assert [text for text in exceptions if not re.search(r"# noqa: S\d+ - \w", text)] == []
