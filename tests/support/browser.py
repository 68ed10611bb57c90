"""A Chromium without a window, driven through its DevTools pipe: JSON messages, each ended by a zero byte."""

import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--disable-features=IsolateSandboxedIframes",  # so that `run_in_frame` reaches them
)
PATIENCE = 30.0  # seconds


class Page:
    """A tab. events: what the browser has told of it."""

    def __init__(self, to_browser, from_browser):
        self._out, self._in, self._rest = to_browser, from_browser, b""
        self._numbers, self._session, self.events = itertools.count(1), None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self):
        until = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0, until - time.monotonic()))
            assert ready, "the browser says nothing"
            said = os.read(self._in, 1 << 20)
            assert said, "the browser has ended"
            self._rest += said
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def width(self, pixels, height=900):
        self.call(
            "Emulation.setDeviceMetricsOverride", width=pixels, height=height, deviceScaleFactor=1, mobile=pixels < 600
        )

    def open(self, url):
        """Go to a page, and return when it is there."""
        self.events.clear()
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def run(self, script):
        """The value of a JavaScript expression; a promise is awaited."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def run_in_frame(self, script):
        """The value of a JavaScript expression in the page's newest frame."""
        self.run("0")
        contexts = [e["params"] for e in self.events if e.get("method") == "Runtime.executionContextCreated"]
        newest = max(context["context"]["id"] for context in contexts)
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, contextId=newest)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, script):
        """Until a JavaScript expression is true."""
        until = time.monotonic() + PATIENCE
        while not self.run(script):
            assert time.monotonic() < until, script
            time.sleep(0.05)

    def requests(self):
        """URLs that the page has asked for."""
        self.run("0")
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]

    def complaints(self):
        """Errors and warnings of the console, and exceptions."""
        self.run("0")
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event["params"] for event in self.events if event["method"] in kinds]


@contextlib.contextmanager
def opened():
    """A tab of a new browser, which ends with it."""
    theirs_in, out = os.pipe()
    inward, theirs_out = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        pipe = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'  # the numbers that the browser reads from and writes to
        command = ["bash", "-c", pipe, "bash", CHROMIUM, *FLAGS, f"--user-data-dir={profile}"]
        nowhere = subprocess.DEVNULL
        process = subprocess.Popen(command, pass_fds=(theirs_in, theirs_out), stdout=nowhere, stderr=nowhere)
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            yield Page(out, inward)
        finally:
            process.kill()
            process.wait()
            os.close(out)
            os.close(inward)
