"""The comparison programs at a toy size: they run, and both sides agree."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import (
    data_scale,
    dpo_parity,
    pair_parity,
    pair_sides,
    pairs_workload,
    parity,
    reward_parity,
    sft_gpu,
    sft_parity,
    workload,
)
from benchmarks.measure import PROJECT, threads_environment

needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="trl is not installed (extra: bench)"
)


def run_program(tmp_path: Path, name: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments, "--results", str(tmp_path / "results")]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = (tmp_path / "results").glob("*.json")
    return json.loads(written.read_text())


def toy_workload(folder: Path, rows: int) -> None:
    """A model of some thousand weights under `base/`, and rows that fit it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from common.model.tokenizer import train_tokenizer

    every = [data_scale.row(number * 37) for number in range(rows)]
    tokenizer = train_tokenizer((text for row in every for text in row.values()), 300)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in every))


@needs_trl
def test_losses_and_gradient_norms_are_trls(tmp_path: Path) -> None:
    toy_workload(tmp_path, rows=2 * sft_parity.ROWS_PER_STEP)
    made = workload.Workload(tmp_path / "base", tmp_path / "rows.jsonl")
    ours, theirs = sft_parity.compare(made, tmp_path, steps=2, threads=1)
    result = parity.summary(ours, theirs, sft_parity.QUANTITIES)
    assert result["steps"] == 2 and result["passed"]
    assert result["largest_relative_difference"]["loss"] < 1e-6  # fp32 sums of a few hundred terms
    assert result["largest_relative_difference"]["grad_norm"] < 1e-5
    assert ours[0]["loss"] != ours[1]["loss"]  # two different batches


def toy_pairs(folder: Path, count: int) -> pairs_workload.PairsWorkload:
    """A policy of some thousand weights, and questions with a right and a wrong answer."""
    from common.config import Dtype, ModelConfig, TokenizerConfig
    from common.model.tokenizer import load_tokenizer

    asked = [data_scale.row(number * 37) for number in range(count)]
    shape = {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }  # fmt: skip
    own = TokenizerConfig(train_vocab_size=300)
    model = ModelConfig(config=shape, tokenizer=own, dtype=Dtype.fp32)
    tokenizer = load_tokenizer(model, lambda: (text for row in asked for text in row.values()))
    pairs_workload.export_as_policy(model, tokenizer, folder / "policy")
    rows = [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "chosen": [{"role": "assistant", "content": row["answer"]}],
            "rejected": [{"role": "assistant", "content": "I do not know; " * (number % 3) + "no."}],
        }
        for number, row in enumerate(asked)
    ]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return pairs_workload.PairsWorkload(folder / "policy", path)


@needs_trl
def test_the_reward_models_numbers_are_trls(tmp_path: Path) -> None:
    made = toy_pairs(tmp_path, 3 * pair_parity.PAIRS_PER_STEP)
    base = pair_sides.initial_reward_model(made, tmp_path / "base")
    trial = pair_parity.Trial("reward", made, tmp_path, base, steps=3, threads=1)
    ours, theirs = reward_parity.compare(trial, center=0.01)
    result = parity.summary(ours, theirs, reward_parity.QUANTITIES)
    assert result["steps"] == 3 and result["passed"], result["largest_relative_difference"]
    assert len({step["margin"] for step in ours}) == 3  # three different batches


@needs_trl
def test_dpos_numbers_are_trls(tmp_path: Path) -> None:
    made = toy_pairs(tmp_path, 3 * pair_parity.PAIRS_PER_STEP)
    trial = pair_parity.Trial("dpo", made, tmp_path, made.policy, steps=3, threads=1)
    ours, theirs = dpo_parity.compare(trial, "sigmoid")
    result = parity.summary(ours, dpo_parity.with_ties_as_half(theirs), dpo_parity.QUANTITIES)
    assert result["steps"] == 3 and result["passed"], result["largest_relative_difference"]
    assert ours[0]["rewards/margins"] == 0.0 != ours[2]["rewards/margins"]  # the policy has moved


@needs_trl
@pytest.mark.slow
def test_the_gpu_comparison_runs_on_the_cpu_with_a_toy(tmp_path: Path) -> None:
    written = run_program(tmp_path, "sft_gpu", "--shape", "toy", "--length", "64", "--steps", "5")
    assert written["best_trl"] == "TRL sdpa"
    assert len(written["runs"]["ours"]["losses"]) == 5
    # bf16 weights on one side, bf16 autocast on the other
    assert written["largest_loss_relative_difference"] < 1e-3


def test_synthetic_documents_fill_their_row_and_have_a_prompt() -> None:
    run = sft_gpu.Run("ours", "toy", 64, 1, 1, "packed", 4, 2, "")
    for row in range(8):
        documents = sft_gpu.documents_of(run, row)
        assert sum(len(d.input_ids) for d in documents) == 64
        assert all(d.labels[0] == -100 and d.trained > 0 for d in documents)


def test_both_sides_get_the_same_trained_tokens() -> None:
    run = sft_gpu.Run("ours", "toy", 64, 1, 1, "packed", 4, 2, "")
    columns = sft_gpu.columns_of(run)
    batches = sft_gpu.batches_of(run, 0)
    ours = [int(t) for batch in batches for t in batch.targets]
    theirs = [label for labels in columns["labels"] for label in labels if label != -100]
    assert len(ours) > 100 and ours == theirs
    assert [i for batch in batches for i in batch.input_ids[0].tolist()] == sum(columns["input_ids"], [])


@pytest.mark.slow
def test_the_data_path_is_measured(tmp_path: Path) -> None:
    written = run_program(tmp_path, "data_scale", "--sizes", "200", "--threads", "1")
    assert [size["rows"] for size in written["sizes"]] == [200]
    assert all(size["packed_rows"] > 0 and 0.5 < size["fill"] <= 1 for size in written["sizes"])
    assert all(0 < size["rank_own_mb"] < size["rank_peak_rss_mb"] for size in written["sizes"])


@pytest.mark.slow
def test_the_first_batch_of_rows_that_a_server_sends_is_measured(tmp_path: Path) -> None:
    typed = ["--streaming", "--served", "1", "--sizes", "400", "--threads", "1"]
    (stream,) = run_program(tmp_path, "data_scale", *typed)["streams"]
    assert stream["rows"] == 400 and stream["tokens_of_first_step"] > 0
    assert stream["file_mb"] > 0 and stream["served_mb_per_second"] == 1


@pytest.fixture(autouse=True)
def quiet_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in threads_environment(1).items():
        monkeypatch.setenv(name, value)
