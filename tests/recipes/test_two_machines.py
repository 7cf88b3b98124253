"""The same command on two machines, of which one loses its rank: the artifact is that of one machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.artifacts import file_sha256
from tests import runs
from tests.forked import ENVIRONMENT, ROOT, free_port
from tests.runs import LLAMA, Base


def printed_by(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What each has printed in the end; all have to end well."""
    try:
        printed = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(printed)
    return printed


@pytest.mark.slow
def test_two_machines_with_zero3_that_lose_a_rank_end_with_the_bits_of_one_machine(
    tmp_path: Path, base: Base
) -> None:
    model = {f"model.config.{key}": value for key, value in LLAMA.items()}
    overrides = {
        "steps": "sft", "run_name": "two", "output_dir": tmp_path / "runs", "deepspeed": "zero3",
        **{f"+{key}": value for key, value in model.items()},
        "model.tokenizer.path": base.tokenizer, "model.dtype": "fp32", "sft.data.path": base.sources[0],
        "sft.data.max_length": 96, "sft.train.global_batch_size": 4, "sft.train.micro_batch_size": 2,
        "sft.data.eval_fraction": 0, "sft.train.max_steps": 6, "sft.train.save_every": 2,
        "tracking.wandb": "off",
        "launch.nnodes": 2, "launch.rdzv_endpoint": f"127.0.0.1:{free_port()}", "launch.max_restarts": 1,
    }  # fmt: skip
    fault = f"point=step,rank=1,step=4,do=kill,once={tmp_path / 'killed'}"
    machines = [
        subprocess.Popen(
            [sys.executable, "-m", "pipeline", "run", f"launch.node_rank={number}"]
            + [f"{key}={value}" for key, value in overrides.items()],
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT), "RLHF_FAULT": fault},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
        )
        for number in (0, 1)
    ]
    printed = printed_by(machines)
    assert (tmp_path / "killed").exists()
    assert "died (SIGKILL); starting again from the last checkpoint, restart 1 of 1" in printed[0]
    assert "resuming from" in printed[0] and "sft: done" in printed[0]

    one = tmp_path / "one"
    one.mkdir()
    (one / "resolved.yaml").write_bytes((tmp_path / "runs/two/resolved.yaml").read_bytes())
    runs.finish(one, 2)
    artifacts = [folder / "sft/export/model.safetensors" for folder in (one, tmp_path / "runs/two")]
    assert file_sha256(artifacts[0]) == file_sha256(artifacts[1])


@pytest.mark.slow
def test_two_agents_of_torchrun_that_meet_over_c10d_run_a_step(base: Base) -> None:
    job = base.job(max_steps=3)
    job.deepspeed.stage = 3
    one, two = base.run("one machine", job, ranks=2), base.write("two agents", job)
    endpoint = f"127.0.0.1:{free_port()}"
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
            + ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=test"]
            + ["-m", "step1_sft", "--config", str(two / "resolved.yaml")],
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    printed_by(agents)
    artifacts = [folder / "sft/export/model.safetensors" for folder in (one, two)]
    assert file_sha256(artifacts[0]) == file_sha256(artifacts[1])
