"""Headless Chromium, driven over its own pipe: what a reader of a page would see and what the page would do.

The DevTools protocol: JSON messages that end with a zero byte, on descriptors
3 (in) and 4 (out) of the browser.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WAIT_SECONDS = 60
_CODES = {"Tab": 9, "Enter": 13, "Escape": 27, "Space": 32, "End": 35, "Home": 36}
_CODES |= {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


def program() -> str | None:
    """Where Chromium is, or None."""
    return next((path for name in PROGRAMS if (path := shutil.which(name))), None)


class Page:
    """One tab.

    Attributes:
        requests: URL of everything that was fetched.
        complaints: console messages, exceptions, and what the content policy refused.
    """

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._in, self._out, self._id, self._rest = to_browser, from_browser, 0, b""
        self._session: str | None = None
        self.requests: list[str] = []
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of one command."""
        self._id += 1
        message: dict[str, Any] = {"id": self._id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._in, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._id:
            self._note(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return dict(answer["result"])

    def open(
        self,
        path: Path | str,
        *,
        width: int = 1280,
        dark: bool = False,
        scripts: bool = True,
        mobile: bool = False,
    ) -> None:
        """Load a file, or what an address leads to, and let its charts settle."""
        self._go("about:blank")  # what the page before asks for still is not this one's
        self.requests.clear()
        self.complaints.clear()
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=mobile
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._go(path if isinstance(path, str) else path.resolve().as_uri())
        if scripts:
            self.script("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def _go(self, address: str) -> None:
        """Load what an address leads to."""
        self.call("Page.navigate", url=address)
        while True:
            event = self._next()
            self._note(event)
            if event.get("method") == "Page.loadEventFired":
                break

    def script(self, expression: str) -> Any:
        """The value of an expression in the page."""
        done = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 20) -> None:
        """Until an expression is true in the page."""
        end = time.monotonic() + seconds
        while not self.script(f"Boolean({expression})"):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.03)

    def press(self, *keys: str) -> None:
        """Keys, one after the other: ``Tab``, ``Shift+Tab``, ``Enter``, ``a``."""
        for name in keys:
            *held, key = name.split("+") if len(name) > 1 else [name]
            shift = 8 if "Shift" in held else 0
            text = {"Enter": "\r", "Space": " "}.get(key, key if len(key) == 1 else "")
            about = {"key": " " if key == "Space" else key, "code": key, "modifiers": shift}
            code = _CODES.get(key)
            if code:
                about |= {"windowsVirtualKeyCode": code}
            self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **about)
            self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def type(self, text: str) -> None:
        """Text, into what has the focus."""
        self.call("Input.insertText", text=text)

    def point(self, x: float, y: float) -> None:
        """Move the mouse."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self, path: Path, *, whole: bool = True) -> None:
        """Write the whole page, or what is in view of it, as a PNG."""
        made = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(made["data"]))

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(f"console: {params['args']}")
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(f"exception: {params['exceptionDetails']}")
        elif method == "Log.entryAdded":
            self.complaints.append(f"log: {params['entry']['text']}")

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + WAIT_SECONDS
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._out], [], [], max(0, end - time.monotonic()))
            assert ready, "Chromium says nothing"
            part = os.read(self._out, 1 << 20)
            assert part, "Chromium has gone"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A tab of a browser with a profile of its own."""
    found = program()
    assert found, "there is no Chromium"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-component-update"]
    flags += ["--disable-background-networking", "--disable-dev-shm-usage", "--hide-scrollbars"]
    flags += ["--remote-debugging-pipe", f"--user-data-dir={profile}"]
    there, to_browser = os.pipe()
    from_browser, here = os.pipe()
    # The shell puts the pipes where Chromium looks for them.
    command = ["bash", "-c", f'exec "$@" 3<&{there} 4>&{here}', "bash", found, *flags]
    process = subprocess.Popen(
        command,
        pass_fds=(there, here),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(there)
    os.close(here)
    try:
        yield Page(to_browser, from_browser)
    finally:
        os.close(to_browser)
        os.close(from_browser)
        process.terminate()
        process.wait(WAIT_SECONDS)
