"""Drive a headless Chromium by its DevTools protocol: JSON over a pipe, a zero byte after each
message."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sharedpool.descriptors.readable import readable
from tests.support.waiting import wait_until

PROGRAM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
_LIMIT_S = 30.0


class Page:
    """A page. `complaints` lists what it logged: blocked requests, exceptions, console errors."""

    def __init__(self, browser: Browser, url: str) -> None:
        self._browser = browser
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=url)
        loaded = f"location.href == {json.dumps(url)} && document.readyState == 'complete'"
        wait_until(lambda: self.evaluate(loaded), timeout_s=_LIMIT_S, what=f"{url} to be loaded")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def prefer(self, scheme: str) -> None:
        """Emulate the preference for "dark" or "light"."""
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )

    def screenshot(self, path: Path, width: int = 1100, height: int = 1000) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        path.write_bytes(
            base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        )

    @property
    def complaints(self) -> list[str]:
        self.evaluate("0")  # what was said before this has been read after it
        return [
            json.dumps(event["params"])
            for event in self._browser.events
            if event["method"]
            in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
        ]


class Browser:
    """A browser's end of the pipe."""

    def __init__(self, into: int, out: int) -> None:
        self._into, self._out = into, out
        self._serial = 0
        self._read = b""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Call a method and return its result; events that come meanwhile are kept."""
        self._serial += 1
        message: dict[str, Any] = {"id": self._serial, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._into, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._serial:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            if "method" in answer:
                self.events.append(answer)

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + _LIMIT_S
        while b"\0" not in self._read:
            if not readable([self._out], deadline - time.monotonic()):
                raise AssertionError(f"the browser said nothing for {_LIMIT_S:g} s")
            chunk = os.read(self._out, 1 << 16)
            if not chunk:
                raise AssertionError("the browser has ended")
            self._read += chunk
        line, _, self._read = self._read.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message


@contextmanager
def browsing(directory: Path) -> Iterator[Browser]:
    """Run a browser with its profile in `directory`."""
    assert PROGRAM is not None
    low_in, our_out = os.pipe()
    our_in, low_out = os.pipe()
    # Out of the way of the descriptors that they are to become.
    their_in, their_out = (fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 10) for low in (low_in, low_out))
    arguments = [
        PROGRAM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--remote-debugging-pipe",
        f"--user-data-dir={directory}",
        "about:blank",
    ]
    null = os.open(os.devnull, os.O_RDWR)
    # It reads from descriptor 3 and writes to 4.
    places = [(os.POSIX_SPAWN_DUP2, null, 1), (os.POSIX_SPAWN_DUP2, null, 2)]
    places += [(os.POSIX_SPAWN_DUP2, their_in, 3), (os.POSIX_SPAWN_DUP2, their_out, 4)]
    pid = os.posix_spawn(PROGRAM, arguments, os.environ, file_actions=places, setpgroup=0)
    for each in (low_in, low_out, their_in, their_out, null):
        os.close(each)
    browser = Browser(our_out, our_in)
    try:
        yield browser
        browser.call("Browser.close")
    finally:
        os.close(our_out)
        os.close(our_in)
        os.killpg(pid, signal.SIGKILL)  # its profile is thrown away
        os.waitpid(pid, 0)
