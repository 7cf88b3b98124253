"""docs/coming-from/: every key in its tables is in the schema, and every choice of a group is a file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from common.stage import Step
from pipeline.config import CONF
from pipeline.habits import MEANT, meant
from pipeline.schema import walk

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs" / "coming-from").glob("*.md"))
KEYS = {key for key, _, _ in walk()}
GROUPS = {folder.name for folder in CONF.iterdir() if folder.is_dir()}
TOP = {key.partition(".")[0] for key in KEYS} | {"experiment"}


def cells(page: Path, column: int) -> list[list[str]]:
    """What stands as code in a column of the page's tables, row by row, without the head."""
    rows = [line.strip("|").split("|") for line in page.read_text().splitlines() if line.startswith("|")]
    return [re.findall(r"`([^`]+)`", row[column]) for row in rows[2:]]


def test_there_is_a_page_for_each_system_and_all_are_in_the_navigation() -> None:
    assert [page.stem for page in PAGES] == [
        "axolotl", "deepspeed_chat", "engineers_handbook", "index", "llama_factory", "open_instruct",
        "open_r1", "openrlhf", "trl",
    ]  # fmt: skip
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert all(f"coming-from/{page.name}" in navigation for page in PAGES)


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "index"], ids=lambda page: page.stem)
def test_every_key_beside_a_flag_of_theirs_is_in_the_schema(page: Path) -> None:
    named = [key for row in cells(page, 1) for key in row]
    assert len(named) >= 15
    assert [key for key in named if key not in KEYS] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_other_key_and_choice_that_a_page_names_is_there(page: Path) -> None:
    theirs = {span for row in cells(page, 0) for span in row}
    for span in set(re.findall(r"`([^`\n]+)`", page.read_text())) - theirs:
        key, _, value = span.strip("'").partition("=")
        group = key.rpartition(".")[2]
        if key.partition(".")[0] not in TOP or not (value or "." in key):
            continue  # a word
        if value and group in GROUPS:  # deepspeed=zero3, sft.optim=adamw_8bit
            assert (CONF / group / f"{value}.yaml").is_file(), span
        else:
            assert key in KEYS, span


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "index"], ids=lambda page: page.stem)
def test_every_page_says_where_numbers_go_and_how_to_stop_early(page: Path) -> None:
    named = {key for row in cells(page, 1) for key in row}
    assert {"tracking.to", "sft.train.stop_when.metric", "sft.train.stop_when.patience"} <= named


def written_here(key: str) -> str:
    """A key as the pages have it, for any step: of several sources as of one."""
    return re.sub(r"^(sft|reward|dpo|ppo)\.(?=data|train|optim)", "{step}.", key.partition("=")[0]).replace(
        "sources[].path", "path"
    )


def test_names_that_are_typed_by_habit_are_those_of_the_pages_and_mean_the_same_keys() -> None:
    pages: dict[str, set[str]] = {}
    for page in PAGES:
        for theirs, ours in zip(cells(page, 0), cells(page, 1), strict=True):
            for name in theirs:
                keys = {written_here(key) for key in ours}
                keys |= {re.sub(r"\[\]\..*", "", key) for key in keys}
                pages.setdefault(name.removeprefix("--").rpartition(".")[2], set()).update(keys)
    assert sorted(MEANT.keys() - pages.keys()) == []
    assert [name for name, key in MEANT.items() if written_here(key) not in pages[name]] == []


@pytest.mark.parametrize("name", MEANT)
def test_the_key_of_a_name_that_is_typed_by_habit_exists_in_every_step_that_is_named(name: str) -> None:
    for step in Step:
        hint = str(meant(name, [step.value]))
        key = hint.removeprefix("did you mean ").partition("?")[0].partition("=")[0]
        assert key in KEYS and hint == meant(f"{step.value}.{name}")
    assert meant(f"--{name.replace('_', '-')}") == meant(name, ["sft"])
