"""Headless Chromium, for tests of the HTML pages that the package writes."""

import atexit
import json
import shutil
from functools import cache

import pytest

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SECONDS_TO_LOAD = 60
needs_chromium = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="Debian's chromium and chromium-driver are not installed"
)


@cache
def _driver():
    """Start the browser, which all pages share."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    atexit.register(driver.quit)
    return driver


class Page:
    """A page in the browser's only tab; use it in a `with` statement, one at a time.

    Args:
        path: path of the HTML file.
        width: width of the window in CSS pixels.
        scheme: colour scheme, "light" or "dark".
    """

    def __init__(self, path, *, width=1100, scheme="light"):
        self.path, self.width, self.scheme = path, width, scheme

    def __enter__(self):
        self.driver = _driver()
        self._open("about:blank")  # otherwise the same page would seem to be loaded
        for log in ("browser", "performance"):
            self.driver.get_log(log)  # discards the entries of earlier pages
        self.run_devtools(
            "Emulation.setDeviceMetricsOverride",
            width=self.width,
            height=900,
            deviceScaleFactor=1,
            mobile=self.width < 500,
        )
        self.set_colors(self.scheme)
        self._open(self.path.resolve().as_uri())
        return self

    def _open(self, address):
        """Open an address; on a busy machine, chromedriver may return before the page is parsed."""
        from selenium.webdriver.support.wait import WebDriverWait

        self.driver.get(address)
        loaded = ["complete", address]
        WebDriverWait(self.driver, SECONDS_TO_LOAD, poll_frequency=0.05).until(
            lambda _: self.evaluate("[document.readyState, location.href]") == loaded
        )

    def __exit__(self, *_):
        """Leave the page open; a tab for each page would need a process of the browser."""

    def run_devtools(self, command, **arguments):
        return self.driver.execute_cdp_cmd(command, arguments)

    def set_colors(self, scheme, media=""):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.run_devtools("Emulation.setEmulatedMedia", media=media, features=[feature])

    def evaluate(self, script):
        return self.driver.execute_script(f"return {script}")

    def console(self):
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self):
        """Return the addresses that the page requested, except for data URIs."""
        messages = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        requests = [m for m in messages if m["method"] == "Network.requestWillBeSent"]
        urls = [m["params"]["request"]["url"] for m in requests]
        return [url for url in urls if not url.startswith("data:")]
