"""What users are told: words that a model does not know, captions in every script, slow machines, and no noise."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image, ImageDraw
from transformers import CLIPTokenizer

from sfumato.figures import caption_font, grid, wrap
from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.inputs import CAPTION_WORDS, split_words, warn_of_unknown_words
from sfumato.training import doctor
from sfumato.training.config.load import load_config
from sfumato.training.doctor import examine
from sfumato.training.engine.tracking import Outlook, SlowWatch
from sfumato.training.models.text import remember_words


@pytest.mark.parametrize(
    ("text", "words"),
    [("A red-hot heart, no. 2!", ["a", "red", "hot", "heart", "no"]), ("红心 emoji", ["红", "心", "emoji"]), ("", [])],
)
def test_words_of_a_text(text, words):
    assert split_words(text) == words


def test_words_that_no_caption_has_are_told_once(tmp_path, caplog):
    """The words travel with the tokenizer; stock classes keep them."""
    tiny.pipeline(tmp_path).save_pretrained(tmp_path / "model")
    pipe = SfumatoPipeline.from_pretrained(tmp_path / "model")
    for _ in range(2):
        pipe.encode_prompt(["a red circle", "a quokka on a 披萨饼"])
    told = [record.getMessage() for record in caplog.records if "no caption" in record.getMessage()]
    words = "'quokka', '饼'"
    has = "that are in no caption this model was trained on"
    assert told == [f"Words of the prompts {has}: {words}. The model can only guess what they mean."]
    CLIPTokenizer.from_pretrained(tmp_path / "model/tokenizer").save_pretrained(tmp_path / "again")
    assert "circle" in json.loads((tmp_path / "again/tokenizer_config.json").read_text(encoding="utf-8"))[CAPTION_WORDS]


@pytest.mark.parametrize("words", [None, [], 3, "red", {"red": 1}])
def test_a_tokenizer_that_knows_no_words_says_nothing(tmp_path, caplog, words):
    tokenizer = tiny.pipeline(tmp_path).tokenizer
    tokenizer.init_kwargs[CAPTION_WORDS] = words
    warn_of_unknown_words(tokenizer, ["a wombat"])
    assert not caplog.records


def test_words_are_added_to_and_given_up_where_there_are_too_many(tmp_path):
    tokenizer = tiny.pipeline(tmp_path).tokenizer
    remember_words(tokenizer, ["a quagga"])
    assert {"quagga", "circle"} <= set(tokenizer.init_kwargs[CAPTION_WORDS])
    remember_words(tokenizer, ["x" + format(i, "b").replace("0", "o").replace("1", "l") for i in range(20_001)])
    assert tokenizer.init_kwargs[CAPTION_WORDS] == []


def test_captions_of_every_script_are_drawn():
    """Two characters that the font lacks would be the same box."""

    def drawn(text):
        sheet = Image.new("L", (40, 20), "white")
        ImageDraw.Draw(sheet).text((2, 2), text, "black", caption_font(text))
        return np.asarray(sheet)

    for one, other in [("红", "心"), ("披", "萨"), ("ピ", "ザ"), ("Ω", "ж"), ("é", "ü")]:
        assert (drawn(one) != drawn(other)).sum() > 10
    assert wrap("红心在白色的背景", caption_font("红"), 30) == ["红心", "在白", "色的", "背景"]
    assert wrap("a red heart", caption_font("a"), 40) == ["a red", "heart"]
    assert grid([Image.new("RGB", (8, 8))], ["红心"]).size[0] > 100


def test_a_run_that_has_become_slow_says_so_once():
    watch, now, told = SlowWatch(), 0.0, []
    for step in range(100):
        now += 0.5 if step < 30 else 4.0
        told.append(watch.look(now))
    assert [text for text in told if text] == ["a step takes 4.0 s, 8 times as long as at first (0.5 s): is the machine busy?"]
    even = SlowWatch()
    assert not any(even.look(step * 4.0) for step in range(100))


def test_half_a_minute_into_a_run_its_speed_is_judged_once(tmp_path, monkeypatch):
    """Others use the cores: read off how long its threads waited. Few steps will be made: read off the first ones."""
    clock = {"waited": 0.0}
    monkeypatch.setattr("sfumato.training.engine.tracking.seconds_waited", lambda: clock["waited"])
    monkeypatch.setattr("sfumato.training.engine.tracking.torch.get_num_threads", lambda: 2)

    def words(waits, seconds_a_step, **settings):
        config = load_config(tiny.config_file(tmp_path, train={"max_steps": None, **settings}))
        outlook, found = Outlook(config, on_cpu=True), []
        for step in range(100):
            found += outlook.look(step * seconds_a_step, step)
            clock["waited"] += 2 * waits * seconds_a_step
        return found

    assert words(0.05, 1.0, max_minutes=60) == []
    (crowded,) = words(0.4, 1.0, max_minutes=60)
    assert crowded.startswith("other programs use these cores: of 30 s the 2 threads waited 12 s for one.")
    assert "train.num_threads=1" in crowded
    (few,) = words(0.05, 5.0, max_minutes=12)
    assert few.startswith("at this speed the run makes about 144 steps in its 12 minutes")
    assert words(0.05, 5.0, max_minutes=12, max_steps=100) == []  # as many as were asked for


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs Linux with figures of its scheduler")
def test_the_time_that_threads_wait_for_a_core_is_known():
    """On one core two busy threads wait for each other about half of the time."""
    code = """
import os, threading, time
from sfumato.training.engine.tracking import seconds_waited
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
def work(end):
    while time.monotonic() < end:
        sum(range(1000))
rival = os.fork()
if not rival:
    work(time.monotonic() + 3)
    os._exit(0)
before, start = seconds_waited(), time.monotonic()
work(start + 2)
print((seconds_waited() - before) / (time.monotonic() - start))
os.waitpid(rival, 0)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(ran.stdout) > 0.25


def test_the_doctor_tells_where_one_thread_is_faster(monkeypatch):
    monkeypatch.setattr("sfumato.training.doctor.torch.get_num_threads", lambda: 2)
    monkeypatch.setattr("sfumato.training.doctor.torch.set_num_threads", lambda count: None)
    (slow,), (fine,) = doctor._threads(1.8, lambda: 0.5), doctor._threads(0.5, lambda: 0.9)
    assert slow.severity == "warning" and "one thread is 3.6 times as fast as 2 are now" in str(slow)
    assert fine.severity == "fine" and "a step takes 1.8 times as long on one" in str(fine)


def test_a_batch_that_is_larger_than_the_set_is_told(tmp_path):
    config = load_config(tiny.config_file(tmp_path, data={"num_pictures": 30}), ["train.batch_size=100"])
    assert any("training images" in str(found) and "several times" in str(found) for found in examine(config))


def test_opening_and_saving_a_model_is_quiet(tmp_path):
    """Neither notices of torchvision, nor bars of transformers."""
    tiny.pipeline(tmp_path).save_pretrained(tmp_path / "model")
    code = (
        "from sfumato.pipelines import SfumatoPipeline; import sys;"
        "SfumatoPipeline.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model"), str(tmp_path / "copy")],
        capture_output=True,
        text=True,
        check=True,
    )
    for noise in ("torchvision", "Loading weights", "Writing model shards", "Warning"):
        assert noise not in ran.stdout + ran.stderr
