"""The app: what it draws and remembers, what it lets nobody do, and what a run answers while it trains."""

import importlib.util
import json
import os
import shutil
import signal
import time
from pathlib import Path

import crashes
import numpy as np
import pytest
import tiny
from app_server import serve
from PIL import Image

from sfumato.app import desk, watch, words
from sfumato.app.studio import Studio, enlarge, read_settings, read_values
from sfumato.cli import main as cli
from sfumato.pipelines.explain import heat_image
from sfumato.training.engine import requests
from sfumato.training.train import main

needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs the extra app")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    assert main([str(tiny.config_file(folder, train={"max_steps": 3}, checkpoint={"every_steps": None}))]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def studio(model):
    return Studio(str(model))


def test_each_step_is_seen_and_the_image_is_that_of_the_command(studio, model, tmp_path):
    moments = list(studio.draw("a red circle\na blue square\n", seed=5, steps=4, scale=2.0))
    assert [len(moment.done) for moment in moments] == [0] * 4 + [1] * 4 + [2]
    assert all(moment.expected.size == moments[0].expected.size for moment in moments[:-1])
    said = moments[-1].command
    assert said.startswith("sfumato sample 'a red circle' 'a blue square'") and "--seed 5" in said
    each = tmp_path / "each"
    arguments = ["sample", "a red circle", "a blue square", "--model", str(model), "--seed", "5", "--steps", "4"]
    arguments += ["--guidance-scale", "2.0", "--out", str(tmp_path / "grid.png"), "--each", str(each)]
    assert cli(arguments) == 0
    for path, other in zip(moments[-1].done, sorted(each.glob("*.png")), strict=True):
        a, b = (np.asarray(Image.open(file), float) for file in (path, other))
        assert np.abs(a - b).max() <= 1


def test_a_dropped_image_gives_its_settings_back(studio, tmp_path):
    (path,) = list(studio.draw("a red circle", seed=9, steps=2, scale=1.5, sampler="ddim", negative="blue"))[-1].done
    found = read_settings(path)
    assert found == {
        "prompts": "a red circle", "seed": 9, "steps": 2, "guidance_scale": 1.5,
        "negative_prompt": "blue", "sampler": "ddim", "guider": "cfg",
    }  # fmt: skip
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    for odd in (tmp_path / "plain.png", tmp_path / "absent.png", None):
        with pytest.raises(ValueError, match="no settings"):
            read_settings(odd)


def test_a_drawing_is_stopped_after_its_step(studio):
    drawing = studio.draw("a\nb\nc", steps=50, scale=1.0)
    next(drawing)
    studio.stop()
    moments = list(drawing)
    assert moments[-1].done == [] and len(moments) < 10
    assert len(list(studio.draw("a", steps=2, scale=1.0))[-1].done) == 1  # and the next one is drawn


@pytest.mark.parametrize("text, settings", [("", {}), (" \n ", {}), ("a", {"steps": 0.4}), ("a", {"steps": 10**6})])
def test_what_cannot_be_drawn_is_refused(studio, text, settings):
    with pytest.raises(ValueError, match="Nothing to draw|must be from 1"):
        list(studio.draw(text, **settings))


def test_two_settings_are_compared_on_the_same_noise(studio, model):
    """Cells that ask for the same are the same image, and the file holds the grid and its settings."""
    settings = {"seed": 3, "steps": 2, "scale": 1.0}
    moments = list(studio.compare("a red circle", ("steps", [2, 3]), ("sampler", ["ddpm", "ddpm", "ddim"]), settings))
    assert len(moments) == 7 and [path is None for _, path in moments] == [True] * 6 + [False]
    sheet = np.asarray(Image.open(moments[-1][1]).convert("RGB"), float)
    cells = sheet[6 : 6 + 128, :].copy()
    first, second, third = (cells[:, 6 + k * 134 : 6 + k * 134 + 128] for k in range(3))
    assert np.array_equal(first, second) and not np.array_equal(first, third)
    found = read_settings(moments[-1][1])
    assert found == {"prompts": "a red circle", "seed": 3, "guidance_scale": 1.0}, "and not the steps, which differ"
    assert studio.checkpoints() == [3]
    (one,) = list(studio.compare("a red circle", ("checkpoint", [3]), ("seed", [1]), settings))[-1:]
    assert one[1]
    for odd in ("checkpoint", [9]), ("seed", []), ("seed", list(range(40))), ("steps", [2]):
        with pytest.raises(ValueError, match="no checkpoint of step 9|a grid has 1 to|the same"):
            list(studio.compare("a", odd, ("steps", [1]), settings))


