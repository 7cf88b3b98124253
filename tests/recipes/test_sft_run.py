"""The SFT step from beginning to end, as a user finds it afterwards."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path

import pytest

from common.artifacts import file_sha256, verify
from common.stage import Role
from step1_sft.config import SFTConfig, SFTJob
from tests.recipes import golden
from tests.runs import CHECKPOINT, EXPORT, Base, evaluation_lines, files_below, finish, training_lines

# other processors sum in another order, and Adam's first steps turn rounding into a share of the step
GOLDEN_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def job(base: Base) -> SFTJob:
    return golden.golden_job(base)


@pytest.fixture(scope="module")
def run_dir(base: Base, job: SFTJob) -> Path:
    return base.run("golden", job)


def test_a_run_leaves_exactly_these_files(run_dir: Path) -> None:
    kept = (f"checkpoints/step_{step:08d}/{name}" for step in (6, 8) for name in CHECKPOINT)
    plain = ("metrics.jsonl", "samples.jsonl", "ledger.json", "logs/rank_0.log")
    expected = {*kept, *plain, *(f"export/{name}" for name in EXPORT)}
    assert files_below(run_dir / "sft") == expected


def test_every_training_line_has_the_metrics_that_users_know(run_dir: Path) -> None:
    lines = training_lines(run_dir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7, 8]
    names = {
        "step", "loss", "mean_token_accuracy", "entropy", "grad_norm", "learning_rate", "num_tokens",
        "num_trained_tokens", "epoch", "perf/tokens_per_second", "perf/memory_gb", "perf/peak_memory_gb",
        "perf/padding_share",
    }  # fmt: skip
    for line in lines:
        assert set(line) == names
        assert all(math.isfinite(value) for value in line.values())
        assert line["perf/padding_share"] == 0.0


def test_every_evaluation_line_has_the_metrics_of_the_whole_and_of_each_source(run_dir: Path) -> None:
    lines = evaluation_lines(run_dir)
    assert [line["step"] for line in lines] == [0, 3, 6, 8]
    names = {
        "step", "eval/loss", "eval/perplexity", "eval/mean_token_accuracy", "eval/stop_rate",
        "eval/sums/loss", "eval/words/loss",
    }  # fmt: skip
    by_source = [[name.format(source=of) for of in ("sums", "words")] for name in SFTConfig().measured()]
    assert names == {"step", *itertools.chain.from_iterable(by_source)}  # what early stopping may watch
    for line in lines:
        assert set(line) == names
        assert line["eval/perplexity"] == pytest.approx(math.exp(line["eval/loss"]))
        low, high = sorted((line["eval/sums/loss"], line["eval/words/loss"]))
        assert low < line["eval/loss"] < high


def test_the_loss_starts_at_that_of_a_uniform_guess_and_falls(run_dir: Path) -> None:
    # a fresh model knows nothing of its vocabulary
    config = json.loads((run_dir / "sft" / "export" / "config.json").read_text())
    assert training_lines(run_dir)[0]["loss"] == pytest.approx(math.log(config["vocab_size"]), rel=0.05)
    losses = [line["eval/loss"] for line in evaluation_lines(run_dir)]
    assert losses[0] == pytest.approx(math.log(config["vocab_size"]), rel=0.05)
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == 4


def test_the_first_losses_and_gradient_norms_are_those_on_record(run_dir: Path) -> None:
    recorded = [line.split() for line in golden.FILE.read_text().splitlines() if not line.startswith("#")]
    assert len(recorded) == 8
    for (step, loss, norm), line in zip(recorded, training_lines(run_dir), strict=True):
        assert line["step"] == int(step)
        assert line["loss"] == pytest.approx(float(loss), rel=GOLDEN_TOLERANCE)
        assert line["grad_norm"] == pytest.approx(float(norm), rel=10 * GOLDEN_TOLERANCE)


def test_learning_rate_warms_up_and_then_follows_a_cosine_to_its_floor(run_dir: Path, job: SFTJob) -> None:
    rates = [line["learning_rate"] for line in training_lines(run_dir)]
    peak, floor = job.sft.optim.lr, 0.1
    assert peak is not None
    shares = [0.0] + [floor + (1 - floor) * (1 + math.cos(math.pi * done / 7)) / 2 for done in range(7)]
    assert rates == pytest.approx([peak * share for share in shares])


def test_counted_tokens_are_those_of_the_rows(run_dir: Path) -> None:
    lines = training_lines(run_dir)
    ledger = json.loads((run_dir / "sft" / "ledger.json").read_text())["sources"]
    assert [entry["name"] for entry in ledger] == ["sums", "words"]
    # held-out tokens are in the ledger too, so an epoch has fewer than it says
    first_epoch = [line for line in lines if line["epoch"] <= 1]
    assert first_epoch[-1]["epoch"] == 1.0
    held_out_share = sum(e["rows_held_out"] for e in ledger) / sum(e["rows_kept"] for e in ledger)
    of_epoch = first_epoch[-1]["num_tokens"] / sum(entry["tokens"] for entry in ledger)
    assert held_out_share == pytest.approx(0.2, abs=0.02)
    assert of_epoch == pytest.approx(1 - held_out_share, abs=0.05)
    growth = [
        after["num_tokens"] - before["num_tokens"] for before, after in zip(lines, lines[1:], strict=False)
    ]
    assert all(0 < tokens <= 4 * 96 for tokens in growth)


def test_samples_say_what_was_asked_and_whether_the_answer_stopped(run_dir: Path) -> None:
    samples = [json.loads(line) for line in (run_dir / "sft" / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 0, 0, 3, 3, 3, 6, 6, 6, 8, 8, 8]
    assert samples[0]["prompt"] == samples[3]["prompt"]
    for sample in samples:
        assert sample["prompt"].endswith("<|im_start|>assistant\n")
        assert not sample["stopped"] or "<|im_end|>" not in sample["completion"]
    rates = [line["eval/stop_rate"] for line in evaluation_lines(run_dir)]
    assert rates == [sum(x["stopped"] for x in samples[i : i + 3]) / 3 for i in (0, 3, 6, 9)]


def test_the_artifact_verifies_and_tells_how_it_was_made(run_dir: Path) -> None:
    manifest = verify(run_dir / "sft" / "export")
    assert (manifest.kind, manifest.role) == ("artifact", Role.policy)
    details = manifest.details
    last = {**training_lines(run_dir)[-1], **evaluation_lines(run_dir)[-1]}
    assert details["progress"]["step"] == 8 and details["progress"]["applied"] == 8
    assert details["progress"]["num_tokens"] == last["num_tokens"]
    assert details["metrics"]["eval/loss"] == last["eval/loss"]
    assert details["metrics"]["loss"] == last["loss"]
    assert (
        set(details["data"]) == {"train", "held_out", "rows_sha256"} and None not in details["data"].values()
    )
    assert details["dtype"] == "float32" and details["parents"] == []


def test_the_artifact_stops_where_the_template_ends_turns(run_dir: Path) -> None:
    from transformers import AutoTokenizer

    export = run_dir / "sft" / "export"
    tokenizer = AutoTokenizer.from_pretrained(export)
    generation = json.loads((export / "generation_config.json").read_text())
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in generation["eos_token_id"]
    assert generation["pad_token_id"] == tokenizer.pad_token_id not in generation["eos_token_id"]
    assert verify(export).details["terminators"] == [end]


def test_the_same_command_after_the_end_changes_no_bit_of_the_artifact(run_dir: Path) -> None:
    before = verify(run_dir / "sft" / "export").files
    metrics = (run_dir / "sft" / "metrics.jsonl").read_text()
    finish(run_dir, 1)
    assert verify(run_dir / "sft" / "export").files == before
    assert (run_dir / "sft" / "metrics.jsonl").read_text() == metrics
    assert not list(run_dir.glob("sft/export*old*"))


def test_a_run_that_goes_on_from_an_artifact_names_it_as_its_parent(
    base: Base, run_dir: Path, tmp_path: Path
) -> None:
    first, job = tmp_path / "first", golden.golden_job(base)
    shutil.copytree(run_dir / "sft" / "export", first)
    job.model.config, job.model.tokenizer.path, job.model.path = {}, None, str(first)
    job.sft.train.max_steps, job.sft.sampling.num_prompts = 1, 0
    second = verify(base.run("second", job) / "sft" / "export")
    assert second.details["parents"] == [
        {"role": "policy", "path": str(first), "manifest_sha256": file_sha256(first / "manifest.json")}
    ]
    (first / "config.json").write_text("{}")
    run_dir = base.write("third", job)
    assert f"error: model.path={first}: does not match its manifest" in finish(run_dir, 1, code=2)


def test_the_card_tells_of_the_training_and_of_no_folder_of_this_machine(
    base: Base, job: SFTJob, run_dir: Path
) -> None:
    card = (run_dir / "sft" / "export" / "README.md").read_text()
    assert str(base.folder) not in card and job.run_name not in card.split("---\n")[2]
    ledger = json.loads((run_dir / "sft" / "ledger.json").read_text())
    for source in ledger["sources"]:
        assert f"| {source['name']} | {source['rows_read']} | {source['rows_kept']} |" in card
    first, last = (evaluation_lines(run_dir)[at]["eval/loss"] for at in (0, -1))
    assert f"| `eval/loss` | {first:.4g} | {last:.4g} |" in card
    assert f"| `sft.optim.lr` | {job.sft.optim.lr:g} |" in card and "Step 8 of 8, " in card
