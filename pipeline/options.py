"""Options of a verb, read with argparse: what cannot be read is a UserError that shows how it is typed."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

from common.config import DataConfig
from common.errors import UserError
from common.fields import as_schema

T = TypeVar("T")

DATA = "data."
NOT_READ = ("eval_fraction", "eval_path", "stage_split", "packing")
"""Keys of data that say nothing where all rows are read once."""


class Options(argparse.ArgumentParser):
    """The options of `python -m pipeline VERB`. usage: a command that works, shown where one does not."""

    def __init__(self, verb: str, usage: str, description: str) -> None:
        super().__init__(prog=f"python -m pipeline {verb}", description=description)
        self._verb, self._usage = verb, usage

    def error(self, message: str) -> NoReturn:
        """UserError in place of argparse's exit."""
        way_out = f"python -m pipeline {self._verb} {self._usage}; --help lists the options"
        raise UserError(f"{self._verb}: {message}", hint=way_out)

    def add_fields(self, schema: Any) -> None:
        """An option for each field of a dataclass; the values stay text, which `fields_given` checks."""
        for known in dataclasses.fields(schema):
            default = getattr(known.default, "value", known.default)
            option = "--" + known.name.replace("_", "-")
            self.add_argument(option, metavar="VALUE", help=f"default {default}")


def fields_given(schema: type[T], given: argparse.Namespace) -> T:
    """The dataclass with the fields that were typed. UserError for a value that one cannot have."""
    typed = {known.name: getattr(given, known.name) for known in dataclasses.fields(schema)}  # type: ignore[arg-type]
    return as_schema(schema, {name: text for name, text in typed.items() if text is not None})


def data_given(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """(the other arguments, the keys of `data.KEY=VALUE` among them): how rows are read, as steps are told.

    UserError for a key that says nothing where no step trains.
    """
    from omegaconf import OmegaConf

    others = [text for text in arguments if not text.startswith(DATA) or "=" not in text]
    typed = [text.removeprefix(DATA) for text in arguments if text not in others]
    try:
        settings: Any = OmegaConf.to_container(OmegaConf.from_dotlist(typed))
    except Exception as error:  # whatever YAML and OmegaConf make of it
        raise UserError(f"{' '.join(typed)} cannot be read: {error}", hint="data.KEY=VALUE") from None
    if useless := sorted(settings.keys() & set(NOT_READ)):
        raise UserError(f"{DATA}{useless[0]} says nothing here: all rows are read once", hint="leave it out")
    return others, settings


def data_of(path: str | None, option: str, typed: dict[str, Any], cache_dir: str) -> DataConfig:
    """The rows that were named: by the option, or by data.path or data.sources. UserError without any."""
    settings = {**({} if path is None else {"path": path}), "cache_dir": cache_dir, **typed}
    data = as_schema(DataConfig, settings, DATA)
    if not data.all_sources():
        raise UserError(f"no rows are named: {option} FILE", hint="or data.path=FILE, or data.sources=[...]")
    return data
