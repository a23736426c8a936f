"""Folders of films and animated images: what is read of them, and what is told of those that cannot be."""

import json

import numpy as np
import pytest
import tiny
from PIL import Image

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.codecs import open_codec
from sfumato.pipelines.codecs.clips import VideoCodec
from sfumato.training.config.load import load_config
from sfumato.training.data.prepare import prepare
from sfumato.training.data.sources.videos import chosen_frames
from sfumato.training.train import main


def pixels(count=9, side=24):
    """A bright bar that goes down, one row a frame."""
    frames = np.full((count, side, side, 3), 30, np.uint8)
    for k in range(count):
        frames[k, 2 * k : 2 * k + 4] = 220
    return frames


def animation(path, count=9, **settings):
    first, *rest = (Image.fromarray(frame) for frame in pixels(count))
    first.save(path, save_all=True, append_images=rest, duration=80, **settings)


def movie(path, count=9, codec="mpeg4"):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as film:
        stream = film.add_stream(codec, rate=8)
        stream.width = stream.height = 24
        stream.pix_fmt = "yuv420p"
        for frame in pixels(count):
            film.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        film.mux(stream.encode())


def described(folder, names):
    lines = [json.dumps({"file_name": name, "text": f"clip {i}"}) for i, name in enumerate(names)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def settings_for(folder, name, **data):
    data = {"name": name, "resolution": 16, "channels": 15, "max_bad_share": 0.9, **data}
    return tiny.config_file(folder, data=data, text_encoder={"max_length": 8})


def test_frames_are_taken_evenly_from_the_first_to_the_last():
    assert chosen_frames(9, 5) == [0, 2, 4, 6, 8] and chosen_frames(3, 3) == [0, 1, 2]
    for total in (2, 10**9):
        with pytest.raises(ValueError, match="frames"):
            chosen_frames(total, 3)


def test_every_kind_of_clip_is_read_alike(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    animation(folder / "a.gif")
    animation(folder / "b.webp", lossless=True)
    animation(folder / "c.png")
    movie(folder / "d.mp4")
    movie(folder / "e.mkv")
    described(folder, [path.name for path in sorted(folder.iterdir())])
    images = prepare(load_config(settings_for(tmp_path, f"videos:{folder}")).data)
    assert len(images) == 5 and images.codec["kind"] == "videos"
    codec = open_codec(images.codec)
    clips = [codec.decode(images.image(i) / 255).astype(float) for i in range(5)]
    heights = np.stack([(clip[..., 0].mean(2) > 120) @ np.arange(16) / (clip[..., 0].mean(2) > 120).sum(1) for clip in clips])
    assert (np.diff(heights, axis=1) > 1).all(), "the bar goes down from frame to frame"
    assert np.ptp(heights, axis=0).max() < 1, "and in each file by as much"


def test_odd_files_are_counted_and_named(tmp_path):
    folder = tmp_path / "films"
    folder.mkdir()
    for i in range(4):
        movie(folder / f"{i}.mp4")
    movie(folder / "short.mp4", 2)
    whole = (folder / "0.mp4").read_bytes()
    (folder / "torn.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("no film at all")
    (folder / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    described(folder, [*sorted(path.name for path in folder.iterdir()), "gone.mp4", "notes.txt"])
    (folder / "notes.txt").write_text("x")
    with pytest.warns(UserWarning) as told:
        images = prepare(load_config(settings_for(tmp_path, str(folder))).data)
    text = " ".join(str(warning.message) for warning in told)
    assert len(images) == 4
    for words in (
        "2 frames, fewer than 5 (short.mp4)",
        "damaged clip",
        "torn.mp4",
        "noise.mp4",
        "missing (gone.mp4)",
        "notes.txt",
    ):
        assert words in text, words


def test_odd_animations_are_counted_and_named(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    for i in range(4):
        animation(folder / f"{i}.gif")
    Image.fromarray(pixels()[0]).save(folder / "still.png")
    (folder / "torn.gif").write_bytes((folder / "0.gif").read_bytes()[:40])
    described(folder, sorted(path.name for path in folder.iterdir()))
    with pytest.warns(UserWarning, match="fewer than 5") as told:
        images = prepare(load_config(settings_for(tmp_path, f"videos:{folder}")).data)
    text = " ".join(str(warning.message) for warning in told)
    assert len(images) == 4 and "still.png" in text and "torn.gif" in text


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("videos:nowhere", {}, "videos:FOLDER"),
        ("videos:", {}, "videos:FOLDER"),
        ("{folder}", {"channels": 3}, "three for each frame"),
        ("{folder}", {"channels": 16}, "three for each frame"),
        ("{bare}", {}, "metadata.csv"),
    ],
)
def test_what_cannot_be_is_told_with_what_to_do(tmp_path, capsys, name, data, said):
    folder, bare = tmp_path / "films", tmp_path / "bare"
    for place in (folder, bare):
        place.mkdir()
        movie(place / "0.mp4")
    described(folder, ["0.mp4"])
    path = settings_for(tmp_path, name.format(folder=folder, bare=bare), **data)
    assert main([str(path)]) == 2
    assert said in capsys.readouterr().err


def test_a_folder_of_films_trains_and_draws_clips(tmp_path):
    folder = tmp_path / "films"
    folder.mkdir()
    for i in range(6):
        movie(folder / f"{i}.mp4")
    described(folder, sorted(path.name for path in folder.iterdir()))
    assert main([str(settings_for(tmp_path, str(folder), max_bad_share=0.0)), "train.max_steps=2"]) == 0
    pipe = SfumatoPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    clip = pipe("clip 1", num_inference_steps=2, output_type="decoded").images[0]
    assert isinstance(pipe.codec, VideoCodec) and clip.shape == (5, 16, 16, 3) and clip.dtype == np.uint8
    pipe.codec.write(clip, tmp_path / "clip.gif")
    with Image.open(tmp_path / "clip.gif") as image:
        assert image.n_frames == 5
