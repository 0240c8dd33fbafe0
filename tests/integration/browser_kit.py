"""A real browser for tests of pages: Debian's Chromium, installed like the brokers are when it is missing, and driven by selenium."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from unibus_contracts.supply.apt import install

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FACTOR = float(os.environ.get("UNIBUS_TEST_TIMEOUT_FACTOR", "1"))
# Nothing but what a test asks for; and as root there is no sandbox.
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class Page:
    """One page, open. `driver` is selenium's."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, file: Path, *, width: int = 1280, height: int = 900, dark: bool = False, media: str = "") -> None:
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": scheme})
        self.driver.get(file.as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of an expression of JavaScript."""
        return self.driver.execute_script(f"return {script}", *arguments)

    def console(self) -> list[str]:
        """What it has complained of since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]  # selenium's

    def requests(self, file: Path) -> list[str]:
        """Every URL that this page has asked for since the last call."""
        entries = self.driver.get_log("performance")  # type: ignore[no-untyped-call]  # selenium's
        events = [json.loads(entry["message"])["message"] for entry in entries]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        # Others are of the browser's own pages, such as the one it begins with.
        return [one["request"]["url"] for one in sent if one.get("documentURL", "").partition("#")[0] == file.as_uri()]


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """`folder`: for its profile, fresh. Raises SupplyError where there is no browser to be had: a test fails then, and skips nothing."""
    if not CHROMIUM.exists() or not DRIVER.exists():
        install("chromium", "chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # With its path given, selenium looks for no driver, and downloads none.
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    try:
        driver.set_page_load_timeout(60 * FACTOR)
        yield Page(driver)
    finally:
        driver.quit()
