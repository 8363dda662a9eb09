"""A headless Chromium, spoken to over two pipes in its own protocol: no driver, no port.

Protocol: https://chromedevtools.github.io/devtools-protocol; messages are JSON, a zero byte after
each, on the browser's file descriptors 3 (to it) and 4 (from it).
"""

import base64
import contextlib
import json
import os
import pathlib
import select
import shutil
import subprocess
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = """
--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars
--force-color-profile=srgb --remote-debugging-pipe
""".split()
LIMIT = 60.0  # seconds for an answer; a shared machine can be slow


def executable():
    """The browser on the PATH, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def open_browser():
    """A `Page`, in a browser with a profile of its own that ends with the block."""
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [executable(), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        # The shell gives the pipes the numbers that the browser expects.
        words = ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{from_write}', "bash", *command]
        process = subprocess.Popen(
            words,
            pass_fds=(to_read, from_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read), os.close(from_write)
        try:
            yield Page(to_write, from_read)
        finally:
            process.terminate()
            process.wait()
            os.close(to_write), os.close(from_read)


class Page:
    """One tab.

    Attributes:
      messages: what its console said and what its scripts threw.
      requests: the addresses that it asked for.
    """

    def __init__(self, to_browser, from_browser):
        self.to_browser, self.from_browser = to_browser, from_browser
        self.rest, self.count, self.session = b"", 0, None
        self.messages, self.requests, self.loaded = [], [], 0
        tab = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attach = dict(targetId=tab["targetId"], flatten=True)
        self.session = self.call("Target.attachToTarget", **attach)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        """One command of the protocol; returns its result."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        number = self.count
        while (answer := self._next()).get("id") != number:
            pass
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def open(self, path):
        """Loads a file; what earlier pages said is forgotten."""
        self.messages, self.requests, self.loaded = [], [], 0
        self.call("Page.navigate", url=pathlib.Path(path).absolute().as_uri())
        while not self.loaded:
            self._next()

    def js(self, expression):
        """The value of an expression; a promise is awaited."""
        wanted = dict(expression=expression, returnByValue=True, awaitPromise=True)
        result = self.call("Runtime.evaluate", userGesture=True, **wanted)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def size(self, width, height=900, scale=1):
        """Sets the window, in CSS pixels; narrow ones are phones."""
        mobile = width < 700
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=mobile,
        )

    def prefer(self, scheme="", media=""):
        """Sets the system's colour scheme, and the medium, "print" or ""."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)

    def key(self, name, code):
        """Presses a key on what has the focus."""
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if name == "Enter" and kind == "keyDown" else {}
            shared = dict(key=name, code=name, windowsVirtualKeyCode=code, **text)
            self.call("Input.dispatchKeyEvent", type=kind, **shared)

    def picture(self, path, whole=True):
        """Writes a PNG, of the whole page or of the window."""
        shot = dict(format="png", captureBeyondViewport=whole)
        data = self.call("Page.captureScreenshot", **shot)["data"]
        pathlib.Path(path).write_bytes(base64.b64decode(data))

    def _next(self):
        end = time.monotonic() + LIMIT
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.from_browser], [], [], max(end - time.monotonic(), 0))
            assert ready, f"the browser has not answered for {LIMIT:.0f} s"
            data = os.read(self.from_browser, 1 << 20)
            assert data, "the browser has ended"
            self.rest += data
        line, _, self.rest = self.rest.partition(b"\0")
        message = json.loads(line)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method, found):
        if method == "Page.loadEventFired":
            self.loaded += 1
        elif method == "Runtime.consoleAPICalled":
            self.messages.append(str(found["args"]))
        elif method == "Runtime.exceptionThrown":
            self.messages.append(str(found["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.messages.append(str(found["entry"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(found["request"]["url"])
