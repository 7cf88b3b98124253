"""One deadline over all that it takes to ask another machine: its name, connecting, proxies, TLS, the answer.

A socket's own timeout begins anew with every byte, and the resolver of names has none. Knows nothing of what
is asked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")

HANG_UP_SECONDS = 1.0


def within(seconds: float, ask: Callable[[], Result], hang_up: Callable[[], None] = lambda: None) -> Result:
    """What `ask` returns or raises; TimeoutError when that takes longer than so many seconds.

    It runs in a thread of its own. One that is late is left to itself, and `hang_up`, which is to end it, is
    called again and again until it has ended.
    """
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(ask())
        except BaseException as error:
            done.set_exception(error)

    def end() -> None:
        while asking.is_alive():
            hang_up()
            asking.join(HANG_UP_SECONDS)

    asking = threading.Thread(target=run, daemon=True)
    asking.start()
    try:
        return done.result(seconds)
    finally:
        if not done.done():
            threading.Thread(target=end, daemon=True).start()