def test_values_are_read_as_their_setting_wants_them():
    assert read_values("steps", "1, 2\n8") == [1, 2, 8] and read_values("scale", " 1.5 ,3") == [1.5, 3.0]
    assert read_values("prompt", "a red, round thing\n\na blue one") == ["a red, round thing", "a blue one"]
    for axis, text in (("steps", "few"), ("seed", " , "), ("prompt", "\n")):
        with pytest.raises(ValueError, match=axis):
            read_values(axis, text)


def test_a_model_of_other_things_draws_files_of_them(tmp_path):
    """A clip is a .gif beside the picture of it, and the network's idea of it is looked at as a picture too."""
    data = {"name": "clips", "resolution": 32, "channels": 24}
    path = tiny.config_file(tmp_path, data=data, train={"max_steps": 1}, validation={"num_judged": 1})
    path.write_text(path.read_text().replace("cache_dir:", "max_records: 32\n  cache_dir:"))
    assert main([str(path)]) == 0
    studio = Studio(str(tmp_path / "run"))
    moments = list(studio.draw("a red circle moves up slowly", steps=2, scale=1.0))
    assert len(moments) >= 2 and moments[0].things == [] and moments[0].expected.size[0] > 128
    assert Image.open(moments[-1].things[0]).n_frames == 8 and moments[-1].done[0].endswith(".png")


@pytest.fixture(scope="module")
def reading(tmp_path_factory, model):
    """Models that read images, by what they do."""
    folder, runs = tmp_path_factory.mktemp("reading"), {}
    for task, sections in (
        ("upscaling", {}),
        ("inpainting", {}),
        ("control", {"init_from": str(model), "unet": None, "scheduler": None, "text_encoder": None}),
        ("text_to_image", {"objective": {"self_conditioning": True}}),
    ):
        (folder / task).mkdir()
        path = tiny.config_file(folder / task, task=task, train={"max_steps": 2}, **{k: v for k, v in sections.items() if v})
        content = {k: v for k, v in tiny.yaml.safe_load(path.read_text()).items() if sections.get(k, v) is not None}
        path.write_text(tiny.yaml.safe_dump(content))
        assert main([str(path)]) == 0
        runs[task] = folder / task / "run"
    return runs


@pytest.mark.parametrize("task, given", [("upscaling", "image"), ("control", "control_image")])
def test_a_model_that_reads_an_image_draws_from_it_and_not_without(reading, task, given):
    studio = Studio(str(reading[task]))
    assert studio.image_input == given
    with pytest.raises(ValueError, match="Nothing to draw"):
        list(studio.draw("a red circle", steps=2))
    files = []
    for colour in ("red", "white"):
        image = Image.new("RGB", (16, 16), colour)
        files += list(studio.draw("a red circle", steps=2, **{given: image}))[-1].done
    assert len(files) == 2 and all(Image.open(file).size == (16, 16) for file in files)
    if task == "upscaling":
        assert len(list(studio.draw("", steps=2, image=image))[-1].done) == 1  # without a word, too
        assert Image.open(files[0]).tobytes() != Image.open(files[1]).tobytes()


@pytest.mark.parametrize("task", ["inpainting", "text_to_image"])
def test_models_for_masks_and_with_self_conditioning_draw_from_text(reading, task):
    studio = Studio(str(reading[task]))
    assert studio.image_input is None
    (file,) = list(studio.draw("a red circle", steps=2))[-1].done
    assert Image.open(file).size == (16, 16)


