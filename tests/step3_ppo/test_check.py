"""`python -m step3_ppo --check`: what scores is looked at, and nothing else is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import ROOT

PROGRAM = """
import sys
sys.argv = ["step3_ppo", "--check", "--config", sys.argv[1]]
from step3_ppo.__main__ import main
status = main()
assert "torch" not in sys.modules and "transformers" not in sys.modules
sys.exit(status)
"""


@pytest.mark.parametrize(
    ("rewards", "status", "said"),
    [
        ("[{function: 'tests.step3_ppo.reward_functions:lengths'}, {url: 'https://h/score'}]", 0, ""),
        ("[{function: 'tests.step3_ppo.reward_functions:length'}]", 2, "did you mean tests.step3_ppo"),
        (
            "[{url: 'https://a/score', name: a}, {url: 'https://b/score', name: b}]",
            2,
            "ppo.rewards names several",
        ),
    ],
)
def test_what_scores_is_checked_without_torch(tmp_path: Path, rewards: str, status: int, said: str) -> None:
    (tmp_path / "resolved.yaml").write_text(f"ppo: {{rewards: {rewards}}}\n")
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "resolved.yaml")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": "", "RLHF_REWARD_TOKEN": "t"},
        timeout=120,
    )
    assert found.returncode == status, found.stderr
    assert said in found.stderr and "Traceback" not in found.stderr
