"""What the account of the real chain runs, reads and holds against its bars."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import real_chain
from pipeline.compose import compose, prepare

GOOD = {
    "sft": (
        {"eval/loss": 1.5, "eval/mean_token_accuracy": 0.6},
        {"eval/loss": 1.2, "eval/mean_token_accuracy": 0.7},
    ),
    "reward": ({"eval/loss": 0.8, "eval/accuracy": 0.5}, {"eval/loss": 0.6, "eval/accuracy": 0.61}),
    "dpo": (
        {"eval/loss": 0.69, "eval/rewards/accuracies": 0.5},
        {"eval/loss": 0.68, "eval/rewards/accuracies": 0.52},
    ),
    "ppo": ({"eval/reward": 0.4, "eval/kl": 0.0}, {"eval/reward": 0.5, "eval/kl": 4.9}),
}


def write_step(
    folder: Path, step: str, *evaluations: tuple[int, dict[str, float]], held_out: int = 100
) -> Path:
    """A finished step's metrics and ledger; between evaluations a line of training."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        line
        for number, found in evaluations
        for line in ({"step": number, "loss": 1.0}, {"step": number, **found})
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ledger = {"sources": [{"rows_kept": 7 * held_out, "rows_held_out": held_out}]}
    (folder / "ledger.json").write_text(json.dumps(ledger))
    return folder


def seen(tmp_path: Path, step: str, after: dict[str, float], held_out: int = 100) -> real_chain.Seen:
    before, good = GOOD[step]
    folder = write_step(tmp_path / step, step, (0, before), (9, {**good, **after}), held_out=held_out)
    return real_chain.figures(folder, step)


def test_figures_are_those_of_the_first_and_the_last_evaluation(tmp_path: Path) -> None:
    first, last = GOOD["sft"]
    folder = write_step(tmp_path, "sft", (0, first), (5, {"eval/loss": 9.0}), (9, last))
    figures = real_chain.figures(folder, "sft")
    assert (figures["before"], figures["after"], figures["steps"]) == (first, last, 9)
    assert (figures["kept"], figures["held_out"]) == (700, 100)


def test_a_step_that_was_not_evaluated_before_training_is_refused(tmp_path: Path) -> None:
    folder = write_step(tmp_path, "dpo", (3, GOOD["dpo"][0]), (9, GOOD["dpo"][1]))
    with pytest.raises(ValueError, match="no evaluation before and after"):
        real_chain.figures(folder, "dpo")


def test_a_chain_at_its_bars_misses_none(tmp_path: Path) -> None:
    assert real_chain.missed_bars({step: seen(tmp_path, step, {}) for step in real_chain.STEPS}) == []


@pytest.mark.parametrize(
    ("step", "after", "held_out", "missed"),
    [
        ("sft", {"eval/loss": 1.5}, 100, "held-out loss falls in SFT: MISSED (0)"),
        (
            "reward",
            {"eval/accuracy": 0.6},
            100,
            "reward model orders more than 60 % of held-out pairs: MISSED (0.6)",
        ),
        ("reward", {}, 99, "at least 100 of them: MISSED (99)"),
        ("dpo", {"eval/rewards/accuracies": 0.25}, 100, "DPO's held-out accuracy rises: MISSED (-0.25)"),
        ("ppo", {"eval/reward": 0.25}, 100, "GRPO's held-out reward rises: MISSED (-0.15)"),
        ("ppo", {"eval/kl": 5.0}, 100, "KL under 5 nats a response: MISSED (5)"),
    ],
)
def test_a_bar_that_is_missed_is_named_with_its_number(
    tmp_path: Path, step: str, after: dict[str, float], held_out: int, missed: str
) -> None:
    assert real_chain.missed_bars({step: seen(tmp_path, step, after, held_out)}) == [missed]


@pytest.mark.parametrize("step", real_chain.STEPS)
def test_every_command_composes_and_says_what_the_step_learns_from(step: str, tmp_path: Path) -> None:
    given = real_chain.Given(
        tmp_path / "model", tmp_path / "g", tmp_path / "p", tmp_path, rows=7, most_pairs=9
    )
    words = real_chain.command(step, given, ["seed=5"])
    job = compose(prepare(words[words.index("run") + 1 :]).overrides)
    (source,) = getattr(job, step).data.all_sources()
    assert (source.path, source.max_rows) == {
        "sft": (str(tmp_path / "g"), 7),
        "reward": (str(tmp_path / "p"), 9),
        "dpo": (str(tmp_path / "p"), 9),
        "ppo": (str(tmp_path / "sums.jsonl"), 400),
    }[step]
    assert (job.seed, [s.value for s in job.steps]) == (5, [step])


def test_sums_are_right_and_all_different() -> None:
    rows = real_chain.sums(50)
    assert rows[0]["question"] != rows[1]["question"] and len({row["question"] for row in rows}) == 50
    for row in rows:
        a, b = row["question"].removeprefix("What is ").removesuffix("?").split(" + ")
        assert row["answer"] == f"#### {int(a) + int(b)}"
