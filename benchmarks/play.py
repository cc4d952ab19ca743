"""A world model played in a headless browser for minutes, against its own frame rate.

    python -m benchmarks.play WORLD [--minutes 10] [options of `python -m owl play`]

Serves the world by the command line, opens the page in the system's Chromium, and presses and releases keys all the
time. Prints, for each minute and for all, the frames per second that the page shows (the baseline is the frame rate of
the world), the time from input to photon (the baseline is the time between two frames, the target at most 2.5 of it),
gaps in the sound, and the memory of the server against that after the first minute. Without WORLD the real game
`deathmatch` is played.
"""

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

KEYS = ("KeyW", "KeyA", "ArrowLeft", "Space", "ArrowRight", "KeyD")
HELD = 0.4  # seconds


def memory(process: int) -> float:
    """Return the resident memory of a process in MiB."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def numbers(page: Page, element: str) -> list[float]:
    """Return the numbers that an element of the page shows."""
    return [float(number) for number in re.findall(r"[\d.]+", page.inner_text(f"#{element}"))]


def play(page: Page, seconds: float) -> tuple[float, float, float]:
    """Press keys for some time; return the frames per second, and the p50 and p95 from input to photon in ms."""
    begin, first = time.monotonic(), int(page.get_attribute("#picture", "data-frame") or 0)
    while time.monotonic() - begin < seconds:
        for key in KEYS:
            page.keyboard.down(key)
            time.sleep(HELD)
            page.keyboard.up(key)
    frames = int(page.get_attribute("#picture", "data-frame") or 0) - first
    _, middle, _, late = numbers(page, "latency")
    return frames / (time.monotonic() - begin), middle, late


def compared(page: Page, shown: float, middle: float, late: float) -> str:
    """Compare frames per second and latencies with the frame rate of the world."""
    rate = numbers(page, "rate")[-1]
    return (
        f"{shown:5.1f} frames/s of {rate:g} ({shown / rate:4.2f}x)   input to photon p50 {middle:3.0f} ms, "
        f"p95 {late:3.0f} ms ({late * rate / 1000:4.2f} frames)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", nargs="?")
    parser.add_argument("--minutes", type=int, default=1)
    parser.add_argument("--screenshot", type=Path, help="PNG of the page in the end")
    options, rest = parser.parse_known_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        print("this benchmark needs a browser: install chromium")
        return
    world = [options.world] if options.world else ["deathmatch", "--game"]
    command = [sys.executable, "-m", "owl", "play", *world, "--port", "0", "--browser", "false", *rest]
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as driver:
        assert server.stdout is not None
        address = next((line for line in server.stdout if line.startswith("Play ")), None)
        if address is None:
            raise SystemExit(server.wait())
        print(f"{' '.join(command[2:])}\n  page served after                {time.monotonic() - started:6.1f} s")
        sandbox = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        browser = driver.chromium.launch(executable_path=chromium, args=sandbox)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(address.split()[-4])
        page.wait_for_selector("#picture[data-frame='0']")
        print(f"  first picture after              {time.monotonic() - started:6.1f} s")
        page.click("#toggle-stats")
        page.click("#begin")
        page.wait_for_selector("#stage.playing")
        heard, minutes = page.is_visible("#sound-row"), []
        for minute in range(options.minutes):
            minutes.append((*play(page, 60), memory(server.pid)))
            gaps = f"   {page.inner_text('#sound').split('·')[-1].strip()} of the sound" if heard else ""
            print(
                f"  minute {minute + 1:2d}   {compared(page, *minutes[-1][:3])}   ({minutes[-1][3]:.0f} MiB){gaps}",
                flush=True,
            )
        shown, middle, late, _ = (sum(values) / len(minutes) for values in zip(*minutes, strict=True))
        print(f"  all         {compared(page, shown, middle, late)}")
        print(f"  memory of the last minute {minutes[-1][3] / minutes[0][3]:4.2f}x that of the first")
        print("  " + re.sub(r"\s+", " ", page.inner_text("#parts")))
        if options.screenshot:
            page.screenshot(path=options.screenshot)
        browser.close()
        server.terminate()


if __name__ == "__main__":
    main()
