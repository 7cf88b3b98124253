"""A step whose rank 0 has Ctrl-C pressed in the phase that INTERRUPT names, and goes on once it was told."""

import os
import signal
import sys
import time

from common import phases
from common.runtime import distributed

PHASE, CONTROLLER = os.environ.get("INTERRUPT", ""), int(os.environ["CONTROLLER"])
told: list[int] = []
enter, receive = phases.enter, distributed.StopSignal._receive


def press() -> None:
    """SIGINT to the controller; returns when it has told this rank, whose process that may end."""
    os.kill(CONTROLLER, signal.SIGINT)
    end = time.monotonic() + 60
    while not told and time.monotonic() < end:
        time.sleep(0.01)


def enter_and_press(name: str, step: int | None = None) -> bool:
    due = name == PHASE and os.environ["RANK"] == "0" and not told
    result = enter(name, step)
    if due:
        press()
    return result


def note_and_receive(self: distributed.StopSignal, number: int, frame: object) -> None:
    told.append(number)
    receive(self, number, frame)


phases.enter = enter_and_press
distributed.StopSignal._receive = note_and_receive  # type: ignore[method-assign]

if PHASE == "imports":
    press()

if __name__ == "__main__":
    from step1_sft.__main__ import main

    sys.exit(main())
