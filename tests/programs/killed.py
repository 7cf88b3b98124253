"""The SFT step on a rank that kills itself with SIGKILL at an exact moment of its second save."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

MOMENTS = ("writing", "hashing", "before the manifest", "before the rename", "before retention", "deleting")
"""Moments of saving a checkpoint, in their order."""

EXPORTING = "exporting"
AFTER_EVALUATION = "after evaluation"


def sft_killed(config: str, moment: str, rank: int) -> int:
    """`python -m step1_sft --config CONFIG`, of which this rank does not survive `moment`."""
    from tests.forked import sft

    if int(os.environ["RANK"]) == rank:
        _prepare(moment)
    return sft(config)


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_once_trained(_: Any, rows: Any, step: int) -> None:
    if step:
        die()


def _prepare(moment: str) -> None:
    import torch

    from common.runtime import tracking
    from common.training import checkpoint, export, snapshot

    if moment == EXPORTING:
        export.write_manifest = die  # type: ignore[assignment]
    elif moment == AFTER_EVALUATION:
        log_samples = tracking.Tracker.log_samples
        tracking.Tracker.log_samples = _after(log_samples, _die_once_trained)  # type: ignore[method-assign]
    elif moment == "writing":
        _at_second_save(lambda: setattr(torch, "save", _after(torch.save, _tear_and_die)))
    elif moment == "hashing":
        _at_second_save(lambda: setattr(snapshot, "file_record", die))
    elif moment == "before the manifest":
        _at_second_save(lambda: setattr(checkpoint, "write_manifest", die))
    elif moment == "before the rename":
        _at_second_save(lambda: setattr(checkpoint, "commit_folder", die))
    elif moment == "before retention":
        _at_second_save(lambda: setattr(checkpoint.Checkpoints, "_forget_old", die))
    elif moment == "deleting":
        _at_second_save(lambda: setattr(checkpoint.shutil, "rmtree", _delete_one_and_die))
    else:
        raise ValueError(moment)


def _at_second_save(arm: Callable[[], None]) -> None:
    """Call `arm` when the second checkpoint of this process begins."""
    from common.training.checkpoint import Checkpoints

    save, count = Checkpoints.save, 0

    def counted(*args: Any, **kwargs: Any) -> Path:
        nonlocal count
        count += 1
        if count == 2:
            arm()
        return save(*args, **kwargs)

    Checkpoints.save = counted  # type: ignore[method-assign]


def _after(function: Callable[..., Any], then: Callable[..., None]) -> Callable[..., Any]:
    def both(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        then(*args, **kwargs)
        return result

    return both


def _tear_and_die(_: Any, file: Any, *__: Any, **___: Any) -> None:
    """Leave half of the file that torch.save has written."""
    path = Path(getattr(file, "name", file))
    os.truncate(path, path.stat().st_size // 2)
    die()


def _delete_one_and_die(path: Path, *_: Any, **__: Any) -> None:
    next(p for p in sorted(Path(path).rglob("*")) if p.is_file()).unlink()
    die()
