"""The report in a real browser: nothing is fetched, nothing complains, and a reader sees the curves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.report import page, report
from tests.browser import HOW_TO_GET_ONE, Browser, find
from tests.pipeline.report_runs import make_run, write_state
from tests.pipeline.test_report import NASTY

pytestmark = pytest.mark.skipif(find() is None, reason=HOW_TO_GET_ONE)

PHONE = 360

CURVES = """
[...document.querySelectorAll('figure.curve svg.chart')].map(svg => {
  const frame = svg.getBoundingClientRect(), box = svg.viewBox.baseVal;
  const drawn = [...svg.querySelectorAll('path.line, path.faint, path.band, circle')];
  const marks = drawn.map(mark => {
    const b = mark.getBBox(), style = getComputedStyle(mark);
    const ink = mark.classList.contains('line') ? style.stroke : style.fill;
    const across = b.x >= box.x && b.x + b.width <= box.width;
    return {inside: across && b.y >= box.y && b.y + b.height <= box.height,
            ink: mark.classList.contains('faint') ? 'thin' : ink,
            length: mark.getTotalLength()};
  });
  const page = document.documentElement.clientWidth + 0.5;
  const texts = [...svg.querySelectorAll(':scope > text')].map(text => text.getBoundingClientRect());
  return {title: svg.querySelector('title').textContent, visible: svg.checkVisibility(),
          width: frame.width, height: frame.height, marks: marks,
          clipped: texts.filter(t => t.left < 0 || t.right > page).length,
          described: svg.querySelector('desc').textContent.length};
})
"""

# WCAG 2: relative luminance, and the contrast of every text with what lies behind it
CONTRASTS = """
(() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const linear = v => v <= 0.03928 * 255 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const c = rgb(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c.slice(0, 3);
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !element.checkVisibility() || ['TITLE', 'desc', 'title'].includes(element.tagName)) continue;
    const style = getComputedStyle(element), isSvg = element.namespaceURI.endsWith('svg');
    const a = light(rgb(isSvg ? style.fill : style.color)), b = light(behind(element));
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), element.textContent.trim().slice(0, 40)]);
  }
  return found.sort((x, y) => x[0] - y[0]);
})()
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find()
    assert program is not None
    with Browser(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = make_run(tmp_path_factory.mktemp("runs") / "demo", asked=[f"{NASTY} {n}" for n in range(40)])
    return report(run).as_uri()


def test_nothing_is_fetched_and_nothing_complains(browser: Browser, url: str) -> None:
    browser.look(1100)
    browser.open(url)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate("document.title") == "demo: report of a run"
    assert browser.requests() == [url]
    assert browser.complaints() == []


def test_the_browser_would_have_noticed(browser: Browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text("<img src=missing.png><script>console.error('said'); undefined_name()</script>")
    browser.open(bad.as_uri())
    assert any(request.endswith("missing.png") for request in browser.requests())
    said = " ".join(browser.complaints())
    assert "said" in said and "undefined_name" in said


@pytest.mark.parametrize("width", [PHONE, 1100])
def test_every_curve_is_there_and_inside_its_frame(browser: Browser, url: str, width: int) -> None:
    browser.look(width, phone=width == PHONE)
    browser.open(url)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = browser.evaluate(CURVES)
    titles = [curve["title"] for curve in found]
    assert len(found) > 30 and {"Loss", "Gold score, held out", "KL of the roll-outs"} <= set(titles)
    for curve in found:
        assert curve["visible"] and curve["width"] > 200 and curve["height"] > 100, curve
        assert curve["marks"] and all(mark["inside"] for mark in curve["marks"]), curve
        assert any(mark["length"] > 10 for mark in curve["marks"]), curve
        assert all(mark["ink"] not in ("none", "rgba(0, 0, 0, 0)") for mark in curve["marks"]), curve
        assert curve["clipped"] == 0 and curve["described"] > 20, curve


@pytest.mark.parametrize("opened", [False, True])
def test_a_phone_shows_it_without_scrolling_sideways(browser: Browser, url: str, opened: bool) -> None:
    browser.look(PHONE, phone=True)
    browser.open(url)
    if opened:
        browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    scrolls, shows = browser.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert (scrolls, shows) == (PHONE, PHONE)
    assert browser.evaluate("parseFloat(getComputedStyle(document.body).fontSize)") >= 15
    smallest = browser.evaluate(
        "Math.min(...[...document.querySelectorAll('svg.chart > text')]"
        ".map(text => text.getBoundingClientRect().height))"
    )
    assert smallest >= 10


HOVER = """
(() => {
  const svg = [...document.querySelectorAll('svg.chart')].find(
    s => s.querySelector('title').textContent === 'Loss');
  svg.scrollIntoView({behavior: 'instant', block: 'center'});
  const r = svg.getBoundingClientRect();
  return [r.x + r.width / 2, r.y + r.height / 2];
})()
"""
TIPS = """
[...document.querySelectorAll('.at > g')].filter(g => getComputedStyle(g).display !== 'none').map(
  g => [...g.querySelectorAll('tspan')].map(t => t.textContent))
"""


def test_a_pointer_over_a_curve_is_shown_the_values_there(browser: Browser, url: str) -> None:
    browser.look(1100)
    browser.open(url)
    assert browser.evaluate(TIPS) == []
    browser.point(*browser.evaluate(HOVER))
    ((step, *values),) = browser.evaluate(TIPS)
    assert re.fullmatch(r"step \d+", step)
    assert [re.fullmatch(r"(training|held out) [\d.]+", value) is not None for value in values] == [True]


def test_several_runs_fit_a_window_and_a_phone(browser: Browser, tmp_path: Path) -> None:
    names = ["short", "a-run-with-a-name-that-is-far-too-long-for-any-table-" + "x" * 60]
    names += [f"sft-mixture-of-many-sources-{number}" for number in range(6)]
    steps = [("sft", "reward", "ppo"), ("sft", "dpo"), *[("sft",)] * 6]
    runs = [
        make_run(tmp_path / name, which, iterations=6, count=8)
        for name, which in zip(names, steps, strict=True)
    ]
    write_state(runs[3] / "sft", "failed", exit_status=1)
    url = report(*runs).as_uri()
    for width in (PHONE, 1100):
        browser.look(width, phone=width == PHONE)
        browser.open(url)
        browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert browser.evaluate("document.documentElement.scrollWidth") == width
        assert browser.complaints() == [] and browser.requests() == [url]
    found = browser.evaluate(CURVES)
    assert all(curve["clipped"] == 0 and all(m["inside"] for m in curve["marks"]) for curve in found)
    assert [found for found in browser.evaluate(CONTRASTS) if found[0] < 4.5] == []


def test_a_page_of_a_run_that_goes_on_loads_itself_anew(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "RELOAD_SECONDS", 1)
    run = make_run(tmp_path / "run", ("sft",))
    write_state(run / "sft", "running")
    url = report(run).as_uri()
    browser.open(url)
    assert "going on" in browser.evaluate("document.body.textContent")
    write_state(run / "sft")
    report(run)
    browser.wait_for_load()
    assert "going on" not in browser.evaluate("document.body.textContent")


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_what_lies_behind_it(browser: Browser, url: str, dark: bool) -> None:
    browser.look(1100, dark=dark)
    browser.open(url)
    background, ink = browser.evaluate(
        "['backgroundColor', 'color'].map(k => getComputedStyle(document.body)[k].match(/\\d+/g).map(Number))"
    )
    assert (max(background) < 40 and min(ink) > 200) if dark else (min(background) > 240 and max(ink) < 60)
    contrasts = browser.evaluate(CONTRASTS)
    assert len(contrasts) > 300
    assert [found for found in contrasts if found[0] < 4.5] == []  # WCAG 2, level AA


def test_its_parts_have_names_and_an_order(browser: Browser, url: str) -> None:
    browser.open(url)
    assert browser.evaluate("document.documentElement.lang") == "en"
    levels = browser.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(h => Number(h.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in zip(levels, levels[1:], strict=False))
    assert browser.evaluate("document.querySelectorAll('table').length") > 3
    assert browser.evaluate(
        "[...document.querySelectorAll('table')].every(t => t.querySelector('thead th[scope]'))"
    )
    assert browser.evaluate(
        "[...document.querySelectorAll('svg')].every(s => s.getAttribute('aria-hidden') || "
        "s.closest('[aria-hidden]') || (s.getAttribute('role') === 'img' && s.querySelector('title, desc')))"
    )


def test_what_a_run_says_runs_nothing(browser: Browser, url: str) -> None:
    browser.open(url)
    assert browser.evaluate("document.querySelectorAll('script, img, [onerror], [onload]').length") == 0
    shown = browser.evaluate("document.querySelector('.pair .prompt').textContent")
    assert shown == f"{NASTY} 0"
