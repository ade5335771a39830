"""A real browser for tests: Chromium by the W3C WebDriver protocol (https://www.w3.org/TR/webdriver2/), over urllib."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = "no browser: install Chromium and its driver (Debian: apt-get install chromium chromium-driver)"
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # key of an element's id, fixed by the standard
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1440,1000",
    "--disable-background-networking", "--disable-component-update", "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # the network is cut
]  # fmt: skip
LEFT, NO_BUTTON = 0, -1


class Browser:
    """One window, for use in a ``with`` block.

    Args:
        folder: private folder for its profile and downloads.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.downloads = folder / "downloads"
        self.downloads.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "HOME": str(folder)}
        self.driver = subprocess.Popen(
            [str(DRIVER), "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        assert self.driver.stdout is not None
        for line in self.driver.stdout:
            found = re.search(r"on port (\d+)", line)
            if found and found[1] != "0":
                break
        self.root = f"http://127.0.0.1:{found[1]}" if found else ""
        self.session = ""

    def __enter__(self) -> Browser:
        options = {
            "binary": CHROMIUM,
            "args": [*FLAGS, f"--user-data-dir={self.folder / 'profile'}"],
            "prefs": {"download.default_directory": str(self.downloads)},
        }
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"performance": "ALL", "browser": "ALL"}}
        self.session = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if self.session:
                self._ask("DELETE", f"/session/{self.session}")
        finally:
            self.driver.terminate()
            self.driver.wait(30)

    def open(self, url: str) -> None:
        self._call("POST", "url", {"url": url})

    def run(self, script: str, *values: object) -> Any:
        """What a script returns; ``arguments`` holds the values."""
        return self._call("POST", "execute/sync", {"script": script, "args": values})

    def wait(self, condition: str, seconds: float = 60) -> Any:
        """Wait until an expression of the page is true, and return it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            value = self.run(f"return {condition}")
            if value:
                return value
            time.sleep(0.05)
        raise AssertionError(
            f"never came true: {condition}; the page says {self.run('return document.body.innerText')}"
        )

    def element(self, selector: str) -> str:
        return self._call("POST", "element", {"using": "css selector", "value": selector})[ELEMENT]

    def click(self, selector: str) -> None:
        self._call("POST", f"element/{self.element(selector)}/click", {})

    def give_file(self, selector: str, path: Path) -> None:
        """Choose a file in an input of type file."""
        self._call("POST", f"element/{self.element(selector)}/value", {"text": str(path)})

    def drag(self, selector: str, points: list[tuple[float, float]]) -> None:
        """Press the mouse at the first point, move over the others, release. Points are fractions of the element."""
        box = self.run(
            "const b = document.querySelector(arguments[0]).getBoundingClientRect();"
            "return [b.left, b.top, b.width, b.height]",
            selector,
        )
        places = [(round(box[0] + x * box[2]), round(box[1] + y * box[3])) for x, y in points]
        moves = [{"type": "pointerMove", "duration": 20, "x": x, "y": y} for x, y in places]
        actions = [moves[0], {"type": "pointerDown", "button": LEFT}, *moves[1:], {"type": "pointerUp", "button": LEFT}]
        mouse = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": actions}
        self._call("POST", "actions", {"actions": [mouse]})

    def resize(self, width: int, height: int) -> None:
        """Show the page as on a screen of this size. A window cannot be as narrow as a phone."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("POST", "goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": size})
        self.wait(f"window.innerWidth === {width}")

    def screenshot(self) -> bytes:
        """The window as a PNG."""
        return base64.b64decode(self._call("GET", "screenshot"))

    def requests(self) -> list[str]:
        """Addresses of all requests of pages since the last call, without those of the browser's own start page."""
        log = self._call("POST", "se/log", {"type": "performance"})
        events = [json.loads(one["message"])["message"] for one in log]
        urls = [one["params"]["request"]["url"] for one in events if one["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith("chrome")]

    def complaints(self) -> list[str]:
        """What the page wrote to the browser's console since the last call."""
        return [one["message"] for one in self._call("POST", "se/log", {"type": "browser"})]

    def _call(self, method: str, path: str, body: object = None) -> Any:
        return self._ask(method, f"/session/{self.session}/{path}", body)

    def _ask(self, method: str, path: str, body: object = None) -> Any:
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.root + path, content, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(error.read().decode()[:2000]) from error
