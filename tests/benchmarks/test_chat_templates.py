"""The sweep of chat templates over rows: nothing is trained in silence that the template does not render."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import chat_templates
from benchmarks.chat_templates import (
    EXACT,
    OPENED,
    OVER,
    REFUSED,
    ROWS,
    SILENT,
    SPLIT,
    Cell,
    judge,
    tokenizer_of,
)
from common.data import chat
from common.data.outcomes import Drop, RowRecords
from common.data.types import IGNORE, TokenizedExample
from tests import field_templates

CONF = Path(__file__).parents[2] / "conf" / "chat_template"
OURS = {path.stem: path.read_text() for path in sorted(CONF.glob("*.jinja"))}


def row_of(kinds: dict[str, Cell]) -> str:
    return " ".join(kinds[row].kind for row in ROWS)


def test_every_kind_of_template_trains_what_it_renders_or_says_why_not() -> None:
    table = chat_templates.sweep({**field_templates.EVERY, **OURS})
    letters = {name: row_of(cells) for name, cells in table.items()}
    assert letters == {
        "strips reasoning": "r r r r r r r r r r r r r r o o r o",
        "drops earlier reasoning": "= s = s s = = = = = = = = = = s = s",
        "system in the last question": "= = = s = = r r r r r r r r r r r =",
        "system until answered": "= = o o = = r r r r r r r r r r r =",
        "channels": "= s = s s = r r r r r r r r = s r s",
        "text arguments": "= = = = = = r r r r r = r r r r r =",
        "parts": "= = = = = = r r r r r r r r r r r =",
        "alternating": "= = r r = = r r r r r r r r r r r =",
        "python arguments": "= = = = = = r r r r r = r r r r r =",
        "calls end apart": "= = = = = = r r r r r = r r r r r =",
        "chatml": "= = = = = = = = = = = = = = = = = =",
        "alpaca": "= = = = = = r r r r r r r r r r r =",
        "plain": "= = = = = = r r r r r r r r r r r =",
        "transcript": "= = = = = = r r r r r r r r r r r =",
        "tulu": "= = = = = = r r r r r r r r r r r =",
        "user_assistant": "= = = = = = r r r r r r r r r r r =",
        "zephyr": "= = = = = = r r r r r r r r r r r =",
    }
    assert all(cell.detail for cells in table.values() for cell in cells.values() if cell.kind == REFUSED)


def test_every_template_of_trl_trains_what_it_renders_or_says_why_not() -> None:
    templates = chat_templates.trl_templates()
    if not templates:
        pytest.skip("trl is not installed (extra: bench)")
    assert len(templates) >= 40
    table = chat_templates.sweep(templates)
    cells = [(name, row, cell) for name, of_rows in table.items() for row, cell in of_rows.items()]
    assert [found for found in cells if found[2].kind == SILENT] == []
    assert all(cell.detail for _, _, cell in cells if cell.kind not in (EXACT, OPENED))
    # its tags leave out the token that ends a call, which the template writes and the model stops at
    assert {name for name, _, cell in cells if cell.kind == OVER} <= {"diffusion_gemma_training"}
    trained = [found for found in cells if found[2].kind in (EXACT, SPLIT, OPENED)]
    assert len(trained) > len(cells) / 2


def judged_with(monkeypatch: pytest.MonkeyPatch, change: Any, row: str) -> str:
    """The letter of a cell of ChatML when what is trained is changed behind the judge's back."""
    tokenize = chat.tokenize

    def changed(conversations: Sequence[Any], tokenizer: Any) -> Any:
        return change(tokenize(conversations, tokenizer))

    monkeypatch.setattr(chat, "tokenize", changed)
    return judge(ROWS[row], tokenizer_of(OURS["chatml"])).kind


def of_records(change: Any) -> Any:
    return lambda results: [RowRecords(tuple(change(record) for record in made.records)) for made in results]


@of_records
def all_trained(record: TokenizedExample) -> TokenizedExample:
    labels = np.append(record.input_ids[1:], IGNORE).astype(np.int32)
    return TokenizedExample(record.input_ids, labels, record.source)


@of_records
def one_token_less(record: TokenizedExample) -> TokenizedExample:
    labels = record.labels.copy()
    labels[np.flatnonzero(labels != IGNORE)[0]] = IGNORE
    return TokenizedExample(record.input_ids, labels, record.source)


@of_records
def without_a_word(record: TokenizedExample) -> TokenizedExample:
    at = int(np.flatnonzero(record.labels != IGNORE)[0]) + 2
    labels = np.delete(record.labels, at - 1)
    return TokenizedExample(np.delete(record.input_ids, at), labels, record.source)


@pytest.mark.parametrize("row", ["one turn", "call", "reasoning"])
@pytest.mark.parametrize("change", [all_trained, one_token_less, without_a_word])
def test_the_sweep_sees_what_is_trained_wrongly(
    monkeypatch: pytest.MonkeyPatch, change: Any, row: str
) -> None:
    assert judged_with(monkeypatch, change, row) == SILENT


def test_the_sweep_sees_a_turn_that_is_left_out_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    @of_records
    def first_alone(record: TokenizedExample) -> TokenizedExample:
        end = int(np.flatnonzero(np.diff((record.labels != IGNORE).astype(int)) < 0)[0]) + 1
        labels = record.labels.copy()
        labels[end:] = IGNORE
        return TokenizedExample(record.input_ids, labels, record.source)

    assert judged_with(monkeypatch, first_alone, "several turns") == SILENT


def test_a_row_that_is_refused_though_the_template_writes_it_is_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(results: list[Any]) -> list[Any]:
        return [Drop("because", made.place if isinstance(made, Drop) else None) for made in results]  # type: ignore[arg-type]

    assert judged_with(monkeypatch, refused, "one turn") == OVER


def test_the_table_is_written_with_its_legend_and_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat_templates, "trl_templates", lambda: {"mine": field_templates.ALTERNATING})
    assert chat_templates.main(["--results", str(tmp_path)]) == 0
    written = (tmp_path / "chat_templates.txt").read_text()
    assert (
        written
        in f"python -m benchmarks.chat_templates   (1 templates, {len(ROWS)} rows)\n\n"
        + capsys.readouterr().out
    )
    assert "mine  = = r r = = r r r r r r r r r r r =" in written and "turns must alternate" in written


def test_no_template_at_all_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_templates, "trl_templates", dict)
    assert chat_templates.main([]) == 2
