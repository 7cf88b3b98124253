"""A JSON document -> the rows of its array, a few in memory at a time.

Takes a stream; gives the elements of an array, or of an object's only array such as {"data": [...]}. Raises
UserError with the line for any other document.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from common.data.outcomes import LONGEST_ROW, TOO_LONG, RowError
from common.data.strict_json import TOO_MANY, WHITESPACE, first_json, has_too_many
from common.errors import UserError

BLOCK = 2**20
"""Characters read at once, at the least."""
LONGEST_TOKEN = 12
"""Longest token, strings aside, that the end of a block may cut in two: a pair of escaped surrogates."""


def elements_of(path: Path, stream: BinaryIO) -> Iterator[Any]:
    """The elements of the document's array, one after another."""
    document = _Document(path, stream)
    if document.next() != "[":
        for _ in document.elements():  # read twice: its end tells whether an object has one array
            pass
        if document.arrays != 1:
            raise UserError(
                f"{path}: expected an array of rows", hint='either [...], or {"data": [...]} with one array'
            )
        document.rewind()
    yield from document.elements()


class _Document:
    """The text of a document; what was read is dropped from memory."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self._path = path
        self._text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        self.rewind()

    def rewind(self) -> None:
        """Begin anew."""
        self._text.seek(0)
        self._held, self._at, self._ended = "", 0, False
        self._lines, self._characters = 0, 0  # before what is held; the latter of its first line
        self.arrays = 0
        """of which elements were given"""

    def elements(self) -> Iterator[Any]:
        """The elements of the document, or of all arrays that are values of its object."""
        if self.next() == "[":
            yield from self._array()
        elif self.next() == "{":
            for _ in self._items("{", "}"):
                if self.next() != '"':
                    raise self._wrong("Expecting property name enclosed in double quotes")
                self._value()
                self._take(":")
                if self.next() == "[":
                    yield from self._array()
                else:
                    self._value()
        else:
            self._value()
        if self.next():
            raise self._wrong("Extra data")

    def next(self) -> str:
        """The next character that is no white space, without taking it; empty at the end."""
        while True:
            self._at = WHITESPACE.match(self._held, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._held) or self._ended:
                return self._held[self._at : self._at + 1]
            self._read()

    def _array(self) -> Iterator[Any]:
        self.arrays += 1
        for _ in self._items("[", "]"):
            yield self._value()

    def _items(self, opening: str, closing: str) -> Iterator[None]:
        """Stops before each item in turn; the caller takes the item before it asks for the next one."""
        self._take(opening)
        if self.next() != closing:
            yield
            while self.next() == ",":
                self._take(",")
                yield
        self._take(closing)

    def _take(self, sign: str) -> None:
        if self.next() != sign:
            raise self._wrong(f"Expecting '{sign}'")
        self._at += 1

    def _value(self) -> Any:
        self.next()
        while True:
            try:
                value, end = first_json(self._held, self._at)
            except json.JSONDecodeError as error:
                what = error.msg.removesuffix(" at")
                is_cut = what == "Unterminated string starting" or error.pos + LONGEST_TOKEN >= len(
                    self._held
                )
                if self._ended or not is_cut:
                    raise self._wrong(what, error.pos) from error
            except RowError as error:
                raise self._faulty(error) from error
            else:
                if end < len(self._held) or self._ended:
                    self._at = end
                    return value
            if len(self._held) - self._at > LONGEST_ROW:
                raise self._faulty(f"a value is {TOO_LONG}")
            self._read()

    def _read(self) -> None:
        taken, self._held = self._held[: self._at], self._held[self._at :]
        self._lines += taken.count("\n")
        self._characters = len(taken) - taken.rfind("\n") - 1 + ("\n" not in taken) * self._characters
        self._at = 0
        try:
            block = self._text.read(max(BLOCK, len(self._held)))
        except UnicodeDecodeError as error:
            raise self._faulty(error) from error
        self._held += block
        if has_too_many(self._held):
            raise self._faulty(f"a value has {TOO_MANY}")
        self._ended = not block

    def _place(self, at: int | None = None) -> tuple[str, int]:
        """File, line and column of a character in memory, by default the next one."""
        before = self._held[: self._at if at is None else at]
        column = len(before) - before.rfind("\n") + ("\n" not in before) * self._characters
        return f"{self._path}:{self._lines + before.count(chr(10)) + 1}", column

    def _faulty(self, what: object) -> UserError:
        return UserError(f"{self._place()[0]}: {what}", hint="correct the file")

    def _wrong(self, what: str, at: int | None = None) -> UserError:
        place, column = self._place(at)
        return UserError(
            f"{place}: not valid JSON: {what} at column {column}",
            hint="if it has one object per line, name it .jsonl",
        )
