"""The tests of the page drive the Chromium of the system; `.ci/run` installs it, other machines may not have it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

from tests.helpers.exports import make_exports

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 60_000  # milliseconds

collect_ignore_glob = [] if CHROMIUM else ["test_page*.py"]


@pytest.fixture(scope="package")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a world model that is heard."""
    return make_exports(tmp_path_factory.mktemp("exports"))


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """A page of a browser; errors of its scripts fail the test."""
    errors: list[str] = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 760}, has_touch=True)
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        yield page
        browser.close()
    assert not errors
