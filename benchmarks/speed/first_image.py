"""From nothing to a first image in the app: how long a newcomer waits, with a real browser.

    python -m benchmarks.speed.first_image [--model openmoji_128] [--out FILE.json]

A wheel is built from this checkout, a fresh environment made, the wheel installed with the extra `app`, `sfumato app` started
from it, its page opened in Chromium (extra `app` and `playwright` here; `apt install chromium`), a prompt typed, and Draw
pressed. Reports the seconds of each part. Installing is as fast as the mirror that packages come from.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from playwright.sync_api import sync_playwright

from sfumato.pipelines.locate import DEFAULT

ROOT = Path(__file__).parents[2]
MINUTE = 60_000  # milliseconds


class Watch:
    """The seconds of each part, one after another."""

    def __init__(self):
        self.last = time.perf_counter()
        self.parts: dict[str, float] = {}

    def note(self, part: str) -> None:
        """Record the time since the last call."""
        now = time.perf_counter()
        self.parts[part] = round(now - self.last, 1)
        self.last = now
        print(f"{part}: {self.parts[part]} s", flush=True)


def install(folder: Path, watch: Watch) -> Path:
    """Install into a fresh environment; returns its `sfumato`."""
    config = folder / "build.cfg"
    config.write_text(f"[build]\nbuild_base = {folder / 'build'}\n")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder), str(ROOT)]
    subprocess.run(build, check=True, env={**os.environ, "DIST_EXTRA_CONFIG": str(config)})
    (wheel,) = folder.glob("*.whl")
    watch.note("build the wheel")
    venv.create(folder / "env", with_pip=True)
    pip = [str(folder / "env/bin/pip"), "install", "-q", "-c", str(ROOT / "constraints.txt"), f"{wheel}[app]"]
    subprocess.run(pip, check=True)
    watch.note("environment, packages and wheel")
    return folder / "env/bin/sfumato"


def draw(address: str, out: Path, watch: Watch) -> None:
    """Open the page, type a prompt, and wait until its image is there."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.set_default_timeout(2 * MINUTE)
        page.goto(address)
        page.get_by_role("tab", name="Draw", exact=True).wait_for()
        watch.note("browser and page")
        here = page.get_by_role("tabpanel").locator("visible=true").first
        here.get_by_label("Prompts, one per line").fill("red heart")
        here.get_by_role("button", name="Draw", exact=True).click()
        finished = here.locator("button.thumbnail-item img, .grid-container img").first
        finished.wait_for()
        watch.note("the first image, finished")
        out.write_bytes(page.request.get(str(finished.get_attribute("src"))).body())
        browser.close()


def main() -> None:
    """Run the benchmark; see above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT)
    parser.add_argument("--out", default="benchmarks/results/first_image.json")
    options = parser.parse_args()
    watch = Watch()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sfumato = install(folder, watch)
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"HF_HUB_OFFLINE": "1", "HOME": name}
        command = [str(sfumato), "app", options.model, "--port", "0"]
        app = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            said = ""
            for line in app.stdout or ():
                said += line
                if address := re.search(r"http://\S+", line):
                    watch.note("the app's address")
                    draw(address[0], Path(options.out).with_suffix(".png"), watch)
                    break
            else:
                raise SystemExit(f"the app ended: {said}")
        finally:
            app.terminate()
            app.wait()
    waited = sum(seconds for part, seconds in watch.parts.items() if part != "build the wheel")
    result = {"model": options.model, "seconds": watch.parts, "from nothing to an image": round(waited, 1)}
    Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
