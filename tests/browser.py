"""A real Chromium, driven over its debugging pipe: no driver program, no further package.

Commands of the DevTools protocol go to the browser's file descriptor 3 and answers come from 4, each JSON that ends
with a zero byte. https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--disable-quic", "--disable-extensions",
    "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
KEYS = {
    "Enter": (13, "\r"), " ": (32, " "), "Tab": (9, ""), "Escape": (27, ""), "ArrowDown": (40, ""), "ArrowUp": (38, ""),
    "End": (35, ""), "Home": (36, ""), "PageDown": (34, ""), "PageUp": (33, ""),
}  # fmt: skip


def chromium() -> str:
    """Where it is; skips the test where it is not, and fails with BYLINE_CI."""
    found = shutil.which("chromium")
    if found is None:
        if os.environ.get("BYLINE_CI") == "1":
            pytest.fail("chromium is not installed, and BYLINE_CI=1 leaves nothing out", pytrace=False)
        pytest.skip("needs chromium")
    return found


class Browser:
    """A headless browser, in a process of its own."""

    def __init__(self, folder: Path):
        command_read, command_write = os.pipe()
        answer_read, answer_write = os.pipe()
        # above what they become, so that neither is overwritten before it is copied
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (command_read, answer_write)]
        actions: list[tuple[Any, ...]] = [
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_DUP2, ends[0], 3),
            (os.POSIX_SPAWN_DUP2, ends[1], 4),
        ]
        arguments = [chromium(), *FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
        self.process = os.posix_spawn(arguments[0], arguments, dict(os.environ), file_actions=actions)
        for end in (command_read, answer_write, *ends):
            os.close(end)
        self._out, self._in = os.fdopen(command_write, "wb", 0), os.fdopen(answer_read, "rb", 0)
        self._number = 0
        self._answers: dict[int, dict[str, Any]] = {}
        self._change = threading.Condition()
        self.events: list[dict[str, Any]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        rest = b""
        while part := self._in.read(1 << 16):
            *messages, rest = (rest + part).split(b"\0")
            with self._change:
                for message in map(json.loads, messages):
                    if "id" in message:
                        self._answers[message["id"]] = message
                    else:
                        self.events.append(message)
                self._change.notify_all()

    def call(self, method: str, session: str | None = None, **params: Any) -> Any:
        """Send a command, and give its result."""
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        self._out.write(json.dumps(message).encode() + b"\0")
        with self._change:
            assert self._change.wait_for(lambda: number in self._answers, 30), f"{method} got no answer"
            answer = self._answers.pop(number)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def open(self, url: str, width: int = 1280, height: int = 900, dark: bool = False) -> Page:
        """A page of its own, with no history and no storage."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        page.size(width, height)
        page.media(dark)
        page.call("Page.navigate", url=url)
        return page

    def close(self) -> None:
        """End it."""
        try:
            self.call("Browser.close")
            end = time.monotonic() + 10
            while not os.waitpid(self.process, os.WNOHANG)[0]:
                assert time.monotonic() < end, "the browser does not end"
                time.sleep(0.02)
        except (AssertionError, OSError):
            with suppress(OSError):
                os.kill(self.process, signal.SIGKILL)
                os.waitpid(self.process, 0)


class Page:
    """A page, by what a person does on it."""

    def __init__(self, browser: Browser, session: str):
        self.browser, self.session = browser, session

    def call(self, method: str, **params: Any) -> Any:
        """A command for this page."""
        return self.browser.call(method, self.session, **params)

    def run(self, script: str) -> Any:
        """The value of an expression."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script: str, seconds: float = 20) -> None:
        """Wait for an expression to be true."""
        end = time.monotonic() + seconds
        # a page that is just loading has no elements yet
        while not self._holds(f"(() => {{ try {{ return Boolean({script}); }} catch {{ return false; }} }})()"):
            assert time.monotonic() < end, f"never: {script}\n{self.run('document.body.innerText')[:1500]}"
            time.sleep(0.03)

    def _holds(self, script: str) -> bool:
        try:
            return bool(self.run(script))
        except AssertionError as error:
            # a page that begins anew while it is asked does not say
            if "Inspected target navigated" not in str(error):
                raise
            return False

    def text(self, selector: str) -> str:
        """What an element says."""
        return str(self.run(f"document.querySelector({json.dumps(selector)}).innerText"))

    def key(self, *names: str) -> None:
        """Press keys, one after the other."""
        for name in names:
            shift = name.startswith("Shift+")
            name = name.removeprefix("Shift+")
            code, text = KEYS[name]
            common = {"key": name, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
            self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
            self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def click(self, selector: str) -> None:
        """Click into the middle of an element."""
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'nearest'}); const r = e.getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def files(self, selector: str, *paths: Path) -> None:
        """Choose files."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in paths])

    def size(self, width: int, height: int) -> None:
        """Of the window; below 600 pixels it is a phone."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def media(self, dark: bool) -> None:
        """What the person's system prefers."""
        wanted = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=wanted)

    def shot(self, path: Path) -> None:
        """What is seen, as PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def problems(self) -> list[str]:
        """Uncaught errors, and what the browser refused (its content security policy)."""
        found = []
        for event in self.browser.events:
            if event.get("sessionId") != self.session:
                continue
            if event["method"] == "Runtime.exceptionThrown":
                found.append(json.dumps(event["params"]["exceptionDetails"])[:500])
            if event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
                found.append(event["params"]["entry"]["text"][:500])
        return found