@needs_gradio
@pytest.mark.parametrize("task", ["upscaling", "control", "inpainting"])
def test_the_page_of_a_model_that_reads_images(reading, tmp_path, task):
    from gradio_client import Client, handle_file

    Image.new("RGBA", (40, 30), (255, 0, 0, 128)).save(tmp_path / "image.png")
    with serve(reading[task], tmp_path) as address:
        client = Client(address, verbose=False)
        names = {name.strip("/") for name in client.view_api(return_format="dict")["named_endpoints"]}
        assert ("draw" in names) == (task == "inpainting") == ("why" in names) == ("from_image" not in names)
        if task == "inpainting":
            _, gallery, *_ = client.predict("a red circle", "", 3, 2, 1.0, "–", "cfg", api_name="/draw")
        else:
            _, gallery = client.predict(
                handle_file(tmp_path / "image.png"), False, "a red circle", 1, 2, api_name="/from_image"
            )
            if task == "upscaling":
                Image.new("RGB", (4000, 3000)).save(tmp_path / "large.png")
                with pytest.raises(Exception, match="Take a smaller image"):
                    client.predict(handle_file(tmp_path / "large.png"), False, "", 1, 2, api_name="/from_image")
        assert Image.open(gallery[0]["image"]).size[0] >= 16


def test_the_data_of_a_run_are_looked_at(model):
    runs = model.parent
    found = desk.read_data(runs, "run")
    assert found.matching == 64 and len(found.images) == 24 and ("training images", "64") in found.facts
    red = desk.read_data(runs, "run", "red circle left")
    assert 0 < red.matching < 64 and all("red" in captions and "left" in captions for _, captions in red.images)
    assert desk.read_data(runs, "run", page=2).matching == 64 and len(desk.read_data(runs, "run", page=2).images) == 16
    with pytest.raises(ValueError, match="there is no run"):
        desk.read_data(runs, "../run")
    shutil.rmtree(runs / "cache")
    with pytest.raises(ValueError, match="no longer exists"):
        desk.read_data(runs, "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "../../etc/passwd"}, "no preset"),
        ({"name": "../elsewhere"}, "needs a name"),
        ({"name": ".hidden"}, "needs a name"),
        ({"name": "run"}, "already exists"),
        ({"more": "output_dir=elsewhere"}, "without output_dir"),
        ({"more": "--help"}, "key=value"),
        ({"more": "train.nothing=3"}, "train.nothing"),
        ({"asked": {"train.max_steps": "many"}}, "max_steps"),
    ],
)
def test_a_run_is_planned_with_care(model, changes, message):
    asked = {"preset": "shapes", "name": "new", "asked": {"train.max_steps": "7", "optim.lr": ""}, "more": "seed=3"}
    plan = desk.plan(model.parent, **asked)
    assert plan.arguments[:2] == ["shapes", "train.max_steps=7"] and "max_steps: 7" in plan.yaml() and "seed: 3" in plan.yaml()
    assert desk.launch_command(plan)[:2] == ["accelerate", "launch"] and desk.launch_command(plan)[-4:] == plan.arguments
    with pytest.raises(ValueError, match=message):
        desk.plan(model.parent, **{**asked, **changes}).config()


def test_settings_are_found_by_what_is_said_of_them():
    found = [key for key, *_ in desk.find_settings("learning rate")]
    assert "optim.lr" in found and "optim.lr_decay" in found and len(found) < 20
    assert desk.find_settings("no such words anywhere") == []


def test_a_report_needs_nothing_else(model, tmp_path):
    scores = {"FD <1>": {"value": 3.25, "half_width": 0.5}, "note": "<script>alert(1)</script>"}
    (model / "pipeline" / "evaluation.json").write_text(json.dumps({"scores": scores}))
    config = model / "config.yaml"
    config.write_text(config.read_text().replace("webhook: null", "webhook: https://chat.example/hook/secret"))
    assert "hook/secret" in config.read_text()
    text = desk.write_report(model.parent, "run", tmp_path / "report.html").read_text()
    assert "FD &lt;1&gt;" in text and "3.25 ± 0.5" in text and "resolution: 16" in text
    for unwanted in ("http", "<script>", str(tmp_path.parent)):
        assert unwanted not in text


