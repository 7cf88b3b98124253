"""Functions as a user would write them for `evaluate --functions`."""

from __future__ import annotations

from typing import Any


def characters(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def knows(completions: list[str], answer: list[str]) -> list[float]:
    return [float(wanted in completion) for completion, wanted in zip(completions, answer, strict=True)]


def length(completions: list[str]) -> list[float]:
    return [0.0] * len(completions)
