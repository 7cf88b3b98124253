"""Options of a verb, read with argparse: what cannot be read is a UserError that shows how it is typed."""

from __future__ import annotations

import argparse
from typing import NoReturn

from common.errors import UserError


class Options(argparse.ArgumentParser):
    """The options of `python -m pipeline VERB`. usage: a command that works, shown where one does not."""

    def __init__(self, verb: str, usage: str, description: str) -> None:
        super().__init__(prog=f"python -m pipeline {verb}", description=description)
        self._verb, self._usage = verb, usage

    def error(self, message: str) -> NoReturn:
        """UserError in place of argparse's exit."""
        way_out = f"python -m pipeline {self._verb} {self._usage}; --help lists the options"
        raise UserError(f"{self._verb}: {message}", hint=way_out)
