"""The SFT step on a rank whose disk is full when it writes its part of a checkpoint."""

from __future__ import annotations

import errno
import os
from typing import Any


def sft_refused(config: str, rank: int, save: int) -> int:
    """`python -m step1_sft --config CONFIG`; the `save`-th save of `rank` finds no room."""
    import torch

    from common.training.checkpoint import Checkpoints
    from tests.forked import sft

    begin, count = Checkpoints.save, 0

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == save and int(os.environ["RANK"]) == rank:
            torch.save = refuse
        return begin(*args, **kwargs)

    Checkpoints.save = counted  # type: ignore[method-assign]
    return sft(config)
