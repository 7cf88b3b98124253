"""Draws who came from whom: artifacts in, coordinates for one inline SVG out.

One row per artifact from top to bottom, parents above what was made from them, and a curve for each parent.
Artifacts from outside of the run come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.report import shown
from pipeline.report.files import Node

ROW = 46
TOP = 22
DOT = 44
"""Where dots lie; curves bulge to the left of it."""


@dataclass(frozen=True)
class Row:
    """One artifact: a dot and two lines of text."""

    y: int
    name: str
    detail: str
    full: str
    is_outside: bool


@dataclass(frozen=True)
class Tree:
    """The drawing."""

    rows: list[Row]
    curves: list[str]
    height: int
    description: str


def draw(nodes: Sequence[Node]) -> Tree:
    """Lay out the artifacts of a run."""
    places: dict[str, int] = {}  # index of the row by path
    rows: list[Row] = []
    inside = {node.path for node in nodes}
    for node in nodes:
        for role, path, sha256 in node.parents:
            if path not in inside and path not in places:
                places[path] = len(rows)
                rows.append(_row(len(rows), "given", role, path, sha256, is_outside=True))
    for node in nodes:
        places[node.path] = len(rows)
        rows.append(_row(len(rows), node.step, node.role, node.path, node.sha256, is_outside=False))
    edges = [(node.path, role, path) for node in nodes for role, path, _ in node.parents]
    curves = [_curve(rows[places[path]].y, rows[places[child]].y) for child, _, path in edges]
    said = [
        f"{node.path} was made from {the}"
        for node in nodes
        for the in [f"the {role} {path}" for role, path, _ in node.parents] or ["no other artifact"]
    ]
    return Tree(rows, curves, TOP + ROW * len(rows), "; ".join(said))


def _row(index: int, step: str, role: str, path: str, sha256: str, *, is_outside: bool) -> Row:
    place = path if len(path) <= 34 else "…" + path[-33:]
    detail = f"{shown.short_hash(sha256)}  {place}"
    return Row(TOP + ROW * index, f"{step}: {role.replace('_', ' ')}", detail, f"{path} {sha256}", is_outside)


def _curve(begin: int, end: int) -> str:
    """From a parent's dot to its child's: straight to the next row, else in a bow to the left."""
    rows = abs(end - begin) // ROW
    if rows <= 1:
        return f"M{DOT} {begin}L{DOT} {end}"
    out = DOT - min(14 * rows, 40)
    return f"M{DOT} {begin}C{out} {begin} {out} {end} {DOT} {end}"
