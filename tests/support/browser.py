"""Debian's Chromium, driven by Playwright."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
ARGUMENTS = ["--no-sandbox", "--disable-gpu"]  # root has no sandbox, CI no GPU
WAIT_MS = 20_000


@contextmanager
def chromium() -> Iterator[Browser]:
    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


class Complaints:
    """What a page says that it should not: errors in its console, exceptions, requests to elsewhere."""

    def __init__(self, page: Page, url: str) -> None:
        self.found: list[str] = []
        page.set_default_timeout(WAIT_MS)
        page.on("console", lambda message: self._said(message.type, message.text))
        page.on("pageerror", lambda error: self.found.append(str(error)))
        page.on("request", lambda request: self._asked(request.url, url))

    def _said(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.found.append(text)

    def _asked(self, asked: str, url: str) -> None:
        if not asked.startswith(url):
            self.found.append(f"asked {asked}")
