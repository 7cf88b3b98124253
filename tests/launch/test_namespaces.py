"""Two machines joined by a cable only: network namespaces with a veth pair between them (make faults)."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from benchmarks.namespaces import NoNamespaces, ip, network
from pipeline.verify import verify_path
from tests.forked import ENVIRONMENT, ROOT

pytestmark = pytest.mark.cluster
TINY = (
    "experiment=demo", "deepspeed=zero3", "model.config.hidden_size=32", "model.config.intermediate_size=64",
    "sft.sampling.num_prompts=4", "sft.train.max_steps=4", "reward.train.max_steps=4",
    "ppo.train.max_steps=2", "sft.train.save_every=2", "tracking.wandb=off",
)  # fmt: skip
ADDRESS = "10.91.0.1"


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Two namespaces; `ip -n SECOND link set cable1 down` cuts the cable."""
    try:
        with network({"cable": ("a", "b")}) as machines:
            yield machines["a"], machines["b"]
    except NoNamespaces as why:
        pytest.skip(str(why))


@contextlib.contextmanager
def machines(
    names: Sequence[str], folder: Path, *overrides: str
) -> Iterator[tuple[list[subprocess.Popen[str]], list[Path]]]:
    """The same command in both namespaces, and where each prints."""
    launch = ("launch.nnodes=2", f"launch.rdzv_endpoint={ADDRESS}:29500", f"output_dir={folder}")
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    environment.pop("GLOO_SOCKET_IFNAME", None)
    printed = [folder / f"machine_{number}.txt" for number in (0, 1)]
    processes = []
    for number, name in enumerate(names):
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "pipeline", "run", *TINY, *overrides]
        with open(printed[number], "w", encoding="utf-8") as output:
            processes.append(
                subprocess.Popen(
                    [*command, *launch, f"launch.node_rank={number}"],
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    text=True,
                    cwd=folder,
                )  # fmt: skip
            )
    try:
        yield processes, printed
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_sft_reward_and_ppo_run_with_zero3_over_a_cable(namespaces: tuple[str, str], tmp_path: Path) -> None:
    with machines(namespaces, tmp_path, "run_name=chain") as (processes, printed):
        codes = [process.wait(1500) for process in processes]
        assert codes == [0, 0], "\n".join(path.read_text()[-4000:] for path in printed)
    for step in ("sft", "reward", "ppo"):
        assert f"{step}: done" in printed[0].read_text()
        assert (tmp_path / "chain" / step / "logs/rank_1.log").exists()
    assert verify_path(tmp_path / "chain") == 0


def test_a_cut_cable_ends_both_machines_and_the_same_command_goes_on(
    namespaces: tuple[str, str], tmp_path: Path
) -> None:
    overrides = ("steps=sft", "run_name=cut", "sft.train.max_steps=400", "sft.train.eval_every=1000")
    with machines(namespaces, tmp_path, *overrides) as (processes, printed):
        checkpoints = tmp_path / "cut/sft/checkpoints"
        while not list(checkpoints.glob("step_*[0-9]")):
            assert all(process.poll() is None for process in processes), printed[0].read_text()
            time.sleep(0.05)
        ip("-n", namespaces[1], "link", "set", "cable1", "down")
        assert [process.wait(120) for process in processes] == [1, 1]
        assert "machine 1 (" in printed[0].read_text() and "is gone" in printed[0].read_text()
        assert f"machine 0 at {ADDRESS}:29500 is gone" in printed[1].read_text()
    ip("-n", namespaces[1], "link", "set", "cable1", "up")
    with machines(namespaces, tmp_path, *overrides) as (processes, printed):
        assert [process.wait(1500) for process in processes] == [0, 0], printed[0].read_text()[-3000:]
        assert "resuming from" in printed[0].read_text()
