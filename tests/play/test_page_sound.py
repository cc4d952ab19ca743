"""Sound in the page: what the world sounds like arrives at the speaker, without gaps, whatever arrives late."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import Page, expect

from tests.helpers.browser import in_background, play, until
from tests.helpers.play import Strip
from tests.play.conftest import PATIENCE

RATE, PART, PITCH = 8000, 320, 100.0  # 25 parts per second
LISTEN = """() => { // also at what goes to the speaker
    const connect = AudioNode.prototype.connect;
    AudioNode.prototype.connect = function (target, ...rest) {
        if (target instanceof AudioDestinationNode) {
            const ear = new AnalyserNode(target.context, { fftSize: 4096 });
            connect.call(this, ear);
            window.loudness = () => {
                const samples = new Float32Array(4096);
                ear.getFloatTimeDomainData(samples);
                return Math.max(...samples.map(Math.abs));
            };
        }
        return connect.call(this, target, ...rest);
    };
}"""
SIMULATE = """async ({ rate, part, pitch, arrivals, seconds, rests }) => {
    const { JitterBuffer } = await import("/page/jitter.js");
    const buffer = new JitterBuffer(1, rate), heard = new Float32Array(128 * Math.floor(seconds * rate / 128));
    const sample = (n) => Math.round(16000 * Math.sin(2 * Math.PI * pitch * n / rate));
    let number = 0, late = 0;
    for (let at = 0; at < heard.length; at += 128) {
        for (; number < arrivals.length && arrivals[number] <= at / rate; number += 1) {
            buffer.push(number, Int16Array.from({ length: part }, (_, i) => sample(number * part + i)), at / rate);
            late = Math.max(late, buffer.waiting);
        }
        if (rests !== null && at / rate >= rests) buffer.rest();
        buffer.pull([heard.subarray(at, at + 128)]);
    }
    const { underruns, speed, reserve } = buffer;
    return { heard: Array.from(heard), underruns, speed, reserve, late };
}"""
SLOPE = 16000 / 32767 * 2 * np.pi * PITCH / RATE
"""Largest difference of neighbouring samples of the tone."""


def simulate(page: Page, arrivals: np.ndarray, seconds: float, rests: float | None = None) -> dict[str, Any]:
    """Play parts of a tone that arrive at given times."""
    given = {"rate": RATE, "part": PART, "pitch": PITCH, "arrivals": arrivals.tolist(), "seconds": seconds}
    found = page.evaluate(SIMULATE, given | {"rests": rests})
    return found | {"heard": np.array(found["heard"])}


def silent(heard: np.ndarray, period: int = 80) -> float:
    """Return the seconds without sound: stretches of a period of so many samples or more."""
    periods = np.abs(heard[: len(heard) // period * period]).reshape(-1, period).max(1)
    return float((periods < 0.1).sum()) * period / RATE


def test_the_sound_of_the_world_is_heard_while_the_key_is_down(page: Page, tmp_path: Path) -> None:
    page.add_init_script(f"({LISTEN})()")
    with in_background(Strip(size=(48, 64), fps=25, sound=True), tmp_path) as server:
        play(page, server)
        page.keyboard.down("w")
        until(page, "window.loudness && window.loudness() > 0.3")
        page.keyboard.up("w")
        until(page, "window.loudness() < 0.01")
        expect(page.locator("#sound")).to_have_text(re.compile(r"\d+ ms late.* underrun"), timeout=PATIENCE)
        page.locator("#volume").fill("0")
        page.focus("#stage")
        page.keyboard.down("w")
        page.wait_for_selector("#keys .down")
        page.locator("#volume").fill("0.5")
        until(page, "window.loudness() > 0.15")
        page.keyboard.up("w")
        page.keyboard.press("Escape")
        page.wait_for_selector("#stage:not(.playing)")


def test_a_silent_world_has_no_controls_of_sound(page: Page, tmp_path: Path) -> None:
    with in_background(Strip(size=(48, 64), fps=25), tmp_path) as server:
        play(page, server)
        assert not page.locator("#volume").is_visible()
        assert not page.locator("#sound").is_visible()


def test_a_browser_without_sound_says_so_once(page: Page, tmp_path: Path) -> None:
    with in_background(Strip(size=(48, 64), fps=25, sound=True), tmp_path) as server:
        page.goto(server.url)
        page.wait_for_selector("#picture[data-frame='0']")
        page.evaluate(
            "() => { window.tried = 0; window.AudioContext = function () { tried += 1; throw Error('no device'); }; }"
        )
        page.click("#toggle-stats")
        expect(page.locator("#notice")).to_have_text("no device", timeout=PATIENCE)
        page.click("#begin")
        page.wait_for_selector("#stage.playing")
        page.keyboard.press("w")
        assert page.evaluate("window.tried") == 1
        expect(page.locator("#sound")).to_have_text("none in this browser", timeout=PATIENCE)


def test_parts_that_arrive_early_and_late_are_played_without_gaps(page: Page, tmp_path: Path) -> None:
    jitter = np.random.default_rng(0).uniform(-0.02, 0.02, 150)
    with in_background(Strip(), tmp_path) as server:
        page.goto(server.url)
        found = simulate(page, 0.1 + np.arange(150) * PART / RATE + jitter, seconds=6)
        heard = found["heard"]
        first = np.flatnonzero(np.abs(heard) > 0.01)[0] / RATE
        assert found["underruns"] == 0
        assert found["speed"] == 1
        assert 0.36 < first < 0.41  # the first part after three times the reserve
        assert silent(heard[int(0.41 * RATE) :]) == 0
        assert np.abs(np.diff(heard)).max() < 1.05 * SLOPE  # no clicks


def test_a_slow_world_is_heard_slower_and_not_in_pieces(page: Page, tmp_path: Path) -> None:
    jitter = np.random.default_rng(1).uniform(-0.02, 0.02, 70)
    with in_background(Strip(), tmp_path) as server:
        page.goto(server.url)
        found = simulate(page, 0.1 + np.arange(70) * 2 * PART / RATE + jitter, seconds=5.5)
        assert abs(found["speed"] - 0.5) < 0.03
        assert found["underruns"] <= 1  # until the speed is known
        tail = found["heard"][2 * RATE :]
        assert silent(tail) == 0
        assert np.abs(np.diff(tail)).max() < 0.6 * SLOPE
        crossings = np.count_nonzero(np.diff(np.sign(tail)))
        assert abs(crossings / (len(tail) / RATE) - PITCH) < 0.05 * PITCH  # an octave lower


def test_a_world_that_is_now_slower_and_now_faster_is_heard_without_gaps(page: Page, tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    drift = np.convolve(random.normal(0, 0.05, 600), 0.9 ** np.arange(50))[:600]
    arrivals = 0.1 + np.cumsum(1.1 * PART / RATE * np.exp(random.normal(0, 0.15, 600) + drift))
    with in_background(Strip(), tmp_path) as server:
        page.goto(server.url)
        found = simulate(page, arrivals, seconds=float(arrivals[-1]))
        assert found["underruns"] == 0
        assert silent(found["heard"][int(0.41 * RATE) :], period=200) == 0  # 80 at 0.4 of the speed
        assert found["late"] < 0.4  # what is later is skipped


def test_a_stall_is_one_underrun_and_enlarges_the_reserve(page: Page, tmp_path: Path) -> None:
    times = 0.1 + np.arange(100) * PART / RATE
    times[50:] += 0.5
    with in_background(Strip(), tmp_path) as server:
        page.goto(server.url)
        found = simulate(page, times, seconds=4.5)
        assert (found["underruns"], found["speed"]) == (1, 1)
        assert found["reserve"] > 0.1
        assert np.abs(np.diff(found["heard"])).max() < 2 * SLOPE  # fades, no clicks
        assert silent(found["heard"][int(0.41 * RATE) : int(4.2 * RATE)]) < 0.6
        assert simulate(page, times[:50], seconds=4.0, rests=2.0)["underruns"] == 0  # a pause is none


def test_a_backlog_is_skipped(page: Page, tmp_path: Path) -> None:
    times = np.concatenate([0.1 + np.arange(25) * PART / RATE, np.full(25, 1.1), 1.14 + np.arange(50) * PART / RATE])
    with in_background(Strip(), tmp_path) as server:
        page.goto(server.url)
        found = simulate(page, times, seconds=3.2)
        assert found["late"] < 0.4  # seconds
        assert found["underruns"] == 0
