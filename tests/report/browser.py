"""A Chromium to click in, driven through its DevTools protocol over a pipe: no package, no port."""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections import deque
from contextlib import suppress

# The last one is on Ubuntu a script that asks for another package system.
NAMES = ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
MISSING = f"no browser: none of {', '.join(NAMES)} is on the path (apt-get install chromium)"
# As the protocol calls them, with the character that each types.
KEYS = {
    "Tab": (9, ""),
    "Enter": (13, "\r"),
    "Escape": (27, ""),
    " ": (32, " "),
    "ArrowLeft": (37, ""),
    "ArrowUp": (38, ""),
    "ArrowRight": (39, ""),
    "ArrowDown": (40, ""),
    **{key: (ord(key.upper()), key) for key in "kdru0123456789"},
}


class NoBrowserError(Exception):
    """There is a browser, but it does not start, as without user namespaces and as another user than root."""


class Browser:
    """One tab.

    Args:
        folder: for the profile.

    Raises:
        NoBrowserError: if it ends at once.
    """

    def __init__(self, folder):
        asks, ask = os.pipe()
        answer, answers = os.pipe()

        def connect():
            # The pipe's ends that the browser wants, under the numbers that it knows. First out of their way.
            ends = os.dup(asks), os.dup(answers)
            while min(ends) <= 4:
                ends = tuple(os.dup(end) for end in ends)
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        self._process = subprocess.Popen(
            [
                *(CHROMIUM, "--headless", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe"),
                *("--disable-dev-shm-usage", "--hide-scrollbars", "--disable-extensions", f"--user-data-dir={folder}"),
                # Chromium's own, which a process of root's cannot have.
                *(["--no-sandbox"] if os.geteuid() == 0 else []),
                "about:blank",
            ],
            preexec_fn=connect,  # noqa: PLW1509  (it only copies two numbers)
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(asks)
        os.close(answers)
        self._ask, self._answer = ask, answer
        self._numbers, self._buffer, self._events, self._session = itertools.count(1), b"", deque(), None
        try:
            targets = self.call("Target.getTargets")["targetInfos"]
        except (OSError, RuntimeError) as error:
            self.close()
            raise NoBrowserError(f"{CHROMIUM} does not start ({error})") from error
        (tab,) = [one for one in targets if one["type"] == "page"][:1]
        self._session = self.call("Target.attachToTarget", targetId=tab["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def close(self):
        """Ends the browser."""
        self._session = None
        with suppress(Exception):
            self.call("Browser.close")
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(20)
        os.close(self._ask)
        os.close(self._answer)

    def call(self, method, **parameters):
        """Calls a method of the protocol, and returns its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        text = json.dumps(message).encode() + b"\0"
        while text:
            text = text[os.write(self._ask, text) :]
        deadline = time.monotonic() + 60
        while True:
            heard = self._hear(deadline)
            if heard.get("id") == number:
                if "error" in heard:
                    raise RuntimeError(f"{method}: {heard['error']}")
                return heard["result"]
            self._events.append(heard)

    def _hear(self, deadline):
        while b"\0" not in self._buffer:
            if not select.select([self._answer], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            if not (read := os.read(self._answer, 1 << 16)):
                raise RuntimeError("the browser has ended")
            self._buffer += read
        text, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(text)

    def run(self, script):
        """The value of an expression on the page, awaited."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"])
        return found["result"].get("value")

    def wait(self, script):
        """Waits until an expression on the page is true."""
        deadline = time.monotonic() + 30
        while not self.run(script):
            if time.monotonic() > deadline:
                raise TimeoutError(script)
            time.sleep(0.01)

    def open(self, file, state=""):
        """Opens a file anew, on a common screen, and waits until its script has run."""
        self.emulate()
        self.call("Page.navigate", url="about:blank")
        self.wait("location.href === 'about:blank'")
        self.call("Page.navigate", url=f"{file.as_uri()}#{state}")
        self.wait("document.body?.dataset.ready === 'yes'")

    def reload(self):
        """Opens the page again."""
        self.run("document.body.dataset.ready = ''")
        self.call("Page.reload")
        self.wait("document.body?.dataset.ready === 'yes'")

    def downloads_to(self, folder):
        """Puts what is downloaded into a folder."""
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def complaints(self):
        """What the console has been told, and what has gone wrong, since this was asked last."""
        self.run("0")
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        found = [one for one in self._events if one.get("method") in kinds]
        self._events.clear()
        return found

    def press(self, key, times=1):
        """Presses a key, as a person does."""
        code, text = KEYS[key]
        for _ in range(times):
            self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, text=text)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def click(self, selector):
        """Clicks in the middle of an element."""
        self.run(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        box = f"document.querySelector({selector!r}).getBoundingClientRect()"
        x, y = self.run(f"(box => [box.x + box.width / 2, box.y + box.height / 2])({box})")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def emulate(self, width=1200, scheme="light", media=""):
        """Shows the page on a screen of a width, in a color scheme, or as printed."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call(
            "Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}]
        )

    def picture(self, file):
        """Writes the whole page as a PNG."""
        box = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": box["width"], "height": box["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        file.write_bytes(base64.b64decode(shot["data"]))
