"""The report is made from whatever is in a run's folder, and says what it could not read."""

from __future__ import annotations

import json
import random
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from common.errors import UserError
from pipeline import state
from pipeline.compose import compose, prepare
from pipeline.config import PROJECT
from pipeline.report import report
from pipeline.report.comparison import over_time
from pipeline.report.files import SampleRow, ledger_row, read_run
from pipeline.report.glance import at_a_glance
from pipeline.report.reproduce import command_for, decisive
from pipeline.state import write_resolved
from tests.pipeline.report_runs import make_run, ppo_files, write_json, write_lines, write_state

NASTY = "</script><img src=x onerror=alert(1)>&amp;<svg onload=alert(2)>\"'`{{ 7 * 7 }}{% raw %}"


class Page(HTMLParser):
    """Tags, ids and visible text of a page; unclosed or wrongly closed tags are errors."""

    VOID = {"meta", "link", "br", "img", "path", "circle", "rect"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.attributes: set[str] = set()
        self.open: list[str] = []
        self.said: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        values = {name: value or "" for name, value in attrs}
        self.ids += [values["id"]] if "id" in values else []
        self.references += values.get("aria-labelledby", "").split()
        self.references += [values["href"][1:]] if values.get("href", "").startswith("#") else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.said.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.said))


def page(run: Path) -> Page:
    path = report(run)
    assert path == run / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_holds_the_whole_chain(tmp_path: Path) -> None:
    found = page(make_run(tmp_path / "demo"))
    assert [tag for tag in found.tags if tag == "h1"] == ["h1"]
    for said in ("Gold score rose from", "97.2% of 211 held-out pairs", "Responses that stop", "KL from the"):
        assert said in found.text
    assert found.tags.count("figure") > 30
    assert "script" not in found.tags and "img" not in found.tags
    assert len(found.ids) == len(set(found.ids))
    assert set(found.references) <= set(found.ids) and len(found.references) > 60


def test_nothing_that_a_page_shows_is_taken_for_markup(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", name=NASTY, asked=[NASTY + str(index) for index in range(5)])
    config = json.loads((run / "resolved.yaml").read_text())
    config["sft"]["data"]["sources"][0]["path"] = NASTY
    config["ppo"]["evaluation"]["functions"][NASTY] = NASTY
    (run / "resolved.yaml").write_text(json.dumps(config))
    rows = [{"step": s, "prompt": NASTY, "completion": NASTY, "scores": {NASTY: 1}} for s in (0, 40)]
    write_lines(run / "reward" / "samples.jsonl", rows)
    write_lines(run / "reward" / "metrics.jsonl", [{"step": 1, NASTY: 1.0, f"eval/{NASTY}": "NaN"}])
    with (run / "ppo" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 40, f"eval/{NASTY}": 0.5}) + "\n")
    ledger = json.loads((run / "sft" / "ledger.json").read_text())
    ledger["sources"][0] |= {"name": NASTY, "dropped": {NASTY: {"count": 1, "places": [NASTY]}}}
    write_json(run / "sft" / "ledger.json", ledger)
    lineage = json.loads((run / "lineage.json").read_text())
    lineage["artifacts"]["sft"]["path"] = lineage["artifacts"]["sft"]["parents"] = NASTY
    lineage["artifacts"]["reward"]["parents"] = [{"role": NASTY, "path": NASTY, "manifest_sha256": NASTY}]
    write_json(run / "lineage.json", lineage)
    write_state(run / "sft", status=NASTY)
    (run / "sft" / "logs").mkdir()
    (run / "sft" / "logs" / "rank_0.log").write_text(f"2026-11-21 13:18:14,572 WARNING rlhf.x: {NASTY}\n")

    found = page(run)
    assert "script" not in found.tags and "img" not in found.tags
    assert not [name for name in found.attributes if name.startswith("on")]
    assert found.text.count(NASTY) > 20


