"""Touch, gamepad and pictures in the page: what the fingers do arrives in the world."""

import re
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, expect

from owl.play.beside import SideBySide
from owl.play.server import Server
from tests.helpers.browser import in_background, play, until
from tests.helpers.play import Canvas, Strip
from tests.play.conftest import PATIENCE

FULL, PIXELS = 4.0, 40  # of the strip's axis; pixels that equal a full deflection
PLUG = """() => {
    const buttons = Array.from({ length: 17 }, () => ({ pressed: false }));
    window.pad = { connected: true, axes: [0, 0, 0, 0], buttons };
    navigator.getGamepads = () => [null, window.pad];
}"""


def world() -> Strip:
    """A world for fingers."""
    return Strip(size=(48, 64), fps=30)


def actions(server: Server) -> list[tuple[bool, bool, float]]:
    """Forward, attack and movement of every frame so far."""
    return [(*map(bool, action.buttons), float(action.axes[0])) for action in server.session.log().actions]


def after(page: Page, frames: int = 3) -> None:
    """Wait for some more frames."""
    until(page, f"(window.from ??= Number(picture.dataset.frame)) + {frames} <= Number(picture.dataset.frame)")
    page.evaluate("delete window.from")


def test_fingers_move_look_and_attack(page: Page, tmp_path: Path) -> None:
    with in_background(world(), tmp_path) as server:
        play(page, server)
        devtools = page.context.new_cdp_session(page)
        box = page.locator("#stage").bounding_box()
        assert box is not None
        left, right = (box["x"] + share * box["width"] for share in (0.25, 0.75))
        middle = box["y"] + box["height"] / 2

        def touch(kind: str, *points: tuple[int, float, float]) -> None:
            fingers: list[dict[str, Any]] = [{"id": number, "x": x, "y": y} for number, x, y in points]
            devtools.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})

        touch("touchStart", (1, left, middle))
        touch("touchMove", (1, left, middle - 60))
        page.wait_for_selector("#stick:visible")
        assert page.locator("#keys .down").inner_text().startswith("Forward")
        after(page)
        # another finger looks around, while the first one stays
        touch("touchStart", (1, left, middle - 60), (2, right, middle))
        for way in (20, 50, 80):
            touch("touchMove", (1, left, middle - 60), (2, right + way, middle))
        after(page)
        touch("touchEnd")
        page.wait_for_selector("#stick", state="hidden")
        after(page)
        done = actions(server)
        assert any(forward for forward, _, _ in done)
        assert not any(attack for _, attack, _ in done)
        assert abs(sum(moved for _, _, moved in done) - 80 / PIXELS * FULL) < 1e-4
        assert done[-1] == (False, False, 0.0)
        touch("touchStart", (3, right, middle))
        touch("touchEnd")
        page.wait_for_selector("#keys .down")
        after(page)
        assert any(attack for _, attack, _ in actions(server))


def test_a_picture_of_the_player_starts_a_world(page: Page, tmp_path: Path) -> None:
    picture = tmp_path / "red.png"
    Image.new("RGB", (300, 100), (250, 10, 10)).save(picture)
    (tmp_path / "text.png").write_text("no picture", "utf-8")
    with in_background(world(), tmp_path) as server:
        page.goto(server.url)
        page.wait_for_selector("#picture[data-frame='0']")
        page.set_input_files("#upload", tmp_path / "text.png")
        expect(page.locator("#notice")).to_contain_text("text.png is not a picture", timeout=PATIENCE)
        page.set_input_files("#upload", picture)
        page.wait_for_selector("#scenes button:nth-child(3)[aria-pressed='true']")
        until(page, "document.querySelector('#scenes button:nth-child(3) img').naturalWidth === 64")
        red = "picture.getContext('2d').getImageData(32, 24, 1, 1).data"
        until(page, f"{red}[0] > 200 && {red}[1] < 60")


def test_the_meters_of_worlds_side_by_side_are_shown(page: Page, tmp_path: Path) -> None:
    with in_background(SideBySide([Canvas(follows=True), Canvas(follows=False)]), tmp_path) as server:
        play(page, server)
        index = server.world.description.buttons.index("fire")
        page.locator("#keys button").nth(index).dispatch_event("pointerdown")
        expect(page.locator("#agreement")).to_have_text("100% · 0%", timeout=PATIENCE)
        expect(page.locator("#read dt")).to_have_text("Fire")
        expect(page.locator("#drift")).to_have_text(re.compile(r"\d\.\d\d · \d\.\d\d"))
    with in_background(world(), tmp_path) as server:
        play(page, server)
        assert page.locator("#agreement-field, #drift-field").filter(visible=True).count() == 0  # nothing is measured


def test_a_gamepad_moves_turns_and_attacks_until_it_is_unplugged(page: Page, tmp_path: Path) -> None:
    with in_background(world(), tmp_path) as server:
        play(page, server)
        page.evaluate(PLUG)
        page.evaluate("() => { pad.axes = [0.1, 0.1, 0.15, 0]; }")  # at rest, as far as worn sticks are
        after(page)
        assert set(actions(server)) == {(False, False, 0.0)}
        page.evaluate("() => { pad.axes = [0, -1, 0.5, 0]; pad.buttons[7].pressed = true; }")
        page.wait_for_selector("#keys .down >> nth=1")
        after(page)
        assert actions(server)[-1] == (True, True, FULL / 2)
        page.evaluate("() => { pad.axes = [0, 0, -1, 0]; pad.buttons[7].pressed = false; }")
        until(page, "document.querySelectorAll('#keys .down').length === 0")
        after(page)
        assert actions(server)[-1] == (False, False, -FULL)
        page.evaluate("() => { pad.axes = [0, -1, 1, 0]; }")
        page.wait_for_selector("#keys .down")
        page.evaluate("() => { navigator.getGamepads = () => [null, null]; }")
        until(page, "document.querySelectorAll('#keys .down').length === 0")
        after(page)
        assert actions(server)[-1] == (False, False, 0.0)
