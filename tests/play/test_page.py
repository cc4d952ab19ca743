"""The page in a real browser: a person plays the real game, goes back, plays on differently, and records it."""

import asyncio
import base64
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
from playwright.sync_api import Page, expect, sync_playwright

from owl.data.shards import DatasetInfo
from owl.data.windows import WindowDataset
from owl.play.game import GameWorld
from owl.play.log import ActionLog
from owl.play.replay import replay
from owl.play.server import Server
from owl.play.world import World
from tests.helpers.play import serving
from tests.helpers.tiny import owl_here
from tests.play.conftest import CHROMIUM

SIZE = (120, 160)
PATIENCE = 60_000  # milliseconds
KEEP_PICTURES = """() => {
    window.seen = [];
    const canvas = document.getElementById("picture");
    new MutationObserver(() => window.seen.push([Number(canvas.dataset.frame), canvas.toDataURL()])).observe(
        canvas, { attributeFilter: ["data-frame"] });
}"""


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


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """A page of a browser; errors of its scripts fail the test."""
    errors: list[str] = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 760})
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        yield page
        browser.close()
    assert not errors


def frame(page: Page) -> int:
    """Return the number of the frame that is shown."""
    return int(page.locator("#picture").get_attribute("data-frame") or -1)


def reach(page: Page, number: int) -> None:
    """Wait for a frame."""
    deadline = time.monotonic() + 60
    while frame(page) < number:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def movements(seen: list) -> list[float]:
    """Return by how many pixels the picture moved to the right from each frame to the next."""
    pictures = {}
    for number, url in seen:
        content = np.frombuffer(base64.b64decode(url.partition(",")[2]), np.uint8)
        grey = cv2.imdecode(content, cv2.IMREAD_GRAYSCALE).astype(np.float32)
        pictures[number] = grey[: SIZE[0] // 2]  # without the weapon, which stays
    pairs = [(pictures[n], pictures[n + 1]) for n in pictures if n + 1 in pictures]
    return [cv2.phaseCorrelate(a, b, cv2.createHanningWindow(a.shape[::-1], cv2.CV_32F))[0][0] for a, b in pairs]


def test_a_person_plays_goes_back_branches_and_records(page: Page, tmp_path: Path) -> None:
    with in_background(GameWorld("deathmatch", SIZE), tmp_path) as server:
        page.goto(server.url)
        page.wait_for_selector("#picture[data-frame='0']")
        assert page.title() == "deathmatch · OWL"
        page.click("#toggle-stats")
        page.click("#begin")
        page.wait_for_selector("#stage.playing")
        page.evaluate(KEEP_PICTURES)
        page.keyboard.down("ArrowRight")
        reach(page, 40)
        page.keyboard.up("ArrowRight")
        moved = movements(page.evaluate("window.seen"))
        assert len(moved) >= 5
        assert np.median(moved) < -1  # who turns to the right sees the world move to the left
        expect(page.locator("#latency")).to_contain_text("p95", timeout=PATIENCE)
        page.keyboard.press("p")
        page.wait_for_selector("#stage:not(.playing)")
        assert page.locator(".branch button").count() >= 2

        page.locator(".branch button").first.click()
        page.wait_for_selector("#picture[data-frame='0']")
        page.keyboard.press("v")
        page.wait_for_selector("#recording-mark:visible")
        page.focus("#stage")
        page.keyboard.press("Enter")
        page.wait_for_selector("#stage.playing")
        page.keyboard.down("ArrowLeft")
        page.keyboard.down("w")
        assert page.locator("#keys .down").inner_text().startswith("Forward")
        reach(page, 40)
        page.keyboard.up("w")
        page.keyboard.press("Escape")
        page.wait_for_selector("#stage:not(.playing)")
        page.keyboard.press("v")
        page.wait_for_selector("#recordings a >> nth=1")
        assert page.locator(".branch").count() == 2
        (log,) = tmp_path.glob("*.jsonl")

    played = ActionLog.load(log)
    assert len(played.actions) >= 40
    assert any(action.buttons[1] for action in played.actions)
    turned = [float(action.axes[0]) for action in played.actions]
    assert {-6.0} <= set(turned) <= {0.0, -6.0}  # the branch holds what was done in it, not what was done before
    world = GameWorld("deathmatch", SIZE)
    assert all(found.same for found in replay(played, world))
    world.close()

    dataset = tmp_path / "dataset"
    assert owl_here("data", "record", dataset, "--actions", log, "--size", "48x64", "--workers", "1", cwd=tmp_path) == 0
    assert all(DatasetInfo.load(dataset).splits.values())
    windows = WindowDataset(dataset, "train", ["rgb", "controls"], length=8, hop=8)
    assert float(windows.batch(range(len(windows)))["axes"].mean()) < 0
