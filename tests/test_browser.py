"""The app in a real browser: draw, paint a mask, click a word, compare, start a run, watch, stop and resume it."""

import importlib.util
import io
import json
import re
import time

import numpy as np
import psutil
import pytest
import tiny
from app_server import CHROMIUM, TOKEN, chromium, serve, tab, take_up_brush
from PIL import Image

from sfumato.app import watch
from sfumato.training.train import main

missing = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(missing), reason=f"needs {' and '.join(missing)}: pip install gradio playwright"),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install --no-install-recommends chromium"),
]
SLOW = 60_000  # milliseconds that a busy machine may take


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, and the folder of runs that it is in."""
    folder = tmp_path_factory.mktemp("browser")
    path = tiny.config_file(
        folder, output_dir=str(folder / "runs" / "first"), train={"max_steps": 6}, checkpoint={"every_steps": 3, "keep": 2}
    )
    assert main([str(path)]) == 0
    return folder


@pytest.fixture(scope="module")
def server(place):
    """The address of the app with its token."""
    with serve(place / "runs" / "first", place / "runs") as address:
        yield f"{address}/?token={TOKEN}"


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@pytest.fixture
def page(browser, server):
    """The app, open; it asks nothing of other machines."""
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    asked: set[str] = set()
    page.on("request", lambda request: asked.add(request.url))
    page.set_default_timeout(SLOW)
    page.goto(server)
    page.get_by_role("tab", name="Draw", exact=True).wait_for()
    yield page
    page.close()
    own = server.partition("/?")[0]
    assert not [url for url in asked if not url.startswith((own, "data:", "blob:", own.replace("http", "ws")))]


def picture(page, label):
    """The image under a label, as it is shown."""
    image = page.get_by_role("tabpanel").locator("visible=true").locator(f"[data-testid='block-label']:has-text('{label}')")
    image = image.first.locator("xpath=ancestor::div[contains(@class,'block')][1]").locator("img").first
    image.wait_for()
    return Image.open(io.BytesIO(page.request.get(image.get_attribute("src")).body()))


def test_an_image_is_drawn_and_its_command_is_shown(page):
    here = tab(page, "Draw")
    here.get_by_label("Prompts, one per line").fill("a red circle\na blue square")
    here.get_by_role("spinbutton", name="number input for Steps").fill("2")
    here.get_by_role("button", name="Draw", exact=True).click()
    here.locator("button.thumbnail-item, .grid-container button").nth(1).wait_for()
    command = here.get_by_label("The equivalent command")
    page.wait_for_function("e => e.value.includes('blue square')", arg=command.element_handle())
    assert command.input_value().startswith("sfumato sample 'a red circle' 'a blue square'")


def first_of_gallery(page, here):
    thumbnail = here.locator("button.thumbnail-item img, .grid-container img").first
    thumbnail.wait_for()
    return Image.open(io.BytesIO(page.request.get(thumbnail.get_attribute("src")).body())).convert("RGB")


def test_what_is_painted_over_is_drawn_anew_and_the_rest_is_kept(page):
    here = tab(page, "Draw")
    here.get_by_role("spinbutton", name="number input for Steps").fill("2")
    here.get_by_role("button", name="Draw", exact=True).click()
    before = np.asarray(first_of_gallery(page, here), float)
    here = tab(page, "Redraw")
    middle = take_up_brush(page, here)
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 20, middle[1], steps=5)
    page.mouse.up()
    page.wait_for_timeout(1000)
    here.get_by_label("Prompt", exact=True).fill("a red circle")
    here.get_by_label("Seed").fill("7")
    here.get_by_role("button", name="Redraw", exact=True).click()
    after = np.asarray(first_of_gallery(page, here), float)
    changed = np.abs(after - before).max(-1) > 30
    assert changed[7:9, 7:9].any() and not changed[0].any() and not changed[:, 0].any(), "the middle, and no edge"
    assert 0 < changed.mean() < 0.5


def test_a_word_is_clicked_and_shows_where_it_was_read(page):
    here = tab(page, "Why")
    here.get_by_label("Prompt", exact=True).fill("a red circle")
    here.get_by_role("button", name="Ask", exact=True).click()
    word = here.get_by_label("2. red")
    word.wait_for()
    before = picture(page, "Where it was read").tobytes()
    here.get_by_text("3. circle").click()
    end = time.monotonic() + 60
    while picture(page, "Where it was read").tobytes() == before:
        assert time.monotonic() < end, "another word, another heat"
        page.wait_for_timeout(200)


def test_settings_are_compared_on_the_same_noise(page):
    here = tab(page, "Compare")
    here.get_by_label("Values, one per line").nth(0).fill("ddpm\nddim")
    here.get_by_label("Values, one per line").nth(1).fill("1, 2, 3")
    here.get_by_role("button", name="Compare", exact=True).click()
    here.get_by_text("-comparison").locator("visible=true").first.wait_for()
    sheet = picture(page, "The same noise")
    assert sheet.width > 2 * sheet.height / 2 and sheet.width > 300


def test_a_run_is_planned_started_watched_stopped_and_resumed(page, place):
    """The whole way of a first run: its config, the doctor, Start; then Stop, and Resume to its end."""
    here = tab(page, "Train")
    here.get_by_label("Preset").click()
    page.get_by_role("option", name="shapes", exact=True).click()
    here.get_by_label("Name of the run").fill("second")
    sections = {k: v for k, v in tiny.CONFIG.items() if k not in ("data", "train")}
    more = [f"{a}.{b}={json.dumps(v)}" for a, section in sections.items() for b, v in section.items()]
    more += ["data.num_pictures=64", f"data.cache_dir={place}/cache", "train.num_threads=1", "train.trackers=[]"]
    more += ["checkpoint.every_steps=50", "checkpoint.keep=1"]
    here.get_by_label("More settings, key=value, one per line").fill("\n".join(more))
    for key, value in {"data.resolution": 16, "train.batch_size": 4, "train.max_steps": 100000}.items():
        here.get_by_label(key, exact=True).fill(str(value))
    here.get_by_label("Search all settings").fill("warmup")
    here.get_by_text("optim.lr_warmup_steps").locator("visible=true").first.wait_for()
    here.get_by_role("button", name="Show the config").click()
    here.get_by_text("output_dir:").first.wait_for()  # of a long text the first lines are on the page
    assert "train.max_steps=100000" in here.get_by_label("The equivalent command").input_value()
    here.get_by_role("button", name="Ask the doctor").click()
    answer = here.get_by_label("Answer")
    page.wait_for_function("e => e.value.includes('training images')", arg=answer.element_handle())
    here.get_by_role("button", name="Start", exact=True).click()
    run = place / "runs" / "second"
    page.wait_for_function("e => e.value.startsWith('starting')", arg=answer.element_handle())
    try:
        wait_for(lambda: (run / "metrics.jsonl").exists() and watch.read_run(place / "runs", "second").step > 2, run)
        here = tab(page, "Runs")
        here.get_by_role("button", name="Refresh").click()
        here.get_by_label("Run", exact=True).click()
        page.get_by_role("option", name="second").click()
        here.get_by_text(": training", exact=False).first.wait_for()
        here.get_by_role("button", name="Sample now").click()
        wait_for(lambda: list((run / "samples").glob("step-*.png")), run)
        here.get_by_role("button", name="Stop and save").click()
        wait_for(lambda: not watch.is_training(run) and list(run.glob("checkpoints/step-*")), run)
        stopped = watch.read_run(place / "runs", "second").step
        here.get_by_role("button", name="Resume").click()
        wait_for(lambda: watch.read_run(place / "runs", "second").step > stopped, run)
        here.get_by_role("button", name="Stop and save").click()
        wait_for(lambda: not watch.is_training(run), run)
    finally:
        for process in psutil.process_iter(["cmdline"]):
            if f"output_dir={run}" in (process.info["cmdline"] or []):
                process.kill()


def wait_for(condition, run, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError((run / "app.log").read_text()[-3000:])
        time.sleep(0.1)


def test_data_and_report_of_a_run(page):
    here = tab(page, "Data")
    here.get_by_label("Run", exact=True).click()
    page.get_by_role("option", name="first").click()
    here.get_by_role("button", name="Show", exact=True).click()
    here.locator("button.thumbnail-item, .grid-container button").first.wait_for()
    here.get_by_text("training images").first.wait_for()
    here.get_by_label("Page", exact=True).fill("2")
    here.get_by_label("Search captions").fill("red")
    here.get_by_label("Search captions").press("Enter")
    page.wait_for_function("e => e.value == '0'", arg=here.get_by_label("Page", exact=True).element_handle())
    here.locator("button.thumbnail-item, .grid-container button").first.wait_for()
    here = tab(page, "Report")
    here.get_by_label("Run", exact=True).click()
    page.get_by_role("option", name="first").click()
    here.get_by_role("button", name="Report", exact=True).click()
    with page.expect_download() as download:
        here.locator("a[download]").first.click()
    text = download.value.path().read_text()
    assert "<h1>first</h1>" in text and "data:image/png;base64," in text
    assert not re.search(r"(src|href)=.https?:", text), "it needs nothing from elsewhere"


def test_nothing_is_started_without_the_token(browser, server, place):
    page = browser.new_page()
    page.set_default_timeout(SLOW)
    page.goto(server.replace(TOKEN, "guess"))
    here = tab(page, "Train")
    here.get_by_label("Name of the run").fill("third")
    here.get_by_role("button", name="Start", exact=True).click()
    page.get_by_text("Open the address that includes the token").first.wait_for()
    assert not (place / "runs" / "third").exists()
    page.close()
