"""Screenshots of the app for `docs/guide/app.md`: `python -m docs.screenshots runs/demo` after `make demo`.

Draws with the packaged model and shows the run that is given. Needs Chromium and `pip install 'sfumato[app]' playwright`.
"""

import argparse
import shutil
import socket
import threading
from pathlib import Path

import uvicorn
from playwright.sync_api import Locator, Page, sync_playwright

from sfumato.app.pages import build
from sfumato.pipelines.locate import DEFAULT

IMAGES = Path(__file__).parent / "images"
PROMPTS = "red heart\nrocket\ngrinning face\ngreen book\nblue apple\nwoman firefighter dark skin tone\n火箭\nyellow mushroom"
TOKEN = "screenshots"


def main() -> None:
    """See the module."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("run", type=Path, help="a finished run, for the tab Runs")
    run = options.parse_args().run.resolve()
    app = build(DEFAULT, runs=run.parent, token=TOKEN, host="127.0.0.1", password=None, language="en")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    threading.Thread(target=server.run, daemon=True).start()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(300_000)
        page.goto(f"http://127.0.0.1:{port}/?token={TOKEN}")
        _draw(page)
        _redraw(page)
        _why(page)
        _runs(page, run.name)
        browser.close()
    server.should_exit = True


def _tab(page: Page, name: str) -> Locator:
    page.get_by_role("tab", name=name, exact=True).click()
    return page.get_by_role("tabpanel").locator("visible=true").first


def _save(page: Page, name: str) -> None:
    page.wait_for_timeout(1500)  # images fade in
    page.screenshot(path=IMAGES / f"app-{name}.png")


def _draw(page: Page) -> None:
    here = _tab(page, "Draw")
    here.get_by_label("Prompts, one per line").fill(PROMPTS)
    here.get_by_role("button", name="Draw", exact=True).click()
    here.locator("button.thumbnail-item, .grid-container button").nth(7).wait_for()
    command = here.get_by_label("The equivalent command")
    page.wait_for_function("e => e.value.includes('mushroom')", arg=command.element_handle())
    _save(page, "draw")


def _redraw(page: Page) -> None:
    here = _tab(page, "Redraw")
    here.get_by_role("button", name="Use the last drawn image").click()
    here.get_by_role("button", name="Brush", exact=True).click()
    here.locator("canvas").first.wait_for()
    page.wait_for_timeout(2000)  # the editor has no sign of its own that the image is in it
    box = here.locator("canvas").first.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 60, y - 20)
    page.mouse.down()
    for row in range(5):
        page.mouse.move(x + 60, y - 20 + 12 * row, steps=5)
        page.mouse.move(x - 60, y - 14 + 12 * row, steps=5)
    page.mouse.up()
    here.get_by_label("Prompt", exact=True).fill("purple mushroom")
    here.get_by_role("button", name="Redraw", exact=True).click()
    here.locator("button.thumbnail-item img, .grid-container img").first.wait_for()
    _save(page, "redraw")


def _why(page: Page) -> None:
    here = _tab(page, "Why")
    here.get_by_label("Prompt", exact=True).fill("woman firefighter dark skin tone")
    here.get_by_role("button", name="Ask", exact=True).click()
    here.get_by_label("2. firefighter").wait_for()
    here.get_by_text("2. firefighter").click()
    _save(page, "why")


def _runs(page: Page, name: str) -> None:
    here = _tab(page, "Runs")
    here.get_by_role("button", name="Refresh").click()
    here.get_by_label("Run", exact=True).click()
    page.get_by_role("option", name=name, exact=True).click()
    here.get_by_text(f"{name}: ", exact=False).first.wait_for()
    page.wait_for_timeout(3000)  # charts
    _save(page, "runs")


if __name__ == "__main__":
    main()
