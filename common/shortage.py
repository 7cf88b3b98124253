"""What a rank says when its device is out of memory: how much it asked for, and how much there was.

Takes the exception that torch raises; returns a line. Imports nothing heavy.
"""

from __future__ import annotations

import re

OUT_OF_MEMORY = 12
"""Exit status of a rank whose device is out of memory (ENOMEM); the controller then names ways out."""

_SIZE = r"([\d.]+ [KMGT]?i?B)"


def shortage(error: BaseException) -> str | None:
    """In one line, for torch's OutOfMemoryError; None for any other error."""
    if type(error).__name__ != "OutOfMemoryError":
        return None
    text = str(error)
    asked = re.search(rf"Tried to allocate {_SIZE}", text)
    room = re.search(rf"total capacity of {_SIZE} of which {_SIZE} is free", text)
    said = "out of memory on the device"
    if asked is not None:
        said += f": {asked[1]} more were needed"
    if room is not None:
        said += f", {room[2]} of {room[1]} were free"
    return said