def test_a_run_that_cannot_start_says_why_and_leaves_its_name_free(model):
    wanted = desk.plan(model.parent, "shapes", "typo", {"train.max_steps": "7"}, "data.name=/nowhere/pictures")
    with pytest.raises(ValueError, match="nowhere"):
        desk.wait_for_start(desk.start(wanted), wanted, seconds=120)
    assert "typo" not in watch.list_runs(model.parent)
    assert desk.plan(model.parent, "shapes", "typo", {}, "").output_dir == wanted.output_dir
    import torch

    if not torch.accelerator.is_available():
        with pytest.raises(ValueError, match="without a GPU"):
            desk.launch_command(wanted, 4)


def test_a_word_has_its_heat(studio):
    result = studio.explain("a red circle", ablate=True)
    assert result.words == ["a", "red", "circle"] and result.ablation is not None
    assert enlarge(heat_image(result.image, result.heat[1])).size == (320, 320)


def test_a_run_shows_its_curves_and_each_prompt_through_its_steps(tmp_path):
    path = tiny.config_file(
        tmp_path,
        output_dir=str(tmp_path / "runs" / "one"),
        train={"max_steps": 4},
        validation={"every_steps": 2, "prompts": ["a red circle", "a blue square", "a red circle"]},
    )
    assert main([str(path)]) == 0
    runs = tmp_path / "runs"
    state = watch.read_run(runs, "one")
    assert [step for step, _ in state.held_out] == [2, 4] and len(state.bands) == 16 and len(state.rates) == 4
    assert {band for *_, band in state.bands} >= {"-8 to -6", "0 to 2"}
    prompts = watch.sampled_prompts(runs, "one")
    assert prompts == ["a red circle", "a blue square", "a red circle"]
    sheets = watch.samples(runs, "one")
    assert [name for _, name in sheets] == ["step-00000004", "step-00000002"]
    for place in range(3):
        cells = watch.samples(runs, "one", place)
        assert [image.size for image, _ in cells] == [(128, 128)] * 2
        x = 6 + place * 134
        assert np.array_equal(np.asarray(cells[0][0]), np.asarray(sheets[0][0])[6 : 6 + 128, x : x + 128])
    Image.open(runs / "one" / "samples" / "step-00000004.png").convert("RGB").save(
        runs / "one" / "samples" / "step-00000009.png"
    )
    assert watch.sampled_prompts(runs, "one") == []  # a grid of before captions were kept
    assert len(watch.samples(runs, "one")) == 3


def test_both_languages_say_the_same():
    pages = "".join(path.read_text() for path in Path(words.__file__).parent.glob("*pages.py"))
    import re

    said = set(re.findall(r'say\("([^"]+)"\)', pages)) | {"Stop and save", "Save now", "Sample now", "Resume"}
    assert said <= set(words.CHINESE), said - set(words.CHINESE)
    with pytest.raises(ValueError, match="en or zh"):
        words.speaker("fr")


