"""Screenshots of the app for `docs/guide/app.md`: `python -m docs.screenshots runs/demo` after `make demo`.

Draws with the packaged model and shows the run that is given. Needs Chromium and `pip install 'sfumato[app]' playwright`.
"""

import argparse
from pathlib import Path

from playwright.sync_api import Page

from sfumato.pipelines.locate import DEFAULT
from tests.app_server import TOKEN, chromium, serve, tab, take_up_brush

IMAGES = Path(__file__).parent / "images"
PROMPTS = "red heart\nrocket\ngrinning face\ngreen book\nblue apple\nwoman firefighter dark skin tone\n火箭\nyellow mushroom"


def main() -> None:
    """See the module."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("run", type=Path, help="a finished run, for the tab Runs")
    run = options.parse_args().run.resolve()
    with serve(DEFAULT, run.parent) as address, chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(300_000)
        page.goto(f"{address}/?token={TOKEN}")
        _draw(page)
        _redraw(page)
        _why(page)
        _runs(page, run.name)


def _save(page: Page, name: str) -> None:
    page.wait_for_timeout(1500)  # images fade in
    page.screenshot(path=IMAGES / f"app-{name}.png")


def _draw(page: Page) -> None:
    here = tab(page, "Draw")
    here.get_by_label("Prompts, one per line").fill(PROMPTS)
    here.get_by_role("button", name="Draw", exact=True).click()
    here.locator("button.thumbnail-item, .grid-container button").nth(7).wait_for()
    command = here.get_by_label("The equivalent command")
    page.wait_for_function("e => e.value.includes('mushroom')", arg=command.element_handle())
    _save(page, "draw")


def _redraw(page: Page) -> None:
    here = tab(page, "Redraw")
    x, y = take_up_brush(page, here)
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
    here = tab(page, "Why")
    here.get_by_label("Prompt", exact=True).fill("woman firefighter dark skin tone")
    here.get_by_role("button", name="Ask", exact=True).click()
    here.get_by_label("2. firefighter").wait_for()
    here.get_by_text("2. firefighter").click()
    _save(page, "why")


def _runs(page: Page, name: str) -> None:
    here = tab(page, "Runs")
    here.get_by_role("button", name="Refresh").click()
    here.get_by_label("Run", exact=True).click()
    page.get_by_role("option", name=name, exact=True).click()
    here.get_by_text(f"{name}: ", exact=False).first.wait_for()
    page.wait_for_timeout(3000)  # charts
    _save(page, "runs")


if __name__ == "__main__":
    main()
