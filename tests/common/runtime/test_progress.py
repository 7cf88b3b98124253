"""What is printed, on a terminal and in a pipe."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from common.runtime import progress
from common.runtime.performance import peak_flops
from common.runtime.progress import Progress, duration
from common.training import preview
from common.training.preview import histogram_lines, show_preview


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    yield from _console(monkeypatch, is_terminal=False)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    yield from _console(monkeypatch, is_terminal=True)


def _console(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> Iterator[io.StringIO]:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    out = io.StringIO()
    colours = "standard" if is_terminal else None
    made = Console(
        file=out, force_terminal=is_terminal, color_system=colours, width=100, soft_wrap=True, highlight=False
    )
    monkeypatch.setattr(progress, "console", lambda: made)
    yield out


def test_in_a_pipe_a_line_appears_each_tenth_and_at_the_end(pipe: io.StringIO) -> None:
    clock = Clock()
    with Progress(20, label="sft", clock=clock) as bar:
        for step in range(1, 21):
            clock.now = step * 0.5
            bar.update(step, loss=2.0 / step, tokens_per_second=12345.6, mfu=0.4123)
    printed = pipe.getvalue().splitlines()
    assert len(printed) == 10
    assert printed[0] == "sft  2/20  10%  loss 1.0000  12,346 tokens/s  MFU 41.2%  0:09 left"
    assert printed[-1] == "sft 20/20 100%  loss 0.1000  12,346 tokens/s  MFU 41.2%  0:00 left"


def test_in_a_pipe_a_slow_run_speaks_every_ten_seconds(pipe: io.StringIO) -> None:
    clock = Clock()
    bar = Progress(1000, label="sft", clock=clock)
    for step in range(1, 31):
        clock.now = float(step)
        bar.update(step, loss=1.0)
    assert [line.split()[1] for line in pipe.getvalue().splitlines()] == ["10/1000", "20/1000", "30/1000"]


def test_what_was_done_before_the_work_began_says_nothing_about_the_time_left(pipe: io.StringIO) -> None:
    clock = Clock()
    bar = Progress(100, label="sft", clock=clock)
    clock.now = 600.0  # an evaluation before the first step
    bar.restart()
    clock.now = 650.0
    bar.update(20)
    assert pipe.getvalue() == "sft  20/100  20%  3:20 left\n"


def test_the_time_left_counts_only_steps_of_this_process(pipe: io.StringIO) -> None:
    clock = Clock()
    bar = Progress(100, label="sft", done=90, clock=clock)
    clock.now = 50.0
    bar.update(95)
    assert pipe.getvalue() == "sft  95/100  95%  0:50 left\n"


def test_what_is_not_known_is_not_shown(pipe: io.StringIO) -> None:
    Progress(1, label="sft", clock=Clock()).update(1, loss=float("nan"))
    assert pipe.getvalue() == "sft 1/1 100%  loss nan  0:00 left\n"


def test_a_step_may_have_other_numbers_to_watch_than_a_loss(pipe: io.StringIO) -> None:
    numbers = {"reward": 0.5, "KL": -1e-9, "missing": None}
    Progress(1, label="ppo", clock=Clock()).update(1, numbers=numbers)
    assert pipe.getvalue() == "ppo 1/1 100%  reward 0.5000  KL 0.0000  0:00 left\n"


def test_lines_are_printed_as_they_are(pipe: io.StringIO) -> None:
    Progress(1, label="sft", clock=Clock()).log("saved [bold]runs/a[/bold] " + "x" * 200)
    assert pipe.getvalue() == "saved [bold]runs/a[/bold] " + "x" * 200 + "\n"


def test_other_ranks_are_silent(pipe: io.StringIO) -> None:
    bar = Progress(1, label="sft", enabled=False)
    bar.update(1, loss=1.0)
    bar.log("line")
    bar.close()
    assert pipe.getvalue() == ""


def test_on_a_terminal_a_line_does_not_break_the_bar(terminal: io.StringIO) -> None:
    with Progress(10, label="sft", clock=Clock()) as bar:
        bar.update(3, loss=1.5)
        bar.log("evaluated")
        bar.update(10, loss=0.5)
    printed = terminal.getvalue()
    assert "evaluated\n" in printed and "loss 0.5000" in printed and "10/10" in printed
    bar.close()


def test_durations_read_as_clocks() -> None:
    assert [duration(s) for s in (0, 59.6, 61, 3600, 36061)] == [
        "0:00",
        "1:00",
        "1:01",
        "1:00:00",
        "10:01:01",
    ]


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H200", "fp16", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2e12),
        ("NVIDIA B200", "bf16", 2250e12),
        ("NVIDIA GB200", "bf16", 2500e12),
        ("NVIDIA A10G", "bf16", None),
        ("cpu", "bf16", None),
        ("NVIDIA H100 80GB HBM3", "int8", None),
    ],
)
def test_peaks_are_those_of_the_device_and_not_of_one_that_sounds_alike(
    name: str, dtype: str, expected: float | None
) -> None:
    assert peak_flops(name, dtype) == expected


ROWS = [[("<user> 2+[2]? ", False), ("4 ✓\n", True), ("<end>", False)]]


def test_in_a_pipe_trained_text_stands_in_brackets_without_colour(pipe: io.StringIO) -> None:
    show_preview(ROWS, [3, 5], ["rows read 2", "dropped [1]"], 0.25, 8)
    printed = pipe.getvalue()
    assert "<user> 2+[2]? ⟦4 ✓\n⟧<end>\n" in printed
    assert "trained share: 25.0% of the tokens\nrows read 2\ndropped [1]\n" in printed
    assert "\x1b" not in printed


def test_on_a_terminal_trained_text_is_coloured_without_brackets(terminal: io.StringIO) -> None:
    show_preview(ROWS, [3, 5], [], 0.25, 8)
    printed = terminal.getvalue()
    assert "\x1b[1;32m4 ✓" in printed and "⟦" not in printed


def test_an_output_without_those_brackets_gets_plain_ones() -> None:
    assert preview._brackets("ascii") == ("[[", "]]")
    assert preview._brackets("utf-8") == ("⟦", "⟧")


def test_data_cannot_steer_the_terminal(pipe: io.StringIO) -> None:
    show_preview(
        [[("a\x1b[31mb\r\u202ec\n\té漢👩\u200d🔬\ud83d", True)]], [1], ["column \x1b]0;owned\x07"], 1, 8
    )
    assert "⟦a␛[31mb␍\\u202ec\n        é漢👩\u200d🔬\\ud83d⟧" in pipe.getvalue()
    progress.say("skipped rows\x9b2J.jsonl:1")
    assert pipe.getvalue().endswith("column ␛]0;owned␇\nskipped rows\\x9b2J.jsonl:1\n")


def test_long_rows_are_not_folded_in_a_pipe(pipe: io.StringIO) -> None:
    show_preview([[("x " * 200, False)]], [400], [], 0.0, 8)
    assert "x " * 200 in pipe.getvalue()


def test_the_histogram_counts_every_document_once() -> None:
    lines = histogram_lines([0, 1, 9, 10, 19, 19, 19, 99], max_length=50)
    assert lines[0] == "8 documents, 176 tokens; median 19, longest 99; max_length 50 (1 longer)"
    counts = [int(line.split()[-1]) for line in lines[1:]]
    assert counts == [3, 4, 0, 0, 0, 0, 0, 0, 0, 1]
    assert [line.count("#") for line in lines[1:]] == [30, 40, 0, 0, 0, 0, 0, 0, 0, 10]


def test_the_histogram_of_equal_and_of_no_documents() -> None:
    assert histogram_lines([], 10) == ["no documents"]
    lines = histogram_lines([1, 1], 10)
    assert [line.split()[0] for line in lines[1:]] == ["0-0", "1-1"]
    assert [line.split()[-1] for line in lines[1:]] == ["0", "2"]


def test_a_warning_is_kept_in_the_log_as_well(pipe: io.StringIO, caplog: pytest.LogCaptureFixture) -> None:
    bar = Progress(10, label="sft")
    bar.log("warning: reward 1.9, gold 0.1")
    bar.log("held out: fine")
    assert "warning: reward 1.9, gold 0.1\nheld out: fine\n" in pipe.getvalue()
    said = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    assert said == [("rlhf", "WARNING", "reward 1.9, gold 0.1")]
