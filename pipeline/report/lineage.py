"""Draws who came from whom: artifacts in, coordinates for one inline SVG out.

One row per artifact from top to bottom, parents above what was made from them, and a curve for each parent.
Artifacts from outside of the run come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    inside = {node.path for node in nodes}
    parents = {path: ("given", role, path, sha256) for node in nodes for role, path, sha256 in node.parents}
    found = [parent for path, parent in parents.items() if path not in inside]
    outside = len(found)
    found += [(node.step, node.role, node.path, node.sha256) for node in nodes]
    rows = []
    for index, (step, role, path, sha256) in enumerate(found):
        place = path if len(path) <= 34 else "…" + path[-33:]
        name, detail = f"{step}: {role.replace('_', ' ')}", f"{sha256[:12]}  {place}"
        rows.append(Row(TOP + ROW * index, name, detail, f"{path} {sha256}", index < outside))
    y = {path: row.y for (_, _, path, _), row in zip(found, rows, strict=True)}
    curves = [_curve(y[path], y[node.path]) for node in nodes for _, path, _ in node.parents]
    said = [
        f"{node.path} was made from {the}"
        for node in nodes
        for the in [f"the {role} {path}" for role, path, _ in node.parents] or ["no other artifact"]
    ]
    return Tree(rows, curves, TOP + ROW * len(rows), "; ".join(said))


def _curve(begin: int, end: int) -> str:
    """From a parent's dot to its child's: straight to the next row, else in a bow to the left."""
    rows = abs(end - begin) // ROW
    if rows <= 1:
        return f"M{DOT} {begin}L{DOT} {end}"
    out = DOT - min(14 * rows, 40)
    return f"M{DOT} {begin}C{out} {begin} {out} {end} {DOT} {end}"
