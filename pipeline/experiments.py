"""What an experiment's file says, and what of it is left out where the user names rows of his own.

Takes overrides; returns further ones as Hydra takes them, and what the user should be told. Held-out rows,
functions and demonstrations of an experiment belong to its own rows: beside others they would measure or
train something else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import DataConfig
from pipeline import schema
from pipeline.config import CONF

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

OF_THE_DEMO = "demo."
"""Begins the functions that read columns which only the demo's rows have."""


def content(file: Path) -> dict[str, Any]:
    """A file of `conf/`, as it is written; empty when it is not there."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where it was compiled
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return yaml.load(text, Loader=loader) or {}  # noqa: S506 - a safe loader, see above


def of_other_rows(overrides: Sequence[Override]) -> tuple[list[str], list[str]]:
    """Overrides that leave out what belongs to an experiment's own rows, and a note for each data set."""
    keys = {_key(override) for override in overrides}
    name = {override.key_or_group: override.value() for override in overrides}.get("experiment")
    if not isinstance(name, str):
        return [], []
    left_out: list[str] = []
    notes: list[str] = []
    for place in schema.keys_of_type(DataConfig):
        own = [key for key in (f"{place}.path", f"{place}.sources", f"data@{place}") if key in keys]
        found = dict(_beside(name, place, keys)) if own else {}
        if found:
            left_out += found.values()
            notes.append(f"{own[0]} is yours: {', '.join(found)} of experiment={name} is left out")
    return [text for override in left_out for text in override.split()], notes


def _beside(name: str, place: str, keys: Iterable[str]) -> Iterable[tuple[str, str]]:
    """What the experiment sets beside the rows of a place, and the overrides without it."""

    def is_typed(*typed: str) -> bool:
        return any(key == one or key.startswith(f"{one}.") for key in keys for one in typed)

    if _said(name, f"{place}.eval_path") and not is_typed(f"{place}.eval_path"):
        yield f"{place}.eval_path", f"{place}.eval_path=null {place}.eval_split=null"
    if place != "ppo.data":
        return
    functions = _said(name, "ppo.evaluation.functions") or {}
    theirs = [one for one, reference in functions.items() if reference.startswith(OF_THE_DEMO)]
    if theirs and not is_typed("ppo.evaluation.functions"):
        yield (
            f"ppo.evaluation.functions ({', '.join(theirs)})",
            " ".join(f"~ppo.evaluation.functions.{one}" for one in theirs),
        )
    if _said(name, "ppo.ptx_data.sources") and not is_typed("ppo.ptx_data", "ppo.ptx_weight"):
        yield "ppo.ptx_data", "ppo.ptx_weight=0 ppo.ptx_data.sources=[]"


def _said(name: str, key: str) -> Any:
    """What an experiment, or one that it begins with, sets for a key; None where it does not."""
    file = content(CONF / "experiment" / f"{name}.yaml")
    found: Any = file
    for part in key.split("."):
        found = (found or {}).get(part)
    bases = [base for base in file.get("defaults") or [] if isinstance(base, str) and base != "_self_"]
    return found if found is not None else next(filter(None, (_said(base, key) for base in bases)), None)


def _key(override: Override) -> str:
    package = override.package
    return override.key_or_group.lstrip("/") + (f"@{package}" if package is not None else "")
