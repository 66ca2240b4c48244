"""A headless Chromium that opens, checks and prints pages, driven by its DevTools protocol.

Needs an installed Chromium or Chrome, and no Python package beyond Tornado, which Jupyter brings. Checks of
accessibility need axe-core-python.
"""

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
import time
import urllib.request
from importlib.resources import files
from pathlib import Path

from tornado.websocket import websocket_connect

NAMES = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--no-first-run",
    "--remote-debugging-port=0",
]
DRAWN = "document.fonts.ready.then(() => window.MathJax?.startup?.promise).then(() => true)"
SIDEWAYS = """
(() => {
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth <= width) return [];
  const inside = node => node && (getComputedStyle(node).overflowX !== "visible" || inside(node.parentElement));
  return [...document.querySelectorAll("article *")]
    .filter(node => node.getBoundingClientRect().right > width + 1 && !inside(node.parentElement))
    .map(node => node.outerHTML.slice(0, 120)).concat([`the page is ${document.documentElement.scrollWidth} px wide`]);
})()"""
# Sphinx writes the reference and the list of citations, the theme a logo outside of all landmarks.
AXE = """
axe.run(
  {exclude: [["dl.py"], [".citation-list"]]},
  {resultTypes: ["violations"], rules: {region: {enabled: false}}},
).then(result => result.violations.map(broken => [broken.id, broken.nodes.map(node => node.target.join(" "))]))"""


def find_chromium() -> str | None:
    """Return the path of an installed Chromium or Chrome, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab of a headless Chromium. Use it in a `with` statement.

    `open` loads a page; `events` then holds what the page did, and `evaluate` runs a script in it.
    """

    def __init__(self, program: str, profile: Path) -> None:
        self.events: list[dict] = []
        self.loop = asyncio.new_event_loop()
        command = [program, *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        address = f"http://127.0.0.1:{self.port(profile / 'DevToolsActivePort')}/json/list"
        with urllib.request.urlopen(address, timeout=30) as answer:
            tab = next(target for target in json.load(answer) if target["type"] == "page")
        self.socket = self.run(websocket_connect, tab["webSocketDebuggerUrl"], max_message_size=2**28)
        self.number = 0
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def port(self, file: Path) -> int:
        """Wait until Chromium has written the port it listens on, and return it."""
        for _ in range(300):
            with contextlib.suppress(FileNotFoundError, IndexError):
                return int(file.read_text().split()[0])
            time.sleep(0.1)
        raise TimeoutError(f"Chromium did not write {file} within 30 s")

    def run(self, function, *arguments, **options):
        """Call a function of Tornado and wait at most five minutes for its result."""

        async def awaited():
            return await asyncio.wait_for(function(*arguments, **options), 300)

        return self.loop.run_until_complete(awaited())

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(30)
        self.loop.close()

    def receive(self) -> dict:
        """Return the next message, and keep it if it is an event."""
        message = json.loads(self.run(self.socket.read_message))
        if "method" in message:
            self.events.append(message)
        return message

    def call(self, method: str, **parameters) -> dict:
        """Send a command and return its result. Raises RuntimeError if Chromium refuses it."""
        self.number += 1
        command = {"id": self.number, "method": method, "params": parameters}
        self.run(self.socket.write_message, json.dumps(command))
        while (answer := self.receive()).get("id") != self.number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def evaluate(self, script: str):
        """Return the value of a script, or of the promise that it returns. Raises RuntimeError if it throws."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def open(self, address: str, width: int, height: int = 900) -> None:
        """Load a page in a window of `width` by `height` pixels and wait until fonts and formulas are drawn."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.events.clear()
        self.call("Page.navigate", url=address)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.receive()
        self.evaluate(DRAWN)

    def pdf(self, footer: str) -> bytes:
        """Return the page printed on A4, with an outline and `footer` (HTML) on each sheet."""
        centimetre = 1 / 2.54
        margins = {f"margin{side}": 1.8 * centimetre for side in ("Top", "Bottom", "Left", "Right")}
        options = {"headerTemplate": "<span></span>", "footerTemplate": footer, "displayHeaderFooter": True, **margins}
        options |= {"paperWidth": 21 * centimetre, "paperHeight": 29.7 * centimetre, "printBackground": True}
        answer = self.call("Page.printToPDF", **options, generateTaggedPDF=True, generateDocumentOutline=True)
        return base64.b64decode(answer["data"])

    def remote_requests(self) -> list[str]:
        """Return the addresses that the page asked for on other machines."""
        sent = [event["params"]["request"]["url"] for event in self.events if "requestWillBeSent" in event["method"]]
        return [address for address in sent if address.startswith(("http:", "https:", "ws:", "wss:"))]

    def errors(self) -> list[str]:
        """Return the messages of exceptions and of the console's errors."""
        found = []
        for event in self.events:
            details = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(details["exceptionDetails"]["exception"]["description"])
            elif event["method"] == "Log.entryAdded" and details["entry"]["level"] == "error":
                found.append(details["entry"]["text"])
            elif event["method"] == "Runtime.consoleAPICalled" and details["type"] == "error":
                found.append(str([argument.get("value") for argument in details["args"]]))
        return found

    def sideways(self) -> list[str]:
        """Return the elements that make the page wider than its window."""
        return self.evaluate(SIDEWAYS)

    def violations(self) -> list[tuple[str, list[str]]]:
        """Return the rules of axe-core that the page breaks, each with the selectors of the elements."""
        self.evaluate(files("axe_core_python").joinpath("axe.min.js").read_text(encoding="utf-8") + ";true")
        return [tuple(violation) for violation in self.evaluate(AXE)]
