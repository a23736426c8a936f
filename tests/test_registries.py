"""A toy of each kind, from outside of the package: one file and one line, found by an entry point like any installed one."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import yaml

from sfumato import registries
from sfumato.registries import GUIDERS, METRICS, SAMPLERS, SOURCES, TASKS, Entry, Metric, Source, Task
from sfumato.training.config.load import load_config, settings_of

TOY = '''
"""Two squares, a task with a setting of its own, a metric, a sampler, a guider and a codec."""

from dataclasses import dataclass

import numpy as np

from sfumato.registries import Entry, Guider, Metric, Sampler, Source, Task

SOURCE = Source(target="toy:squares", named=True, generated=True)
TASK = Task(target="toy_task:Brighter", settings="toy:ToyConfig", check="toy:check", section="toy", plain=True)
METRIC = Metric(target="toy:brightness", figures=("brightness",), tasks=("text_to_image", "toy_task"))
SAMPLER = Sampler(target="diffusers:DDIMScheduler", overrides={"thresholding": False, "clip_sample": False})
GUIDER = Guider(target="diffusers.guiders:ClassifierFreeGuidance")
CODEC = Entry(target="toy:squares")


@dataclass
class ToyConfig:
    offset: float = 0.0


def check(config, need):
    need(config.section(ToyConfig).offset >= 0, "toy.offset", "must not be negative")


def squares(config, files):
    from sfumato.training.data.records import Record

    for i in range(40):
        shade = 250 if i % 2 else 10
        image = np.full((config.resolution, config.resolution, 3), shade, np.uint8)
        yield Record(str(i), lambda image=image: image, ["white" if i % 2 else "black"])


def brightness(evaluation):
    from sfumato.training.quality.statistics import mean_score

    return {"brightness": mean_score(evaluation.of("train", evaluation.drawings).mean((1, 2, 3)))}
'''
TOY_TASK = '''
from sfumato.training.tasks.text_to_image import TextToImage
from toy import ToyConfig


class Brighter(TextToImage):
    """Text to image whose loss has an offset."""

    def loss(self, model, batch):
        return super().loss(model, batch) + self.config.section(ToyConfig).offset
'''
ENTRY_POINTS = """
[sfumato.sources]
squares = toy:SOURCE
[sfumato.tasks]
toy_task = toy:TASK
[sfumato.metrics]
brightness = toy:METRIC
[sfumato.samplers]
toy-ddim = toy:SAMPLER
[sfumato.guiders]
toy-cfg = toy:GUIDER
[sfumato.codecs]
toy = toy:CODEC
"""


@pytest.fixture
def toy(tmp_path):
    """The environment of a process that has the toys installed."""
    place = tmp_path / "site"
    info = place / "toy-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    (place / "toy.py").write_text(TOY)
    (place / "toy_task.py").write_text(TOY_TASK)
    path = os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def test_toys_of_an_installed_package_train_draw_and_are_measured(tmp_path, toy):
    path = tiny.config_file(
        tmp_path,
        task="toy_task",
        toy={"offset": 5.0},
        validation={"every_steps": 3, "sampler": "toy-ddim", "guider": "toy-cfg"},
        checkpoint={"best_by": "brightness"},
    )
    content = yaml.safe_load(path.read_text())
    content["data"] = {"name": "squares", "resolution": 16, "cache_dir": str(tmp_path / "cache")}
    path.write_text(yaml.safe_dump(content))
    code = f"""
        from sfumato.registries import CODECS
        from sfumato.training.train import main
        assert "toy" in CODECS
        assert main([{str(path)!r}]) == 0
        assert main([{str(path)!r}, "toy.offset=-1", "output_dir={tmp_path}/other"]) == 2
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=toy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "toy.offset=-1.0: must not be negative" in done.stderr
    run = tmp_path / "run"
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert min(losses) > 5
    assert "brightness" in json.loads((run / "evaluation.json").read_text())
    assert json.loads((run / "best" / "best.json").read_text())["name"] == "brightness"
    assert yaml.safe_load((run / "config.yaml").read_text())["toy"] == {"offset": 5.0}
    assert "brightness" in (run / "pipeline" / "README.md").read_text()
    text = subprocess.run([sys.executable, "-m", "sfumato", "train", "--help"], env=toy, capture_output=True, text=True).stdout
    assert "toy_task" in text and "squares" in text


