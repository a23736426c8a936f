"""A motion adapter in a frozen model of pictures: clips from it, in the stock form of AnimateDiff."""

import json

import crashes
import numpy as np
import pytest
import tiny
import torch
import yaml
from diffusers import AnimateDiffPipeline, AnimateDiffVideoToVideoPipeline
from PIL import Image
from stock_process import run_stock
from test_waits import Waits

from sfumato.cli import main as cli
from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.motion import MotionUNet, build_adapter, join_frames, split_frames
from sfumato.training.train import main

FRAMES, SIDE = 4, 16


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model of pictures."""
    folder = tmp_path_factory.mktemp("base")
    assert main([str(tiny.config_file(folder, train={"max_steps": 2}))]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder of eight animated images: a square that moves."""
    folder = tmp_path_factory.mktemp("clips")
    rows = []
    for i in range(8):
        frames = []
        for k in range(2 * FRAMES):
            pixels = np.full((SIDE, SIDE, 3), 255, np.uint8)
            pixels[4:8, k : k + 4] = (200, 30 * i, 40)
            frames.append(Image.fromarray(pixels))
        frames[0].save(folder / f"{i}.gif", save_all=True, append_images=frames[1:], duration=100)
        rows.append({"file_name": f"{i}.gif", "text": f"red square {i}"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def config(folder, base, clips, **sections):
    """The tiny config without what a model in `init_from` brings."""
    data = {"name": f"videos:{clips}", "resolution": SIDE, "channels": 3 * FRAMES}
    settings = {
        "task": "motion",
        "init_from": str(base),
        "data": data,
        "motion": {"num_attention_heads": 2, "max_frames": 8},
        "optim": {"lr_decay": "constant"},
        "validation": {"sampler": "ddim"},
    }
    path = tiny.config_file(folder, **{**settings, **sections})
    content = yaml.safe_load(path.read_text())
    for section in ("unet", "text_encoder", "scheduler"):
        del content[section]
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory, base, clips):
    folder = tmp_path_factory.mktemp("motion")
    assert main([config(folder, base, clips)]) == 0
    return folder / "run"


def test_frames_are_split_and_joined():
    array = torch.randn(2, 3 * FRAMES, 5, 6)
    assert torch.equal(join_frames(split_frames(array, 3), 2), array)
    assert torch.equal(split_frames(array, 3)[1], array[0, 3:6])


def test_at_first_every_frame_is_drawn_as_a_picture(base):
    pipe = SfumatoPipeline.from_pretrained(base / "pipeline")
    adapter = build_adapter(pipe.unet.config, num_attention_heads=2, max_frames=8, mid_block=True)
    clip_unet = MotionUNet.from_unet2d(pipe.unet, adapter).eval()
    array, text = torch.randn(2, 3 * FRAMES, SIDE, SIDE), torch.randn(2, 20, 32)
    t = torch.tensor([100, 700])
    with torch.no_grad():
        clips = clip_unet(array, t, text, return_dict=False)[0]
        pictures = pipe.unet(
            split_frames(array, 3), t.repeat_interleave(FRAMES), text.repeat_interleave(FRAMES, 0), return_dict=False
        )[0]
    assert (clips - join_frames(pictures, 2)).abs().max() < 1e-5


def test_only_the_adapter_is_trained(run, base):
    before = SfumatoPipeline.from_pretrained(base / "pipeline").unet.state_dict()
    after = SfumatoPipeline.from_pretrained(run / "pipeline").unet.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    moved = [name for name, value in after.items() if ".proj_out." in name and "motion_modules" in name and value.any()]
    assert moved and len(moved) == sum(".proj_out." in name and "motion_modules" in name for name in after)


def test_a_step_reads_nothing_from_the_device(tmp_path, monkeypatch, base, clips):
    path = config(tmp_path, base, clips, checkpoint={"every_steps": None})
    with monkeypatch.context() as patch, Waits(patch, steps=5) as waits:
        assert main([path, "train.max_steps=5", "train.log_every_steps=100"]) == 0
    assert waits.seen and not +waits.during


DRAW = """
import sys

import numpy as np
import torch
import yaml
from diffusers import AnimateDiffPipeline, DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
assert type(pipe) is AnimateDiffPipeline and "sfumato" not in sys.modules
pipe.set_progress_bar_config(disable=True)
frames = pipe("a red square", num_frames=4, num_inference_steps=3, guidance_scale=2.0, output_type="np",
              generator=torch.Generator().manual_seed(3)).frames
np.save(sys.argv[2], frames)
"""


def test_stock_diffusers_opens_it_without_sfumato_and_draws_the_same(run, tmp_path):
    done = run_stock(DRAW, str(run / "pipeline"), str(tmp_path / "stock.npy"))
    assert not [line for line in done.stderr.splitlines() if line.strip() and "it/s" not in line and "Loading" not in line], (
        done.stderr
    )
    stock = np.load(tmp_path / "stock.npy")[0]  # (F, H, W, 3)
    pipe = SfumatoPipeline.from_pretrained(run / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np"}
    ours = pipe("a red square", generator=torch.Generator().manual_seed(3), **call).images[0]
    assert np.abs(ours.reshape(SIDE, SIDE, FRAMES, 3).transpose(2, 0, 1, 3) - stock).max() <= 1e-5


def test_clips_are_changed_by_stock_diffusers_too(run):
    parts = AnimateDiffPipeline.from_pretrained(run / "pipeline").components
    pipe = AnimateDiffVideoToVideoPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    video = [Image.new("RGB", (SIDE, SIDE), "white")] * FRAMES
    frames = pipe(video, "a red square", num_inference_steps=3, strength=0.7, height=SIDE, width=SIDE, output_type="np").frames
    assert frames.shape == (1, FRAMES, SIDE, SIDE, 3) and np.isfinite(frames).all()


def test_it_resumes_exactly(tmp_path, base, clips, run):
    path = config(tmp_path, base, clips)
    assert main([path, "train.max_steps=3"]) == 0
    assert main([path, "checkpoint.resume=auto"]) == 0
    assert crashes.result(tmp_path / "run", True) == crashes.result(run, True)


def test_it_goes_on_from_a_model_that_moves_already(tmp_path, clips, run):
    assert main([config(tmp_path, run, clips, train={"max_steps": 1})]) == 0
    before, after = (SfumatoPipeline.from_pretrained(f / "pipeline").unet.state_dict() for f in (run, tmp_path / "run"))
    assert {n for n in after if not torch.equal(before[n], after[n])} <= {n for n in after if "motion_modules" in n}


def test_the_command_draws_and_evaluates_it(run, tmp_path, capsys):
    assert (
        cli(["sample", "a red square", "--model", str(run / "pipeline"), "--steps", "2", "--out", str(tmp_path / "a.gif")])
        == 0
    )
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == FRAMES
    card, settings = ((run / "pipeline" / name).read_text() for name in ("README.md", "training_args.yaml"))
    assert "name: videos:clips" in settings and "/" not in settings.split("name: videos:")[1].split()[0]
    assert "AnimateDiffPipeline" in card and "export_to_gif" in card


@pytest.mark.parametrize(
    ("unet", "named"),
    [
        ({"time_embedding_dim": 64}, "time_embedding_dim"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ({"addition_embed_type": "text", "addition_embed_type_num_heads": 2}, "addition_embed_type"),
    ],
)
def test_a_model_that_diffusers_cannot_animate_is_refused_by_name(tmp_path, clips, capsys, unet, named):
    pipe = tiny.pipeline(tmp_path, unet=unet)
    pipe.save_pretrained(tmp_path / "odd")
    assert main([config(tmp_path, tmp_path / "odd", clips)]) == 2
    error = capsys.readouterr().err
    assert named in error and "configs/frames.yaml" in error


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["motion.num_attention_heads=3"], "UNetMotionModel"),
        (["motion.max_frames=2"], "motion.max_frames"),
        (["init_from=null"], "init_from"),
    ],
)
def test_settings_that_cannot_be_are_told_before_anything_long(tmp_path, base, clips, capsys, changes, named):
    assert main([config(tmp_path, base, clips), *changes]) == 2
    assert named in capsys.readouterr().err
