"""One machine's part of a run over ssh: `python -m launch.remote`, talked to on its standard input.

Reads a line of JSON (command, environment, folder), starts the command in a process group of its own, and
ends with its exit status. Each further line names a signal for it. When the input ends, whoever started this
is gone: the command is told to save, and killed when that takes too long. What the command prints is passed
on; that nobody reads it any more does not disturb the command.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from typing import IO

from launch.agent import exit_status

SAVE_SECONDS = 90.0
"""How long a machine may take to save and end, before it is killed."""


def main() -> int:
    """Run the command; returns its exit status, 128 + N where signal N ended it."""
    order = json.loads(sys.stdin.buffer.readline())
    process = subprocess.Popen(
        order["command"],
        cwd=order["folder"],
        env={**os.environ, **order["environment"]},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,
    )
    assert process.stdout is not None and process.stderr is not None
    outputs = ((process.stdout, 1), (process.stderr, 2))
    pumps = [threading.Thread(target=pass_on, args=output, daemon=True) for output in outputs]
    for thread in (*pumps, threading.Thread(target=obey, args=(process,), daemon=True)):
        thread.start()
    code = process.wait()
    for thread in pumps:
        thread.join(10)  # a grandchild that lives on keeps the pipe open
    return exit_status(code)


def obey(process: subprocess.Popen[bytes]) -> None:
    """Send the signals that are asked for, until the input ends; then end the command."""
    for line in sys.stdin.buffer:
        process.send_signal(signal.Signals[line.decode().strip()])
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(SAVE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()  # its ranks die with it


def pass_on(source: IO[bytes], descriptor: int) -> None:
    """Copy what comes to a file descriptor; once that is closed, read on and drop it."""
    is_read = True
    while chunk := os.read(source.fileno(), 65536):
        try:
            while is_read and chunk:
                chunk = chunk[os.write(descriptor, chunk) :]
        except OSError:
            is_read = False


if __name__ == "__main__":
    # Not sys.exit: a thread that still waits for input would hold the interpreter up.
    status = main()
    sys.stdout.flush()
    os._exit(status)
