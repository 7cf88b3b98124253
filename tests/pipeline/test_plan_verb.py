"""`python -m pipeline plan`: what it says, in a process of its own, and that its counts are the run's."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.counts import DataCounts
from common.errors import UserError
from common.stage import Step
from pipeline.compose import compose, prepare
from pipeline.config import PROJECT
from pipeline.plan import wire_run
from pipeline.planning.show import (
    WHOLE_ROLL_OUTS,
    Where,
    launch_lines,
    memory_lines,
    run_lines,
    schedule_lines,
    step_lines,
    table,
    where_of,
)
from pipeline.planning.show import plan as show_plan

GPUS = "launch.slurm.gpus_per_node=4"
COUNTS = DataCounts([], 90, 10, 9_000, 3_000, 25, 12, 120, 0.9, 512)
TINY = (
    "model.config={model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
    "num_attention_heads: 4, max_position_embeddings: 128, tie_word_embeddings: true}"
)


def plan(*overrides: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(PROJECT),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pipeline", "plan", *overrides]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_plan_of_two_steps_counts_their_rows_and_touches_no_run(tmp_path: Path) -> None:
    """Ten rows of text, one held out, each a row of its own: nine in batches of 4 are 3 steps."""
    rows = [json.dumps({"prompt": f"Say {n}.", "completion": f"{n} it is"}) for n in range(10)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    pairs = [json.dumps({"prompt": f"Say {n}.", "chosen": f"{n}", "rejected": "no"}) for n in range(8)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(pairs) + "\n")
    done = plan(
        "steps=[sft,reward]", TINY, "model.tokenizer.train_vocab_size=300", "sft.data.path=rows.jsonl",
        "sft.data.max_length=64", "sft.data.packing=false", "sft.data.eval_fraction=0.1",
        "sft.train.global_batch_size=4", "sft.train.epochs=2", "reward.data.path=pairs.jsonl",
        "reward.data.max_length=64", "reward.data.eval_fraction=0", "reward.train.global_batch_size=3",
        "run_name=a", folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "sft: 9 to train on, 1 held out" in said
    assert re.search(r"sft +9 rows +\S+ +6 +4 +<?= 1 x 1 x 4", said)
    assert re.search(r"reward +8 pairs +3 +3 +<?= 1 x 1 x 3", said)
    assert re.search(r"reward +policy from sft +-> reward_model runs/a/reward/export", said)
    assert "python -m pipeline run 'steps=[sft,reward]'" in said
    assert re.search(r"^ +2( +[\d.]+){9}  <- chosen$", said, re.MULTILINE)
    assert max(map(len, said.partition("launch\n")[0].splitlines())) <= 100
    assert not (tmp_path / "runs" / "a").exists()


@pytest.mark.slow
def test_data_that_a_run_would_refuse_is_refused_by_the_plan(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n')
    done = plan(
        "steps=[sft]", TINY, "model.tokenizer.train_vocab_size=300", "sft.data.path=rows.jsonl",
        "sft.data.max_length=64", folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "rows.jsonl:2" in done.stderr


def test_what_scores_is_imported_by_the_plan_as_by_a_run_without_torch_in_the_controller(
    tmp_path: Path,
) -> None:
    typed = ["experiment=demo", "ppo.evaluation.functions.gold=demo.nowhere:gold"]
    program = (
        "import sys; from pipeline.__main__ import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'demo.gold'} & sys.modules.keys()"
    )
    run = [sys.executable, "-c", program, "plan", *typed]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "there is no module demo.nowhere" in done.stderr
    assert "Traceback" not in done.stderr and "memory" not in done.stdout
    said: list[str] = []
    elsewhere = compose(prepare([*typed, "launch=slurm", f"output_dir={tmp_path}"]).overrides)
    assert show_plan(elsewhere, typed, say=said.append) == 0  # its machines try it
    assert any("is tried where it runs" in line for line in said)


def test_the_batch_arithmetic_is_ranks_times_micro_times_accumulation() -> None:
    config = compose(prepare(["experiment=gsm8k"]).overrides)  # 32 rows, micro batches of 4
    lines = schedule_lines(config, wire_run(config), Where(2, 2, gpu=False), {Step.sft: COUNTS})
    assert lines[1].split() == [
        "sft",
        "25",
        "packed",
        "rows",
        "90.0%",
        "12",
        "32",
        "=",
        "2",
        "x",
        "4",
        "x",
        "4",
    ]
    uneven = schedule_lines(config, wire_run(config), Where(3, 3, gpu=False), {Step.sft: COUNTS})
    assert uneven[1].endswith("<= 3 x 4 x 3")


def test_ppo_on_shared_rows_counts_groups_of_ranks_and_says_that_sampling_is_not_shared() -> None:
    typed = ["experiment=gsm8k_rlvr", "steps=[ppo]", "ppo.policy=x", "ppo.train.global_batch_size=64"]
    counts = {Step.ppo: COUNTS}
    config = compose(prepare([*typed, "ppo.train.micro_batch_size=4"]).overrides)
    where = Where(8, 8, gpu=False)
    alone = schedule_lines(config, wire_run(config), where, counts)
    assert " 8 x 4 x 2" in alone[1] and WHOLE_ROLL_OUTS not in alone
    config.launch.sequence_parallel = 4
    shared = schedule_lines(config, wire_run(config), where, counts)
    assert " 2 x 4 x 8" in shared[1] and WHOLE_ROLL_OUTS in shared


def test_counts_of_a_sample_are_marked_as_estimates() -> None:
    config = compose(prepare(["experiment=gsm8k"]).overrides)
    sampled = DataCounts([], 90, 10, 9_000, 3_000, 25, 12, 120, 0.9, 512, scale=4.0)
    lines = schedule_lines(config, wire_run(config), Where(1, 1, gpu=False), {Step.sft: sampled})
    assert "~25 packed rows" in lines[1] and "~12" in lines[1]


def test_a_stage_that_does_not_fit_is_marked_and_ways_out_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.planning.devices.gpu_memory", lambda: 24_000_000_000)
    monkeypatch.setattr("pipeline.planning.devices.host_memory", lambda: 2_000_000_000_000)
    fields = (
        "{model_type: llama, hidden_size: 4096, intermediate_size: 14336, num_hidden_layers: 32, "
        "num_attention_heads: 32, num_key_value_heads: 8, vocab_size: 128256, max_position_embeddings: 8192}"
    )
    config = compose(
        prepare(["steps=[sft]", f"model.config={fields}", "sft.data.path=x", "deepspeed=zero1"]).overrides
    )
    lines = memory_lines(config, wire_run(config), Where(64, 8, gpu=True), {Step.sft: COUNTS})
    text = "\n".join(lines)
    assert "8,030,261,248 parameters by the config" in text  # what Llama 3 8B has
    assert re.search(r"^ +1 .* <- chosen, does not fit \+ 17.6 GB of host memory$", text, re.MULTILINE)
    assert "does not fit; " in text and "deepspeed=zero3" in text


def test_ranks_of_a_cluster_are_its_nodes_times_their_gpus() -> None:
    config = compose(prepare(["experiment=gsm8k", "launch=slurm", "launch.nnodes=3", GPUS]).overrides)
    assert where_of(config) == Where(12, 4, gpu=True, elsewhere=True)
    lines = memory_lines(config, wire_run(config), where_of(config), {Step.sft: COUNTS})
    assert lines[0].endswith("(10^9 bytes); what a rank has there is not known here")
    lines = launch_lines(config, ["experiment=gsm8k", "launch=slurm", "launch.nnodes=3"], where_of(config))
    assert any(line.startswith("#SBATCH --nodes=3") for line in lines)


def test_ranks_over_ssh_are_those_of_the_hostfile(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("node-a slots=8\nme@node-b slots=4\nnode-c slots=8\n")
    typed = ["experiment=gsm8k", "launch=ssh", f"launch.hostfile={hostfile}", "launch.nnodes=2"]
    config = compose(prepare(typed).overrides)
    where = where_of(config)
    assert (where.ranks, where.here) == (12, 8)
    assert "12 rank(s) on 2 machines" in run_lines(config, where)[1]
    assert run_lines(config, where)[2].startswith("what GPUs the machines of launch=ssh have is not known")
    assert launch_lines(config, typed, where)[-2:] == ["node-a: 8 rank(s)", "me@node-b: 4 rank(s)"]
    with pytest.raises(UserError, match="hostfile is missing"):
        where_of(compose(prepare(["experiment=gsm8k", "launch=ssh"]).overrides))


def test_of_a_job_of_kubernetes_only_the_launch_is_known_here() -> None:
    typed = ["steps=[sft]", "model.path=/models/llama", "sft.data.path=/data/rows.jsonl", "launch=k8s"]
    typed += ["launch.k8s.image=I", "launch.k8s.volume_claim=C", "launch.nnodes=3"]
    typed += ["launch.k8s.volume_path=/v", "output_dir=/v/mine"]
    said: list[str] = []
    assert show_plan(compose(prepare(typed).overrides), typed, say=said.append) == 0
    assert any("output_dir=/v/mine" in line for line in said[3:])
    assert said[0] == "launch" and "      numNodes: 3" in said and said[-1].endswith("with launch=local")


def test_every_machine_started_by_hand_has_a_command_of_its_own() -> None:
    typed = ["experiment=gsm8k", "launch.nnodes=2", "launch.rdzv_endpoint=a:29500"]
    config = compose(prepare(typed).overrides)
    lines = launch_lines(config, typed, Where(2, 1, gpu=False))
    assert [line.rpartition(" ")[2] for line in lines] == ["launch.node_rank=0", "launch.node_rank=1"]


def test_steps_say_where_their_inputs_come_from() -> None:
    config = compose(prepare(["experiment=demo", "run_name=none"]).overrides)
    lines = step_lines(config, wire_run(config))
    words = "ppo policy from sft, reward_model from reward -> policy runs/none/ppo/export"
    assert " ".join(lines[2].split()) == words


def test_a_table_aligns_numbers_to_the_right() -> None:
    assert table([("a", "1"), ("bbb", "22")], right=[1]) == ["a     1", "bbb  22"]
