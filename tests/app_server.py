"""The app, served on a free port of this machine, and the ways through its pages that tests and screenshots share."""

import shutil
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

TOKEN = "secret-token"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)


@contextmanager
def serve(model: Path | str, runs: Path):
    """The address of the app, without its token."""
    import uvicorn

    from sfumato.app.pages import build

    app = build(str(model), runs=runs, token=TOKEN, host="127.0.0.1", password=None, language="en")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 60
    while not server.started:
        assert time.monotonic() < end, "the app does not start"
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


@contextmanager
def chromium():
    """Chromium, without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def tab(page, name):
    """Open a tab; returns its panel."""
    page.get_by_role("tab", name=name, exact=True).click()
    return page.get_by_role("tabpanel").locator("visible=true").first


def take_up_brush(page, here):
    """In Redraw, bring the last drawn image into the editor and choose the brush; returns the middle of the image."""
    here.get_by_role("button", name="Use the last drawn image").click()
    here.get_by_role("button", name="Brush", exact=True).click()
    here.locator("canvas").first.wait_for()
    page.wait_for_timeout(2000)  # the editor has no sign of its own that the image is in it
    box = here.locator("canvas").first.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
