"""What tests of the report share: a browser that tells what a page says and asks for."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Opened = tuple[list[str], list[str]]
BAD_PAGE = """<!doctype html><img src="http://gossamer.invalid/x.png">
<link rel="stylesheet" href="http://gossamer.invalid/x.css"><script src="http://gossamer.invalid/x.js"></script>
<script>fetch("http://gossamer.invalid/data"); throw new Error("seen")</script>"""


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Opened]:
    """Opens a page in headless Chromium; gives the lines on its console and the addresses it asked for.

    The browser asks for things of its own. A page that asks for pictures, styles, scripts and data shows by which
    sign (Chromium's traffic annotation) a page's requests are known; it also proves that the test would see them.
    """
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((path for name in names if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip("Chromium is not installed")
    folder = tmp_path_factory.mktemp("chromium")

    def look(page: Path) -> tuple[list[str], set[tuple[str, str]]]:
        log = folder / "net.json"
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
        command += ["--disable-background-networking", "--disable-component-update", "--no-first-run"]
        command += [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", "--virtual-time-budget=2000"]
        done = subprocess.run(
            [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert "</html>" in done.stdout
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        text = log.read_text(encoding="utf-8", errors="replace")
        return console, set(re.findall(r'"traffic_annotation":(\d+),"url":"((?:https?|wss?|ftp)://[^"]*)"', text))

    bad = folder / "bad.html"
    bad.write_text(BAD_PAGE)
    console, asked = look(bad)
    signs = {sign for sign, place in asked if "gossamer.invalid" in place}
    assert any("seen" in line for line in console)
    assert {place.rpartition("/")[2] for sign, place in asked if sign in signs} >= {"x.png", "x.css", "x.js", "data"}

    def opened(page: Path) -> Opened:
        console, asked = look(page)
        return console, sorted(place for sign, place in asked if sign in signs)

    return opened
