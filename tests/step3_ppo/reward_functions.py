"""Functions as a user would write them for `ppo.rewards`, good and bad, found by their dotted name."""

from __future__ import annotations

import math
import sys
from typing import Any

NUMBER = 3


def lengths(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def right(completions: list[str], answer: list[str]) -> list[bool]:
    return [completion == wanted for completion, wanted in zip(completions, answer, strict=True)]


def with_default(completions: list[str], bonus: float = 1.0) -> list[float]:
    return [bonus] * len(completions)


def by_position(prompts: list[str], completions: list[str], /) -> list[float]:
    return [0.0] * len(completions)


def broken(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [1 / len(completion) for completion in completions]


def leaving(completions: list[str]) -> list[float]:
    sys.exit(3)


def meddling(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    completions.clear()
    prompts.clear()
    for values in columns.values():
        values.clear()
    return [1.0, 2.0]


def nan_for_empty(completions: list[str]) -> list[float]:
    return [1.0 if completion else math.nan for completion in completions]


def too_few(completions: list[str]) -> list[float]:
    return [1.0] * (len(completions) - 1)


def nothing(completions: list[str]) -> None:
    return None


def none_for_some(completions: list[str]) -> list[float | None]:
    return [1.0 if completion else None for completion in completions]


def texts(completions: list[str]) -> list[str]:
    return ["1.0"] * len(completions)


class Judge:
    @staticmethod
    def fair(completions: list[str]) -> list[float]:
        return [0.5] * len(completions)