def test_a_run_that_goes_on_has_a_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", steps=("sft", "ppo"))
    write_state(run / "ppo", status="running")
    metrics = (run / "ppo" / "metrics.jsonl").read_text()
    (run / "ppo" / "metrics.jsonl").write_text(metrics[: len(metrics) // 2])  # in the middle of a line
    (run / "ppo" / "samples.jsonl").unlink()
    found = page(run)
    assert "going on" in found.text and "numbers so far" in found.text
    assert "could not be read" not in found.text


def test_a_run_whose_process_died_is_not_called_going_on(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", steps=("sft",))
    write_state(run / "sft", status="running")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (run / ".lock").write_text(f"host {state.socket.gethostname()}, process {gone.pid}")
    assert "interrupted" in page(run).text


@pytest.mark.parametrize(
    "steps", [("sft",), ("reward",), ("dpo",), ("sft", "dpo"), ("ppo",), ("sft", "reward")]
)
def test_every_subset_of_the_steps_has_a_report(tmp_path: Path, steps: tuple[str, ...]) -> None:
    found = page(make_run(tmp_path / "run", steps=steps))
    for step in steps:
        assert step in found.ids
    assert "Nothing has been evaluated yet" not in found.text


def test_a_run_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "resolved.yaml").write_text("steps: [sft, reward]\nrun_name: new\n")
    found = page(tmp_path)
    assert found.text.count("not started") == 4  # in the list of steps, and in each section
    assert "Nothing has been evaluated yet" in found.text


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo")
    (run / "sft" / "state.json").write_text("{")
    (run / "sft" / "ledger.json").write_bytes(b"\xff\xfe\x00")
    (run / "lineage.json").write_text("[]")
    (run / "resolved.yaml").write_text("steps: [sft\n  - : {")
    lines = (run / "sft" / "metrics.jsonl").read_text().splitlines()
    lines[3] = '{"step": 4, "loss": '
    lines[7] = '{"loss": 1.0}'
    (run / "sft" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (run / "reward" / "metrics.jsonl").unlink()
    (run / "reward" / "metrics.jsonl").mkdir()
    found = page(run)
    for file in (
        "sft/state.json",
        "sft/ledger.json",
        "lineage.json",
        "resolved.yaml",
        "reward/metrics.jsonl",
    ):
        assert re.search(rf"{file} (holds|is no|cannot)", found.text), file
    assert "2 lines that are no JSON object with a step, left out: line 4, 8" in found.text
    assert "Gold score" in found.text  # what can be read is there


def test_a_step_that_is_done_and_has_no_numbers_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "a", ("sft",))
    assert read_run(run).problems == []
    (run / "sft" / "metrics.jsonl").write_text("")
    assert read_run(run).problems == [("sft/metrics.jsonl", "holds no numbers, although the step is done")]
    write_state(run / "sft", "running")  # then they may still come
    assert read_run(run).problems == []


@pytest.mark.slow
def test_no_damage_makes_the_report_fail(tmp_path: Path) -> None:
    draw = random.Random(0)
    whole = make_run(tmp_path / "whole", iterations=6, count=6)
    files = [
        p.relative_to(whole) for p in sorted(whole.rglob("*")) if p.suffix in (".json", ".jsonl", ".yaml")
    ]
    assert len(files) > 12
    junk = [
        "null",
        "[]",
        "-1",
        "1e999",
        '"x"',
        "{}",
        "true",
        '[{"a": []}]',
        "[" * 3000,
        '"\\ud800"',
        "9" * 400,
    ]
    for attempt in range(12):
        run = make_run(tmp_path / str(attempt), iterations=6, count=6)
        for file in draw.sample(files, 8):
            content = (run / file).read_text()
            values = list(re.finditer(r'(?<=: )("[^"]*"|[\d.]+|\[\]|\{\})', content))
            for value in sorted(draw.sample(values, min(3, len(values))), key=lambda m: -m.start()):
                content = content[: value.start()] + draw.choice(junk) + content[value.end() :]
            data = bytearray(content.encode())
            if draw.random() < 0.3 and data:
                data[draw.randrange(len(data))] = draw.randrange(256)
            if draw.random() < 0.2:
                del data[draw.randrange(len(data) + 1) :]
            (run / file).write_bytes(bytes(data))
        page(run)


def test_a_folder_that_is_no_run_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        report(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match="it holds notes.txt"):
        report(tmp_path)
    run = make_run(tmp_path / "demo", steps=("sft",))
    with pytest.raises(UserError) as inside:
        report(run / "sft" / "export")
    assert str(run) in str(inside.value.hint)
    with pytest.raises(UserError) as above:
        report(tmp_path)
    assert str(run) in str(above.value.hint)
    assert not list(tmp_path.glob("report.html"))


def test_before_and_after_are_the_first_and_the_last_evaluation(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", steps=("ppo",))
    rows = [json.loads(line) for line in (run / "ppo" / "samples.jsonl").read_text().splitlines()]
    gold = {m.mode: m for m in at_a_glance(read_run(run)).table if m.name == "gold"}
    assert set(gold) == {"sampled", "greedy"}
    for mode, measure in gold.items():
        for step, estimate in ((0, measure.before), (40, measure.after)):
            scores = [r["scores"]["gold"] for r in rows if r["mode"] == mode and r["step"] == step]
            assert estimate is not None
            assert estimate.value == pytest.approx(sum(scores) / len(scores))
            assert estimate.count == 211 and estimate.low < estimate.value < estimate.high
    assert gold["sampled"].after.value != gold["greedy"].after.value


def test_a_change_within_its_interval_is_not_called_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", steps=("ppo",), count=60)
    (correct,) = [s for s in at_a_glance(read_run(run)).sentences if s.startswith("Correct answers")]
    assert correct.startswith("Correct answers did not measurably change on 60 held-out prompts")


def test_a_reward_that_rises_while_gold_falls_is_called_what_it_is(tmp_path: Path) -> None:
    hacked = at_a_glance(read_run(make_run(tmp_path / "hacked", steps=("ppo",), gold=(0.9, 0.2))))
    assert len(hacked.cautions) == 1 and "fell" in hacked.sentences[0]
    honest = at_a_glance(read_run(make_run(tmp_path / "honest", steps=("ppo",))))
    assert honest.cautions == [] and "rose" in honest.sentences[0]


def test_the_accuracy_of_a_reward_model_has_its_interval_from_the_pairs(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", steps=("reward",))
    (accuracy,) = [m for m in at_a_glance(read_run(run)).cards if m.name == "accuracy"]
    assert accuracy.over_text == "211 held-out pairs"
    assert (accuracy.text(accuracy.after.value), accuracy.interval(accuracy.after)) == (
        "97.2%",
        "93.9 to 98.7%",
    )
    (run / "reward" / "export" / "manifest.json").unlink()  # going on: the ledger counts them as well
    (again,) = [m for m in at_a_glance(read_run(run)).cards if m.name == "accuracy"]
    assert again == accuracy


def test_samples_are_shown_in_the_order_of_the_file_beside_each_other() -> None:
    def rows(*scores: float) -> list[SampleRow]:
        made = [SampleRow(f"p{i}", f"r{s}", "sampled", reward=s) for i, s in enumerate(scores)]
        return [*made, SampleRow("p0", "greedy one", "greedy", reward=9.0)]

    found = over_time("ppo", {0: rows(1.0, 2.0, 3.0), 40: rows(5.0, 1.0, 0.0)})
    assert found is not None and [side.at for side in found.sides] == [0, 40]
    shown = [(row.prompt, *(side and side.completion for side in row.sides)) for row in found.prompts]
    assert shown == [("p0", "r1.0", "r5.0"), ("p1", "r2.0", "r1.0"), ("p2", "r3.0", "r0.0")]
    assert [row.prompt for row in found.extremes] == ["p2", "p1"]


def test_only_the_first_and_the_last_evaluation_are_kept_of_many(tmp_path: Path) -> None:
    make_run(tmp_path, steps=("ppo",))
    rows = [{"step": step, "prompt": "p", "completion": str(step)} for step in (0, 10, 20, 30, 40)]
    write_lines(tmp_path / "ppo" / "samples.jsonl", rows)
    samples = read_run(tmp_path).steps[0].samples
    assert {step: [s.completion for s in rows] for step, rows in samples.items()} == {0: ["0"], 40: ["40"]}


def test_the_command_to_reproduce_composes_to_the_recorded_configuration(tmp_path: Path) -> None:
    typed = ["experiment=demo", "steps=[sft,reward]", "sft.train.max_steps=60", "model.config.hidden_size=64"]
    typed += ["sft.data.path='a b, {c}.jsonl'", f"output_dir={tmp_path}", "run_name=first"]
    config = compose(prepare(typed).overrides)
    path = write_resolved(config, tmp_path)
    command = command_for(path.read_text(), "second")
    assert command.startswith("python -m pipeline run experiment=demo 'steps=[sft,reward]'")
    words = shlex.split(command)[4:]
    assert not [word for word in words if word.startswith("output_dir")]
    assert len(words) < 10  # what was typed, not every setting there is
    again = compose(prepare(words).overrides)
    assert decisive(state.to_plain(again)) == decisive(state.to_plain(config))
    assert again.run_name == "second"


def test_a_configuration_that_cannot_be_composed_gives_no_command() -> None:
    assert command_for("steps: [sft]\nnonsense: 1\n", "x") == ""
    assert command_for("[", "x") == ""


def test_warnings_of_the_pipeline_are_shown_without_credentials(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", steps=("sft",))
    (run / "sft" / "logs").mkdir()
    (run / "sft" / "logs" / "rank_0.log").write_text(
        "2026-11-21 13:18:14,572 INFO rlhf.data: fine\n"
        "2026-11-21 13:18:15,001 WARNING rlhf.ppo: KL 61 nats per response: raise ppo.kl.coef\n"
        "  or lower ppo.optim.lr\n"
        "2026-11-21 13:18:15,002 WARNING py.warnings: of a library\n"
        "2026-11-21 13:18:16,003 ERROR rlhf: no access with hf_abcdefghijklmnopqrstuvwxyz012345\n"
    )
    found = page(run)
    assert "KL 61 nats per response: raise ppo.kl.coef or lower ppo.optim.lr" in found.text
    assert "of a library" not in found.text and "hf_abc" not in found.text


def test_the_page_is_replaced_as_a_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", steps=("sft",))
    (run / "report.html").write_text("old")
    before = (run / "report.html").stat().st_ino
    report(run)
    assert (run / "report.html").stat().st_ino != before
    assert [path.name for path in run.iterdir() if path.name.endswith(".tmp")] == []


def test_making_a_report_imports_nothing_heavy(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", iterations=4, count=4)
    write_resolved(compose(prepare(["experiment=demo"]).overrides), run)
    program = (
        "import sys; from pathlib import Path; from pipeline.report import report; report(Path(sys.argv[1]));"
        "print([m for m in ('torch', 'transformers', 'deepspeed', 'wandb', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(run)], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_long_text_is_folded_away_and_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", steps=("ppo",))
    text = "first line\n\n  indented\t" + "word " * 400 + "the end"
    ppo_files(run / "ppo", asked=[text])
    report(run)
    html = (run / "report.html").read_text()
    assert '<details class="long prompt">' in html and f'dir="auto">{text}</div>' in html


def test_rows_that_were_split_and_turns_that_are_not_trained_are_listed() -> None:
    found = {"count": 2, "places": ["rows.jsonl:1"]}
    row = ledger_row(
        {"name": "rows", "dropped": {}, "untrained": {"no place": found}, "split": {"history": found}}
    )
    assert row.dropped == [
        ("not trained: no place", 2, ["rows.jsonl:1"]),
        ("split: history", 2, ["rows.jsonl:1"]),
    ]
    assert row.lost == 0