def test_every_entry_names_something_that_is_there():
    for registry in (SOURCES, TASKS, METRICS, SAMPLERS, GUIDERS):
        for name, entry in registry.items():
            assert callable(registry.load(name)), name
            for part in filter(None, (entry.settings, entry.check)):
                assert callable(registries.load_object(part)), part


def test_an_added_entry_is_found_and_a_taken_name_is_refused():
    SOURCES.add("toy", Source(target="toy:squares", named=True))
    try:
        assert "toy" in SOURCES and SOURCES["toy"].named
        with pytest.raises(ValueError, match="there is a source 'toy' already: toy:squares"):
            SOURCES.add("toy", Source(target="other:squares"))
    finally:
        SOURCES.remove("toy")
    with pytest.raises(ValueError, match="unknown sampler 'magic'; choose one of ddpm, ddim"):
        SAMPLERS.load("magic")


def test_a_section_that_is_taken_is_refused():
    from sfumato.training.config.load import config_class

    METRICS.add("toy", Metric(target="a:b", settings="sfumato.training.tasks.settings:UpscalingConfig", section="data"))
    try:
        with pytest.raises(ValueError, match="the metric 'toy' mounts a section 'data', which already exists"):
            config_class()
    finally:
        METRICS.remove("toy")


def test_scores_know_which_way_is_better():
    lower = {"FD", "KID of model", "LD of model", "held_out_loss", "held_out_loss -8 to -6", "training_loss", "unreadable"}
    higher = {"PSNR", "SSIM of bicubic", "F1", "all", "colour", "precision"}
    for name in lower | (higher - {"precision"}):
        assert registries.lower_is_better(name) == (name in lower), name
    assert registries.metric_of("nothing") is None
    METRICS.add("size error", Metric(target="a:b", better="lower"))
    TASKS.add("toy", Task(target="a:b", scores=("strain", "yield"), lower_scores=("strain",)))
    try:
        assert registries.lower_is_better("size error") and not registries.lower_is_better("size")
        assert registries.lower_is_better("strain") and not registries.lower_is_better("yield")
    finally:
        METRICS.remove("size error")
        TASKS.remove("toy")


def test_every_score_that_a_run_may_choose_by_is_one_that_is_computed():
    """What the metrics of training return is what `score_names` offers, and nothing else."""
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    features = np.random.default_rng(1).normal(size=(12, 8))
    evaluation = SimpleNamespace(
        dataset=SimpleNamespace(select=lambda split: np.arange(12)),
        reference=features,
        features=features + 1,
        parts={"train": np.arange(12)},
        plan=SimpleNamespace(intervals=False),
        of=lambda part, values: values,
        config=load_config("shapes", ["validation.num_judged=12"]),
        draw=lambda captions: images,
    )
    for figures in (1, 2):
        evaluation.config.data.num_figures = figures
        for name in ("distances", "manifold", "obedience"):
            returned = set(METRICS[name].compute(evaluation))
            offered = set(registries.figures_of(name))
            assert returned <= offered and (returned == offered or name == "obedience"), name
            for figure in offered - returned:
                with pytest.raises(ValueError, match="checkpoint.best_by"):
                    load_config("shapes", [f"checkpoint.best_by={figure}", f"data.num_figures={figures}"])
    for name in ("retrieval", "attributes", "diversity", "memorisation"):
        assert registries.figures_of(name) == ()


def test_a_broken_plugin_is_left_out_and_the_others_work(monkeypatch):
    class Point:
        value = "broken:source"

        def __init__(self, name, load):
            self.name = name
            self.load = load

    def broken():
        raise ImportError("no module of this name")

    points = [Point("broken", broken), Point("whole", lambda: Source(target="a:b"))]
    monkeypatch.setattr(registries, "entry_points", lambda group: points)
    found = registries.Registry("source", {})
    with pytest.warns(UserWarning, match="left out the source 'broken' of broken:source: no module of this name"):
        assert list(found) == ["whole"]


def test_sections_that_a_run_does_not_use_stay_out_of_its_config():
    plain, large = load_config("shapes"), load_config("shapes", ["task=upscaling"])
    assert "upscaling" not in settings_of(plain) and settings_of(large)["upscaling"]["factor"] == 2


def test_a_registry_is_free_of_torch():
    code = "import sys, sfumato.registries; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert issubclass(Metric, Entry) and Path(registries.__file__).is_file()
