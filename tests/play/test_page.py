"""The page in a real browser: a person plays the real game, goes back, plays on differently, and records it."""

import base64
from pathlib import Path

import cv2
import numpy as np
from playwright.sync_api import Page, expect

from owl.data.shards import DatasetInfo
from owl.data.windows import WindowDataset
from owl.play.game import GameWorld
from owl.play.log import ActionLog
from owl.play.replay import replay
from tests.helpers.browser import in_background, play, reach
from tests.helpers.tiny import owl_here
from tests.play.conftest import PATIENCE

SIZE = (120, 160)
KEEP_PICTURES = """() => {
    window.seen = [];
    const canvas = document.getElementById("picture");
    new MutationObserver(() => window.seen.push([Number(canvas.dataset.frame), canvas.toDataURL()])).observe(
        canvas, { attributeFilter: ["data-frame"] });
}"""


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
    with in_background(GameWorld("deathmatch", SIZE, sound=True), tmp_path) as server:
        play(page, server)
        assert page.title() == "deathmatch · OWL"
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
    world = GameWorld("deathmatch", SIZE, sound=True)
    assert all(found.same for found in replay(played, world))
    world.close()

    dataset = tmp_path / "dataset"
    assert owl_here("data", "record", dataset, "--actions", log, "--size", "48x64", "--workers", "1", cwd=tmp_path) == 0
    assert all(DatasetInfo.load(dataset).splits.values())
    windows = WindowDataset(dataset, "train", ["rgb", "controls"], length=8, hop=8)
    assert float(windows.batch(range(len(windows)))["axes"].mean()) < 0
