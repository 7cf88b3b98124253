"""One rank of a run that notes what is pickled for other ranks in each step: FOLDER/rank_R.json.

A step of SFT lasts from `Loop.begin` to what is logged of it, an iteration of PPO from `Iterations.begin` to
`Iterations.record`; evaluations and checkpoints lie outside.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

STEPS: list[dict[str, list[str]]] = []
"""Of each step the types that were pickled, and the collectives of arrays."""
_is_open = [False]


def main(config: str, folder: str, step: str) -> int:
    """`python -m step1_sft` or `step3_ppo` with this configuration."""
    from tests import forked
    from tests.step3_ppo import runs

    _note("pickled", "all_gather_object", lambda arguments: type(arguments[1]).__name__)
    _note("pickled", "broadcast_object_list", lambda arguments: type(arguments[0]).__name__)
    _note("arrays", "all_reduce", lambda arguments: "all_reduce")
    _note("arrays", "all_gather_into_tensor", lambda arguments: "all_gather")
    _note("arrays", "broadcast", lambda arguments: "broadcast")
    if step == "sft":
        from common.training.loop import Loop

        _open_and_close(Loop, "begin", "log")
        code = forked.sft(config)
    else:
        from step3_ppo.iterations import Iterations

        _open_and_close(Iterations, "begin", "record")
        code = runs.ppo(config)
    (Path(folder) / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(STEPS))
    return code


def _note(kind: str, name: str, told: Any) -> None:
    collective = getattr(torch.distributed, name)

    def noted(*arguments: Any, **more: Any) -> Any:
        if _is_open[0]:
            STEPS[-1][kind].append(told(arguments))
        return collective(*arguments, **more)

    setattr(torch.distributed, name, noted)


def _open_and_close(kind: Any, first: str, last: str) -> None:
    begin, end = getattr(kind, first), getattr(kind, last)

    def opening(*arguments: Any, **more: Any) -> Any:
        STEPS.append({"pickled": [], "arrays": []})
        _is_open[0] = True
        return begin(*arguments, **more)

    def closing(*arguments: Any, **more: Any) -> Any:
        _is_open[0] = False
        return end(*arguments, **more)

    setattr(kind, first, opening)
    setattr(kind, last, closing)
