"""A headless Chromium for tests of pages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chromium-headless-shell")


def program() -> str:
    """Path of the installed browser. Without one the test is skipped, and fails where CI runs."""
    found = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if found is None:
        reason = f"no Chromium: none of {', '.join(PROGRAMS)} is installed"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@contextmanager
def chromium() -> Iterator[Any]:
    """Playwright's handle of a browser that reaches no network."""
    from playwright.sync_api import sync_playwright

    quiet = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"
    executable = program()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=[*quiet.split(), "--disable-sync"])
        try:
            yield browser
        finally:
            browser.close()
