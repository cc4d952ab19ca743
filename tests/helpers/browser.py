"""The page in a real browser, served by a world from another thread."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page

from owl.play.server import Server
from owl.play.world import World
from tests.helpers.play import serving


@contextmanager
def in_background(world: World, folder: Path) -> Iterator[Server]:
    """Serve a world from another thread."""
    ready, over, found = threading.Event(), asyncio.Event(), []

    async def serve() -> None:
        async with serving(world, folder) as server:
            found.extend([server, asyncio.get_running_loop()])
            ready.set()
            await over.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(60)
        yield found[0]
    finally:
        found[1].call_soon_threadsafe(over.set)
        thread.join()


def reach(page: Page, number: int) -> None:
    """Wait for a frame."""
    until(page, f"Number(document.getElementById('picture').dataset.frame) >= {number}")


def until(page: Page, condition: str) -> None:
    """Wait until an expression holds; `Page.wait_for_function` needs `eval`, which the page forbids."""
    deadline = time.monotonic() + 60
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        time.sleep(0.02)


def play(page: Page, server: Server) -> None:
    """Open the page, with its timing, and play."""
    page.goto(server.url)
    page.wait_for_selector("#picture[data-frame='0']")
    page.click("#toggle-stats")
    page.click("#begin")
    page.wait_for_selector("#stage.playing")
