"""From the command line to a launcher: what is checked here, what is rendered, and with which overrides."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from common.errors import UserError
from launch import ssh
from pipeline import preview, run
from pipeline.__main__ import _Task, dispatch, main

LLAMA = ["model.config.model_type=llama", "model.tokenizer.train_vocab_size=512"]
SLURM = ["launch=slurm", "launch.nnodes=2", "launch.submit=false"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')


def arguments_in(script: Path) -> list[str]:
    """The overrides that a rendered job gives every node."""
    block = script.read_text().partition("arguments=(\n")[2].partition("\n)\n")[0]
    return shlex.split(block)


def test_a_slurm_job_is_rendered_with_what_was_typed(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["run", "steps=sft", *LLAMA, "sft.data.path=rows.jsonl", "run_name=a b", *SLURM]) == 0
    script = Path("runs/a b/slurm/job.sh")
    assert arguments_in(script) == [
        "run", "steps=sft", *LLAMA, "sft.data.path=rows.jsonl",
        "launch=local", "launch.nnodes=2", 'run_name="a b"',
    ]  # fmt: skip
    assert f"sbatch '{script}'" in capsys.readouterr().out


def test_the_name_of_a_run_without_one_is_settled_when_it_is_submitted() -> None:
    dispatch(["run", "steps=sft", *LLAMA, "sft.data.path=rows.jsonl", *SLURM])
    (script,) = Path("runs").glob("*/slurm/job.sh")
    assert arguments_in(script)[-1] == f"run_name={script.parts[1]}"


def test_every_job_of_a_sweep_is_a_job_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = ["run", *LLAMA, "sft.data.path=rows.jsonl", "run_name=a", *SLURM, "sft.optim.lr=1e-3,2e-3", "-m"]
    monkeypatch.setattr("sys.argv", ["rlhf", *typed])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    found = {script.parts[1]: arguments_in(script) for script in Path("runs").glob("*/slurm/job.sh")}
    assert len(found) == 2
    for name, arguments in found.items():
        assert arguments[-1] == f"run_name={name}" and "run_name=a" not in arguments
    rates = {text for arguments in found.values() for text in arguments if text.startswith("sft.optim.lr")}
    assert {float(text.partition("=")[2]) for text in rates} == {1e-3, 2e-3}


@pytest.fixture
def own() -> Path:
    """A user's own folder of configuration, with an experiment and a sweeper."""
    files = {
        "experiment/mine.yaml": "# @package _global_\nrun_name: mine\nsft:\n  data:\n    path: rows.jsonl\n",
        "hydra/sweeper/searching.yaml": "_target_: hydra._internal.core_plugins.basic_sweeper.BasicSweeper\n"
        "max_batch_size: null\nparams: null\n",
    }
    for name, text in files.items():
        path = Path("own", name).absolute()
        path.parent.mkdir(parents=True)
        path.write_text(text)
    return Path("own").absolute()


def with_flags(monkeypatch: pytest.MonkeyPatch, *typed: str) -> int | None:
    """A run with flags of Hydra's own; returns its exit status, or None where it just returns."""
    monkeypatch.setattr("sys.argv", ["rlhf"])
    try:
        dispatch(["run", *typed, *LLAMA])
    except SystemExit as ended:
        return int(ended.code or 0)
    return None


@pytest.mark.parametrize("sweeps", [False, True])
@pytest.mark.parametrize("is_flag", [False, True])
def test_the_machines_find_a_users_own_experiment(
    sweeps: bool, is_flag: bool, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searchpath = f"hydra.searchpath=[file://{own}]"
    typed = [*(["-m"] if sweeps else []), *(["--config-dir", "own"] if is_flag else [searchpath])]
    assert not with_flags(monkeypatch, *typed, "experiment=mine", *SLURM)
    (script,) = Path("runs").glob("mine*/slurm/job.sh")
    assert searchpath in arguments_in(script) and "experiment=mine" in arguments_in(script)


def test_a_sweeper_that_searches_is_given_what_a_run_over_ssh_came_to(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(config: object, overrides: object, run_dir: Path, say: object) -> int:
        (run_dir / "sft").mkdir(parents=True)
        (run_dir / "sft" / "metrics.jsonl").write_text('{"loss": 1.5}\n')
        return 0

    found: list[object] = []
    call = _Task.__call__
    monkeypatch.setattr(ssh, "launch", train)
    monkeypatch.setattr(_Task, "__call__", lambda task, node: found.append(call(task, node)))
    typed = ["-m", "--config-dir", "own", "hydra/sweeper=searching", "sft.data.path=rows.jsonl", "launch=ssh"]
    assert not with_flags(monkeypatch, *typed)
    assert found == [1.5]


def test_a_sweeper_that_searches_is_refused_where_runs_are_only_queued(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ["-m", "--config-dir", "own", "hydra/sweeper=searching", "sft.data.path=rows.jsonl", *SLURM]
    assert with_flags(monkeypatch, *typed) == UserError.EXIT_CODE
    assert "hydra/sweeper=searching learns from what runs come to" in capsys.readouterr().err
    assert not list(Path().glob("runs/*/slurm"))


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["sft.data.path=none.jsonl"], "sft.data.path=none.jsonl"),
        (["sft.data.path=rows.jsonl", "steps=[ppo]"], "ppo needs"),
        (["steps=[dpo]", "dpo.data.path=rows.jsonl", "dpo.policy=nowhere"], "nowhere"),
    ],
)
def test_what_can_be_seen_from_here_is_found_before_anything_is_queued(typed: list[str], said: str) -> None:
    model = [] if "steps=[dpo]" in typed else LLAMA
    with pytest.raises(UserError, match=said):
        dispatch(["run", *model, *typed, *SLURM])
    assert not list(Path().glob("runs/*/slurm"))


def test_a_machine_with_a_number_takes_part_instead_of_submitting(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[object] = []
    monkeypatch.setattr(run, "run", lambda config, say: ran.append(config.launch.node_rank) or 0)
    typed = [*LLAMA, "sft.data.path=rows.jsonl", *SLURM, "launch.node_rank=1"]
    assert dispatch(["run", *typed, "launch.rdzv_endpoint=n1:4000"]) == 0
    assert ran == [1]


def test_a_preview_stays_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[object] = []
    monkeypatch.setattr(preview, "preview", lambda config: shown.append(config) or 0)
    assert dispatch(["preview", *LLAMA, "sft.data.path=rows.jsonl", *SLURM]) == 0
    assert len(shown) == 1 and not list(Path().glob("runs/*/slurm"))
