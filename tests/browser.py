"""A headless Chromium for tests: opens a page and says what a reader would see.

Speaks the DevTools protocol over two pipes (`--remote-debugging-pipe`: JSON messages that end with a zero
byte), so that neither a port nor a library is needed. The browser's profile is a folder that is thrown away.
Without a Chromium on the machine `find()` gives None; `CHROMIUM` names one that is elsewhere.
"""

from __future__ import annotations

import functools
import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
HOW_TO_GET_ONE = "no Chromium found: `make browser` installs one, CHROMIUM=/path/to/chromium names one"
PATIENCE = 60.0
"""Seconds until a browser that does not answer is given up."""


@functools.cache
def find() -> str | None:
    """Path of a Chromium that starts; None when there is none. A package may have put a mere stub there."""
    named = os.environ.get("CHROMIUM")
    paths = [named] if named else [path for name in NAMES if (path := shutil.which(name))]
    return next((path for path in paths if _starts(path)), None)


def _starts(path: str) -> bool:
    try:
        done = subprocess.run([path, "--version"], capture_output=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


class Browser:
    """One page of one headless Chromium. Use with `with`."""

    def __init__(self, program: str, profile: Path) -> None:
        to_browser, self._commands = os.pipe()
        self._answers, from_browser = os.pipe()
        # Chromium reads file descriptor 3 and writes 4, which the shell renames ours to
        script = f'exec 3<&{to_browser} 4>&{from_browser}; exec "$0" "$@"'
        flags = ["--headless", "--disable-gpu", "--no-first-run", "--hide-scrollbars", "--disable-extensions"]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "--disable-dev-shm-usage"]
        flags += ["--disable-background-networking", "--disable-component-update"]
        if os.geteuid() == 0:
            flags.append("--no-sandbox")  # it refuses to start as root with one
        self._process = subprocess.Popen(
            ["bash", "-c", script, program, *flags, "about:blank"],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._number = 0
        self._rest = b""
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        self._loaded = 0  # events until the last page was loaded

    def __enter__(self) -> Browser:
        target = self._call("Target.createTarget", {"url": "about:blank"})["targetId"]
        attached = self._call("Target.attachToTarget", {"targetId": target, "flatten": True})
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._commands)
        self._process.kill()
        self._process.wait()
        os.close(self._answers)

    def look(self, width: int, height: int = 800, *, dark: bool = False, phone: bool = False) -> None:
        """Size of the window in CSS pixels, and what the reader prefers."""
        size = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": phone}
        self._call("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", {"features": [scheme]})

    def open(self, url: str) -> None:
        """Load a page to its end; `events` begin anew."""
        self.events, self._loaded = [], 0
        self._call("Page.navigate", {"url": url})
        self.wait_for_load()

    def wait_for_load(self) -> None:
        """Until a page was loaded to its end since the last one was."""
        while not any(event["method"] == "Page.loadEventFired" for event in self.events[self._loaded :]):
            self.events.append(self._message())
        self._loaded = len(self.events)

    def point(self, x: float, y: float) -> None:
        """Move the pointer to a place in the window, in CSS pixels."""
        self._call("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, as JSON."""
        answer = self._call("Runtime.evaluate", {"expression": expression, "returnByValue": True})
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def requests(self) -> list[str]:
        """Addresses that the page asked for since it was opened; data written in the page is none."""
        sent = [event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        urls = [parameters["request"]["url"] for parameters in sent]
        return [url for url in urls if not url.startswith("data:")]

    def complaints(self) -> list[str]:
        """What the console says: errors, warnings, refused scripts, exceptions."""
        said = [e for e in self.events if e["method"] in ("Log.entryAdded", "Runtime.consoleAPICalled")]
        said += [e for e in self.events if e["method"] == "Runtime.exceptionThrown"]
        return [json.dumps(event["params"])[:2000] for event in said]

    def _call(self, method: str, parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": dict(parameters or {})}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, (method, answer["error"])
        return dict(answer["result"])

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._answers], [], [], PATIENCE)
            part = os.read(self._answers, 1 << 20) if ready else b""
            if not part:
                raise RuntimeError(f"the browser does not answer (exit status {self._process.poll()})")
            self._rest += part
        message, self._rest = self._rest.split(b"\0", 1)
        return dict(json.loads(message))


if __name__ == "__main__":
    sys.exit(0 if find() else 1)
