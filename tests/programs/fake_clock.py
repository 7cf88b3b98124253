"""A step on a clock of its own: a minute per update on rank 0, an hour on the others."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any


def sft(config: str) -> int:
    """`python -m step1_sft --config CONFIG`."""
    return _run("step1_sft", config)


def reward(config: str) -> int:
    """`python -m step2_reward --config CONFIG`."""
    return _run("step2_reward", config)


def dpo(config: str) -> int:
    """`python -m step2_dpo --config CONFIG`."""
    return _run("step2_dpo", config)


def ppo(config: str) -> int:
    """`python -m step3_ppo --config CONFIG`."""
    return _run("step3_ppo", config)


def _run(module: str, config: str) -> int:
    from importlib import import_module

    from common.training import loop, session

    seconds = 0.0
    pace = 60.0 if os.environ["RANK"] == "0" else 3600.0

    def moving(function: Callable[..., Any]) -> Callable[..., Any]:
        def moved(*args: Any, **kwargs: Any) -> Any:
            nonlocal seconds
            seconds += pace
            return function(*args, **kwargs)

        return moved

    session.SaveClock = partial(session.SaveClock, now=lambda: seconds)  # type: ignore[assignment,misc]
    loop.advance = moving(loop.advance)
    if module == "step3_ppo":
        train = import_module("step3_ppo.train")
        train.update = moving(train.update)
    sys.argv = [module, "--config", config]
    return int(import_module(f"{module}.__main__").main())
