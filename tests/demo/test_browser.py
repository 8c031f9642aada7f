"""The page in a real browser without a window, wide and at 390 pixels: search, upload, overlay, question, errors.

Needs Chromium or Chrome (on Debian: apt-get install chromium) and fails where there is none; SCL_BROWSER names another
one, SCL_SCREENSHOTS a folder for pictures of every step, SCL_DEMO_CHECKPOINTS (a list with commas) models to look at.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from tiny_model import free_port, gif, png, png_header, scenes

ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SIZES = {"wide": (1280, 900), "narrow": (390, 844)}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address(tiny_run):
    """The demo, as its command starts it."""
    port = free_port()
    models = os.environ.get("SCL_DEMO_CHECKPOINTS", str(tiny_run)).split(",")
    command = [sys.executable, "-m", "scl_jax.demo", *(f"--checkpoint={name}" for name in models)]
    command += ["--toy_scenes=12", f"--port={port}", "--max_upload=1"]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    try:
        for _ in range(180):
            assert process.poll() is None, "the demo ended by itself"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/")
                break
            except urllib.error.URLError:
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/"
        assert process.poll() is None, "the demo ended while it was used"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    names = [os.environ["SCL_BROWSER"]] if "SCL_BROWSER" in os.environ else BROWSERS
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.fail(f"no browser: {', '.join(names)} are not there; apt-get install chromium, or set SCL_BROWSER")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


class Visitor:
    """One who uses the page, and takes pictures of it."""

    def __init__(self, page, size):
        self.page, self.size, self.count = page, size, 0

    def tab(self, name):
        tab = self.page.get_by_role("tab", name=name, exact=True)
        menu = self.page.locator(".overflow-menu > button")
        tab.or_(menu).filter(visible=True).first.wait_for()  # tabs are laid out after the page is loaded
        if not tab.is_visible():  # narrow pages keep the last tabs in a menu
            menu.click()
            self.page.locator(".overflow-dropdown").get_by_text(name, exact=True).click()
        else:
            tab.click()

    def ask(self, label, text, button):
        self.page.get_by_label(label).fill(text)
        self.page.locator(f"#{button}-button").click()

    def press_until(self, button, text):
        """Presses until the message is there: a press while the last one is being answered does not count."""
        for _ in range(20):
            self.page.locator(f"#{button}-button").click()
            self.page.wait_for_timeout(1_000)
            if text in self.page.locator(f"#{button}-said").inner_text():
                return
        raise AssertionError(f"no {text!r}, but {self.page.locator(f'#{button}-said').inner_text()!r}")

    def upload(self, name, data):
        if self.page.locator("#picture button[aria-label='Clear']").count():
            self.page.locator("#picture button[aria-label='Clear']").click()
        self.page.locator("#picture input[type=file]").set_input_files(
            {"name": name, "mimeType": "image/png", "buffer": data}
        )

    def sees(self, selector, text=None):
        found = self.page.locator(selector).first
        found.wait_for(state="visible", timeout=60_000)
        if text is not None:
            self.page.wait_for_function(
                "([selector, text]) => document.querySelector(selector)?.innerText.includes(text)",
                arg=[selector, text], timeout=60_000,
            )  # fmt: skip
        return found

    def picture(self, name):
        self.count += 1
        if "SCL_SCREENSHOTS" in os.environ:
            folder = Path(os.environ["SCL_SCREENSHOTS"])
            folder.mkdir(parents=True, exist_ok=True)
            self.page.wait_for_timeout(400)
            self.page.screenshot(path=folder / f"{self.size}_{self.count}_{name}.png", full_page=True)


@pytest.fixture(params=SIZES)
def visitor(request, browser, address):
    width, height = SIZES[request.param]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="light")
    elsewhere, faults = [], []
    page.on("request", lambda sent: elsewhere.append(sent.url) if not is_own(sent.url, address) else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(address)
    visitor = Visitor(page, request.param)
    visitor.sees("#header h1", "scl_jax")
    yield visitor
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing to scroll sideways
    assert elsewhere == [] and faults == []
    page.close()


def is_own(url, address):
    return url.startswith((address, "data:", "blob:"))


def test_a_visit(visitor):
    visitor.picture("start")
    visitor.ask("What are you looking for?", "a red star", "search")
    visitor.sees("#found img")
    assert visitor.page.locator("#found img").count() == 6
    visitor.picture("search")
    visitor.page.locator("#found button:has(img)").first.click()
    visitor.sees("#picture img")

    scene = scenes("images", 3)[2]
    visitor.upload("scene.png", scene["media"])
    visitor.sees("#picture img")
    visitor.tab("Match & attention")
    visitor.ask("What could the picture show?", scene["captions"][0], "look")
    visitor.sees("#seen", "Match")
    visitor.sees("#seen img")
    assert visitor.page.locator("#seen img").count() >= 3  # the whole text, a colour, a shape
    visitor.picture("attention")

    visitor.tab("Ask")
    visitor.ask("Your question", "how many shapes are there?", "ask")
    visitor.sees("#answers .bar", "%")
    visitor.picture("question")
    visitor.tab("Fill in")
    visitor.ask("A text with <mask> for each hidden word", "a <mask> <mask>", "fill")
    visitor.sees("#words .bars + .bars")
    visitor.picture("words")


def test_whatever_is_handed_in_is_answered_with_a_message_and_the_page_goes_on(visitor):
    visitor.tab("Match & attention")
    visitor.ask("What could the picture show?", "a red star", "look")
    visitor.sees("#look-said", "Choose a picture first")
    for name, data, message in (
        ("notes.png", b"no picture at all", "notes.png: cannot decode image"),
        ("bomb.png", png_header(20_000, 20_000), "bomb.png: image has far more than 89478485 pixels"),
        ("cut.png", png()[:60], "cut.png: cannot decode"),
    ):
        visitor.upload(name, data)
        visitor.page.wait_for_timeout(800)
        visitor.press_until("look", message)
        visitor.picture(name.partition(".")[0])
    visitor.upload("huge.png", png() + bytes(2**21))
    visitor.page.get_by_text(re.compile("exceed", re.IGNORECASE)).first.wait_for(timeout=10_000)
    visitor.picture("huge")
    for name, data in (("dot.png", png(1, 1)), ("moving.gif", gif()), ("good.png", png())):
        visitor.upload(name, data)
        visitor.page.wait_for_timeout(800)
        visitor.page.locator("#look-button").click()
        visitor.sees("#seen img")
    visitor.page.get_by_label("What could the picture show?").fill(" ")
    visitor.press_until("look", "The text is empty")
    visitor.tab("Fill in")
    visitor.ask("A text with <mask> for each hidden word", "a red star", "fill")
    visitor.sees("#fill-said", "No <mask> among")
    visitor.picture("no_mask")
