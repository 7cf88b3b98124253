"""The command line as a user meets it, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.artifacts import Manifest, write_manifest
from pipeline.__main__ import VERBS
from pipeline.config import PROJECT
from tests.conftest import Command
from tests.pipeline.report_runs import make_run

PROGRAMS = Path(__file__).parent / "programs"


def rlhf(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the controller (with the fake step) in `folder`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROJECT), str(PROGRAMS)])}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, str(PROGRAMS / "drive.py"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def job(tmp_path: Path) -> list[str]:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    return ["model=llama_4m", "sft.data.path=rows.jsonl", "sft.data.max_length=256"]


def test_a_run_leaves_nothing_in_the_working_directory_but_its_folder(tmp_path: Path, job: list[str]) -> None:
    done = rlhf("run", *job, "run_name=a", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "runs"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["a"]
    assert "artifact  runs/a/sft/export" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "usage: python -m pipeline"),
        (("rnu",), "did you mean run?"),
        (("sft.data.path=x",), "python -m pipeline run sft.data.path=x"),
        (("run", "+sft.lrr=1"), "did you mean sft.optim.lr?"),
        (("run", "--cfg", "job", "sft.lrr=1"), "did you mean sft.optim.lr?"),
        (("run", "-m", "seed=1,x"), "seed: invalid value 'x'"),
        (("run", "steps=[sft,ppo]"), "ppo needs a reward_model"),
        (("run", "--no-such-flag"), "unrecognized arguments: --no-such-flag"),
        (("run", "steps=[reward]"), "add sft to steps, or set reward.policy=PATH"),
        (("run", "steps=[dpo]", "dpo.policy=./nowhere"), "dpo.policy=./nowhere: no such folder"),
        (("run", "steps=[sft,dpo]", "optim=muon"), "one or more of sft.optim=muon, dpo.optim=muon"),
        (("preview", "model.path=./nowhere"), "model.path=./nowhere: no such folder"),
        (("preview", "dpo"), "did you mean steps=dpo?"),
        (("run", "steps=[dpo]", "dpo.policy=P", "model.chat_template=alpaca"), "alpaca has no effect: dpo"),
        (
            ("run", "-m", "seed=1,2", "steps=[dpo]", "dpo.policy=P", "model.path=x"),
            "model.path=x has no effect",
        ),
        (("verify",), "verify: the following arguments are required: PATH"),
        (("verify", "nowhere"), "nowhere: no such folder"),
        (("verify", __file__), "test_main.py: a file"),
        (("report",), "arguments are required: RUN"),
        (("report", "nowhere"), "nowhere"),
        (("chat",), "the following arguments are required: PATH"),
        (("chat", "nowhere"), "PATH=nowhere: no such folder"),
        (("cat", "nowhere"), "did you mean chat?"),
        (("verify", "a" * 300), "aaa: no file can have so long a name"),
        (("run", "model=llama_4m", f"sft.data.path={'a' * 300}"), "aaa: no file can have so long a name"),
        (("run", f"seed={'9' * 5_000}"), "seed cannot be read: Exceeds the limit (4300 digits)"),
        (("run", f"seed={'[' * 30}{']' * 30}"), "seed cannot be read: lists or mappings nested deeper"),
        (("run", f"seed={'[' * 900}{']' * 900}"), "seed cannot be read: lists or mappings nested deeper"),
        (("run", "deepspeed=2"), "deepspeed=2 is unknown"),
        (("run", f"{'x' * 300}.lr=1"), "known keys: steps, run_name"),
        (("run", "steps=[sft]", "ppo.reward_model=R"), "ppo.reward_model=R has no effect: ppo is not among"),
        (
            ("run", "steps=[sft,ppo]", "ppo.reward_model=R", "ppo.rewards=[{url: 'https://h'}]"),
            "ppo.reward_model=R has no effect: with these settings ppo uses no reward_model",
        ),
    ],
)
def test_what_the_user_can_fix_ends_with_status_two_and_no_traceback(
    arguments: tuple[str, ...], said: str, tmp_path: Path, command: Command
) -> None:
    done = command(*arguments, folder=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("verb", "option"),
    [
        ("report", "--out FILE.html"),
        ("import", "--out FOLDER"),
        ("evaluate", "--out FILE"),
        ("run", "output_dir=DIR"),
    ],
)
def test_a_disk_that_refuses_ends_with_the_option_of_the_verb(
    verb: str, option: str, tmp_path: Path, command: Command
) -> None:
    in_the_way, model = tmp_path / "file", tmp_path / "model"
    in_the_way.touch(), model.mkdir()
    (model / "config.json").write_text("{}")
    make_run(tmp_path / "run", ["sft"])
    arguments = {
        "report": [str(tmp_path / "run"), "--out", f"{in_the_way}/page.html"],
        "import": [str(model), "--out", f"{in_the_way}/policy"],
        "evaluate": [str(model), "--data", f"{in_the_way}", "--out", f"{in_the_way}/numbers.json"],
        "run": ["experiment=demo", "steps=[sft]", f"output_dir={tmp_path}", "run_name=file"],
    }
    ended = command(verb, *arguments[verb], folder=tmp_path)
    assert ended.returncode == 2 and ended.stderr.rstrip().endswith(option)


def test_an_error_is_no_traceback_in_a_process_of_its_own_either(tmp_path: Path) -> None:
    done = rlhf("run", "+sft.lrr=1", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "model.path=./no\x1b]0;owned\x07where", "sft.data.path=rows.jsonl"),
        ("run", "run_n\x1b[31mame=x"),
        ("verify", "no\x1b[2Jwhere\x9b1m"),
        ("ve\x1b[31mrify", "x"),
    ],
)
def test_what_an_error_quotes_cannot_steer_the_terminal(
    arguments: tuple[str, ...], tmp_path: Path, command: Command
) -> None:
    done = command(*arguments, folder=tmp_path)
    assert done.returncode == 2 and "error: " in done.stderr
    assert not set(done.stderr + done.stdout) & {"\x1b", "\x07", "\x9b"}


def test_what_verify_finds_cannot_steer_the_terminal(tmp_path: Path, command: Command) -> None:
    write_manifest(tmp_path, Manifest("checkpoint", None, {}))
    (tmp_path / "no\x1b[2Jwhere.json").touch()
    done = command("verify", str(tmp_path), folder=tmp_path)
    assert done.returncode == 2 and "no\u241b[2Jwhere.json: not recorded" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "model.path=https://me:hunter2@host/model"),
        ("verify", "https://me:hunter2@host/run"),
        ("run", "https://me:hunter2@host=1"),
        ("chat", "https://me:hunter2@host/model"),
    ],
)
def test_a_password_in_an_address_is_not_quoted(
    arguments: tuple[str, ...], tmp_path: Path, command: Command
) -> None:
    done = command(*arguments, folder=tmp_path)
    assert done.returncode == 2 and "error: " in done.stderr
    assert "hunter2" not in done.stderr + done.stdout


def test_hydras_own_flags_keep_working(tmp_path: Path) -> None:
    shown = rlhf("run", "--cfg", "job", "seed=7", "--package", "sft.optim", folder=tmp_path)
    assert (shown.returncode, "name: adamw" in shown.stdout) == (0, True), shown.stderr
    helped = rlhf("run", "--help", folder=tmp_path)
    assert helped.returncode == 0
    assert "deepspeed: zero1, zero2, zero2_offload, zero3, zero3_hpz, zero3_offload" in helped.stdout
    assert rlhf("run", "--info", "defaults", folder=tmp_path).returncode == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_chains_run_on_the_demos_data_with_nothing_else_named(tmp_path: Path) -> None:
    for steps in ("steps=[sft,reward]", "steps=[sft,dpo]"):
        done = rlhf("run", steps, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "running the embedded demo" in done.stdout
    done = rlhf("run", folder=tmp_path)  # the whole chain, of which two steps are there
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done already, verified") == 2
    assert "artifact  runs/demo/ppo/export" in done.stdout
    assert done.stdout.endswith("report    runs/demo/report.html\n")
    for step in ("reward", "dpo"):
        given = (f"steps=[{step}]", f"{step}.policy=runs/demo/sft/export", "run_name=b")
        done = rlhf("run", *given, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "no data named" in done.stdout and f"artifact  runs/b/{step}/export" in done.stdout
    assert rlhf("verify", "runs", folder=tmp_path).returncode == 0


@pytest.mark.parametrize(
    "verb", [verb for verb in VERBS if verb not in ("run", "plan", "preview")]
)  # those are Hydra's
def test_every_verb_has_a_usage(verb: str, tmp_path: Path, command: Command) -> None:
    for option in ("--help", "-h"):
        asked = command(verb, option, folder=tmp_path)
        assert asked.returncode == 0 and asked.stderr == ""
        assert asked.stdout.startswith(f"usage: python -m pipeline {verb} [-h]")
        assert len(asked.stdout.splitlines()) > 5


def test_help_is_no_error(tmp_path: Path) -> None:
    done = rlhf("--help", folder=tmp_path)
    assert done.returncode == 0
    for verb in ("run [overrides]", "preview [overrides]", "verify PATH", "report RUN", "chat PATH"):
        assert f"\n  {verb} " in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 110


@pytest.mark.slow
def test_a_sweep_runs_every_combination_in_a_folder_of_its_own(tmp_path: Path, job: list[str]) -> None:
    done = rlhf("run", "-m", *job, "run_name=s", "seed=1,2", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    made = sorted(path.name for path in (tmp_path / "runs").iterdir() if not path.name.startswith("."))
    assert made[0] == "report.html" and len(made) == 3 and all(name.startswith("s-") for name in made[1:])
    header, *rows, page = done.stdout.splitlines()[-4:]
    assert header.split() == ["run", "seed", "sft:loss"] and page == "report    runs/report.html"
    assert sorted(row.split()[1] for row in rows) == ["1", "2"]
    again = rlhf("run", "-m", *job, "run_name=s", "seed=1,2", folder=tmp_path)
    assert again.stdout.count("done already, verified") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "runs"]


def test_a_users_own_folder_of_experiments_is_found(tmp_path: Path, job: list[str]) -> None:
    own = tmp_path / "mine" / "experiment"
    own.mkdir(parents=True)
    (own / "short.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: llama_4m\n"
        "run_name: short\nsft:\n  data:\n    path: rows.jsonl\n    max_length: 128\n"
    )
    done = rlhf("run", "--config-dir", "mine", "experiment=short", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "max_length: 128" in (tmp_path / "runs" / "short" / "resolved.yaml").read_text()
    text = (own / "short.yaml").read_text()
    (own / "typo.yaml").write_text(text.replace("max_length", "max_lenght"))
    done = rlhf("run", "--config-dir", "mine", "experiment=typo", folder=tmp_path)
    assert done.returncode == 2
    assert (
        "unknown key sft.data.max_lenght" in done.stderr
        and "did you mean sft.data.max_length?" in done.stderr
    )