def test_runs_are_read_and_asked(tmp_path, monkeypatch):
    """A run that trains draws, saves and stops when it is asked; a dead one is known by its lock."""
    path = tiny.config_file(
        tmp_path, output_dir=str(tmp_path / "runs" / "one"), train={"max_steps": 100_000}, checkpoint={"every_steps": None}
    )
    child = crashes.fork(lambda: main([str(path)]))
    runs, run = tmp_path / "runs", tmp_path / "runs" / "one"
    try:
        wait_for(lambda: (run / "metrics.jsonl").exists() and watch.read_run(runs, "one").step > 2)
        state = watch.read_run(runs, "one")
        assert state.trains and not state.finished and state.losses and state.images_per_second > 0
        with pytest.raises(ValueError, match="is already training"):
            watch.resume(runs, "one")
        watch.ask(runs, "one", "save")
        wait_for(lambda: list((run / "checkpoints").glob("step-*")))
        watch.ask(runs, "one", "sample")
        wait_for(lambda: watch.newest_sheet(runs, "one"))
        watch.ask(runs, "one", "stop")
        assert crashes.wait([child]) == [130]
    finally:
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
    assert not watch.read_run(runs, "one").trains
    with pytest.raises(ValueError, match="is not training"):
        watch.ask(runs, "one", "stop")
    for odd in ("..", "../runs/one", "/etc", "", "two"):
        with pytest.raises(ValueError, match="there is no run"):
            watch.read_run(runs, odd)
    with pytest.raises(ValueError, match="cannot be asked"):
        requests.ask(run, "../../x")


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_what_was_asked_of_an_earlier_trainer_is_forgotten(tmp_path):
    path = tiny.config_file(tmp_path, train={"max_steps": 3}, checkpoint={"every_steps": None})
    (tmp_path / "run").mkdir()
    requests.ask(tmp_path / "run", "stop")
    assert main([str(path)]) == 0


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """The app on a port of this machine, with two runs to look at."""
    runs = tmp_path_factory.mktemp("runs")
    (runs / "one").mkdir()
    (runs / "one" / "config.yaml").write_text("seed: 0\n")
    (runs / "one" / "metrics.jsonl").write_text(
        "\n".join(json.dumps({"step": k, "seconds": k, "images_seen": 8 * k, "loss": 1 / k, "done": 0.1}) for k in range(1, 9))
        + "\n"
    )
    with serve(model, runs) as address:
        yield address


@needs_gradio
def test_the_page_draws_through_its_own_interface(server):
    from gradio_client import Client

    client = Client(server, verbose=False)
    _, gallery, *_, command = client.predict("a red circle", "", 3, 2, 1.0, "–", "cfg", api_name="/draw")
    assert "sfumato sample 'a red circle'" in command and len(gallery) == 1
    assert Image.open(gallery[0]["image"]).size == (16, 16)
    _, line, *_ = client.predict("one", "", api_name="/look")
    assert "not training" in line and "Step 8" in line
    with pytest.raises(Exception, match="token"):
        client.predict("one", api_name="/stop_run")  # no token, no power


@needs_gradio
def test_a_strangers_host_is_refused(server):
    import httpx

    assert httpx.get(server).status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "[::1].evil"):
        assert httpx.get(server, headers={"Host": host}).status_code == 400, host


@needs_gradio
def test_no_file_of_the_machine_leaves_it(server, tmp_path_factory):
    """Two hundred ways to ask for one."""
    import httpx

    secret = tmp_path_factory.mktemp("secret") / "secret.txt"
    secret.write_text("attack at dawn")
    own = Path(__file__).resolve()
    targets = [
        "/etc/passwd",
        "/etc/hostname",
        str(secret),
        str(own),
        str(own.parents[1] / "pyproject.toml"),
        "/proc/self/environ",
    ]
    targets += [f"../../../../../..{target}" for target in targets] + [f"..%2f..%2f..%2f..%2f..%2f..{t}" for t in targets]
    doors = [
        "/gradio_api/file={}",
        "/file={}",
        "/gradio_api/file/{}",
        "/static/{}",
        "/assets/{}",
        "/svelte/{}",
        "/theme.css/{}",
    ]
    doors += [
        "/gradio_api/proxy=http://127.0.0.1{}",
        "/gradio_api/stream/{}",
        "/custom_component/{}",
        "/gradio_api/upload/{}",
        "//{}",
    ]
    attempts = [door.format(target) for door in doors for target in targets]
    assert len(attempts) >= 200
    with httpx.Client(base_url=server, follow_redirects=False) as client:
        for attempt in attempts:
            got = client.get(attempt)
            for content in ("root:", "attack at dawn", "def test_no_file", "[build-system]", "PATH="):
                assert content not in got.text, attempt


def test_other_machines_need_a_password(capsys):
    assert cli(["app", "--host", "0.0.0.0"]) == 2
    assert "--password" in capsys.readouterr().err
