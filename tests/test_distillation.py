"""Few-step models: what they are taught, what they are told, and that stock diffusers draws them."""

import signal

import crashes
import numpy as np
import pytest
import tiny
import torch
import yaml
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image
from stock_process import run_stock
from test_autoencoder import vae_config
from test_flow import config as flow_config

from sfumato.cli import main as cli
from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.choices import with_guider, with_sampler
from sfumato.pipelines.edit import invert
from sfumato.pipelines.explain import explain
from sfumato.pipelines.guided import guidance_embedding
from sfumato.pipelines.runtimes import with_runtime
from sfumato.training.config.load import load_config
from sfumato.training.models.finetune import add_guidance_input
from sfumato.training.tasks import distillation
from sfumato.training.train import main

FEW = {"sampler": "lcm", "num_inference_steps": 4, "guidance_scale": 2.0}


def without(content, *sections):
    settings = yaml.safe_load(content.read_text())
    for section in sections:
        settings.pop(section, None)
    content.write_text(yaml.safe_dump(settings))
    return str(content)


def config(folder, teacher, **sections):
    settings = {"task": "distillation", "init_from": str(teacher), "validation": FEW, "optim": {"lr_decay": "constant"}}
    settings |= {"distil": {"guidance_width": 8}, "objective": {"caption_dropout": 0.0}}
    return without(tiny.config_file(folder, **{**settings, **sections}), "unet", "text_encoder", "scheduler")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A tiny model that predicts x_0."""
    folder = tmp_path_factory.mktemp("teacher")
    scheduler = {"beta_schedule": "cosine", "prediction_type": "sample"}
    assert main([str(tiny.config_file(folder, scheduler=scheduler, train={"max_steps": 2}))]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def student(tmp_path_factory, teacher):
    folder = tmp_path_factory.mktemp("student")
    assert main([config(folder, teacher)]) == 0
    return folder / "run"


def test_what_is_told_changes_nothing_at_first(teacher):
    unet = SfumatoPipeline.from_pretrained(teacher / "pipeline").unet
    told = add_guidance_input(unet, 8, 0).eval()
    x_t, t, text = torch.randn(2, 3, 16, 16), torch.tensor([10, 900]), torch.randn(2, 20, 32)
    cond = guidance_embedding(torch.tensor([1.0, 7.5]), 8)
    assert cond.shape == (2, 8) and not torch.equal(cond[0], cond[1])
    with torch.no_grad():
        assert torch.equal(told(x_t, t, text, timestep_cond=cond)[0], unet.eval()(x_t, t, text)[0])


@pytest.mark.parametrize("segments", [1, 4])
def test_where_the_path_ends_in_one_image_that_image_is_the_target(tmp_path, teacher, segments):
    """Teacher and student that see the same x_0 wherever they are asked are consistent: every target is that x_0."""
    loaded = load_config(config(tmp_path, teacher, distil={"guidance_width": 8, "segments": segments}))
    task = tiny.task(loaded)
    for unet in (task.teacher, task.target):
        with torch.no_grad():
            unet.conv_out.weight.zero_()
            unet.conv_out.bias.copy_(torch.tensor([0.5, -0.25, 0.1]))
    t = torch.tensor([3, 60, 130, 249, 250, 380, 499, 510, 740, 760, 998, 999])
    x_0 = task.teacher.conv_out.bias.detach().reshape(1, 3, 1, 1).expand(len(t), 3, 16, 16)
    x_t = task.pipe.scheduler.add_noise(x_0, torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)), t)
    text, scale = torch.randn(len(t), 20, 32), torch.full((len(t),), 2.0)
    inputs = task.network_input(x_t, {}, task.streams)[1]
    for task.jumps in distillation.JUMPS:
        with torch.no_grad():
            target = task._target(x_t, t, text, inputs, scale, {})
        assert (target - x_0).abs().max() < 2e-3, (segments, task.jumps)


def test_the_student_is_asked_at_the_times_of_its_sampler(tmp_path, teacher):
    task = tiny.task(load_config(config(tmp_path, teacher)))
    assert {999, 499, 759, 259} <= set(task.own_steps.tolist()) and task.own_steps.max() == 999
    keys = torch.arange(4000)
    t = task._times(torch.linspace(0, 0.9999, 4000), keys)
    assert 1 <= t.min() and t.max() == 999 and 0.3 < torch.isin(t, task.own_steps).float().mean() < 0.42
    scale, told = task._scales(keys)
    assert 1 <= scale.min() and scale.max() == 2.5 and told.max() > 9 and (told >= scale).all()


DRAW = """
import sys

import numpy as np
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline, LatentConsistencyModelPipeline, StableDiffusionPipeline

classes = (DiffusionPipeline, StableDiffusionPipeline, AutoPipelineForText2Image, LatentConsistencyModelPipeline)
for i, cls in enumerate(classes):
    pipe = cls.from_pretrained(sys.argv[1])
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "np"}
    images = pipe("a red circle", generator=torch.Generator().manual_seed(3), **call)
    np.save(f"{sys.argv[2]}/{i}.npy", images.images)
"""


def test_every_stock_pipeline_draws_it_the_same_and_in_silence(student, tmp_path):
    done = run_stock(DRAW, str(student / "pipeline"), str(tmp_path))
    assert not [line for line in done.stderr.splitlines() if line.strip() and "it/s" not in line], done.stderr
    pipe = SfumatoPipeline.from_pretrained(student / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 4, "output_type": "np", "guidance_scale": 2.0}
    ours = pipe("a red circle", generator=torch.Generator().manual_seed(3), **call).images
    assert pipe.num_passes == 4, "one pass a step at any scale"
    for i in range(4):
        assert np.abs(np.load(tmp_path / f"{i}.npy") - ours).max() <= 1e-5, i


def test_the_scale_is_told(student):
    pipe = SfumatoPipeline.from_pretrained(student / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pipe.unet.time_embedding.cond_proj.weight.normal_(std=0.5)
    one, two = (
        pipe(
            "a red circle",
            num_inference_steps=2,
            guidance_scale=s,
            output_type="np",
            generator=torch.Generator().manual_seed(0),
        )
        for s in (1.0, 2.0)
    )
    assert np.abs(one.images - two.images).max() > 1e-4 and pipe.num_passes == 2


def test_what_knows_a_model_knows_a_few_step_one(student, tmp_path, caplog):
    pipe = SfumatoPipeline.from_pretrained(student / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "np"}
    drawn = pipe("a red circle", generator=torch.Generator().manual_seed(0), **call).images
    onnx = with_runtime(pipe, "onnx")("a red circle", generator=torch.Generator().manual_seed(0), **call).images
    assert np.abs(drawn - onnx).max() < 1e-4
    assert len(explain(pipe, "a red circle", num_inference_steps=2).words) == 3
    image = pipe("a red circle", num_inference_steps=2).images[0]
    with pytest.raises(ValueError, match="its teacher"):
        invert(pipe, image, "a red circle")
    with pytest.raises(ValueError, match="guidance scale is an input"):
        with_guider(pipe, "apg")
    pipe("a red circle", negative_prompt="blue", num_inference_steps=1)
    assert "negative prompt has no effect" in caplog.text
    assert cli(["sample", "a red circle", "--model", str(student), "--out", str(tmp_path / "a.png")]) == 0
    card = (student / "pipeline" / "README.md").read_text()
    assert "negative prompt" in card and "num_inference_steps=4" in card and "UniPC" not in card


def test_it_resumes_exactly(tmp_path, teacher, student):
    path = config(tmp_path, teacher)
    assert crashes.train(path, moments=(2, 9, False)) == [-signal.SIGKILL]
    assert main([path, "checkpoint.resume=auto"]) == 0
    assert crashes.result(tmp_path / "run") == crashes.result(student)


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon", "flow"])
def test_every_kind_of_teacher(tmp_path, kind):
    (tmp_path / "teacher").mkdir()
    if kind == "flow":
        assert main([str(flow_config(tmp_path / "teacher"))]) == 0
    else:
        scheduler = {"beta_schedule": "cosine", "prediction_type": kind}
        assert main([str(tiny.config_file(tmp_path / "teacher", scheduler=scheduler, train={"max_steps": 1}))]) == 0
    assert main([config(tmp_path, tmp_path / "teacher" / "run"), "train.max_steps=3", "distil.segments=4"]) == 0
    pipe = SfumatoPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    ours = pipe("a red circle", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
    stock = pipe.to_stock()
    stock.set_progress_bar_config(disable=True)
    other = stock("a red circle", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
    assert np.isfinite(ours).all() and np.abs(ours - other).max() <= 1e-5
    assert pipe.scheduler.config.prediction_type == {"epsilon": "v_prediction", "flow": "flow_prediction"}.get(kind, kind)


def test_a_student_whose_images_are_all_alike_is_stopped(tmp_path, teacher, capsys, monkeypatch):
    monkeypatch.setattr(distillation, "WATCHED", 4)
    pipe = SfumatoPipeline.from_pretrained(teacher / "pipeline")
    with torch.no_grad():
        pipe.unet.conv_out.weight.zero_()
    pipe.save_pretrained(tmp_path / "dull")
    path = config(tmp_path, tmp_path / "dull", train={"max_steps": 200, "batch_size": 8}, optim={"lr": 1e-9})
    assert main([path]) == 3
    assert "have become alike" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["validation.sampler=ddpm"], "lcm or tcd"),
        (["validation.guider=apg"], "scale is an input"),
        (["init_from=null"], "the teacher"),
        (["distil.segments=0"], "distil.segments"),
        (["distil.guidance_width=7"], "distil.guidance_width"),
    ],
)
def test_settings_that_cannot_be_are_told(tmp_path, teacher, capsys, changes, said):
    assert main([config(tmp_path, teacher), *changes]) == 2
    assert said in capsys.readouterr().err


def test_a_student_begins_from_another(tmp_path, teacher, student, capsys):
    """After one step that moves nothing to speak of it is still that student."""
    distil = {"guidance_width": 8, "student": str(student)}
    path = config(tmp_path, teacher, distil=distil, optim={"lr": 1e-12, "weight_decay": 0.0}, train={"max_steps": 1})
    assert main([path]) == 0
    found, expected = (SfumatoPipeline.from_pretrained(run / "pipeline").unet for run in (tmp_path / "run", student))
    for name, value in expected.state_dict().items():
        assert torch.allclose(found.state_dict()[name], value, rtol=0, atol=1e-9)
    assert main([path, f"distil.student={teacher}", f"output_dir={tmp_path / 'other'}"]) == 2
    assert "not a student of this teacher" in capsys.readouterr().err


def test_a_student_is_no_teacher(tmp_path, student, capsys):
    assert main([config(tmp_path, student)]) == 2
    assert "name its teacher" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_samplers_of_few_steps_draw_any_model(teacher, name):
    pipe = with_sampler(SfumatoPipeline.from_pretrained(teacher / "pipeline"), name)
    pipe.set_progress_bar_config(disable=True)
    ours = pipe("a red circle", num_inference_steps=4, output_type="np", generator=torch.Generator().manual_seed(0)).images
    stock = pipe.to_stock()
    stock.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 4, "output_type": "np", "guidance_scale": 7.5}
    other = stock("a red circle", generator=torch.Generator().manual_seed(0), **call).images
    assert np.abs(ours - other).max() <= 1e-5


def test_a_teacher_that_inpaints_in_the_stock_pipeline_too(tmp_path):
    (tmp_path / "teacher").mkdir()
    scheduler = {"beta_schedule": "cosine", "prediction_type": "sample"}
    assert (
        main([str(tiny.config_file(tmp_path / "teacher", task="inpainting", scheduler=scheduler, train={"max_steps": 1}))])
        == 0
    )
    assert main([config(tmp_path, tmp_path / "teacher" / "run", distil={"guidance_width": 8, "masks": True})]) == 0
    pipe = SfumatoPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    stock = DiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert type(stock).__name__ == "StableDiffusionInpaintPipeline" and pipe.reads == "masks"
    image, mask = Image.new("RGB", (16, 16), "red"), Image.new("L", (16, 16), 255)
    call = {"image": image, "mask_image": mask, "num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "np"}
    images = []
    for each in (pipe, stock):
        each.set_progress_bar_config(disable=True)
        # Stock inpainting draws numbers while it encodes, so a sampler that draws its own would get others.
        each.scheduler = DDIMScheduler.from_config(each.scheduler.config)
        generator = torch.Generator().manual_seed(0)
        images.append(each("a red circle", height=16, width=16, strength=1.0, generator=generator, **call).images)
    assert np.abs(images[0] - images[1]).max() <= 1e-5


def test_a_teacher_that_works_on_latents(tmp_path):
    for name in ("vae", "latent", "few"):
        (tmp_path / name).mkdir()
    assert main([vae_config(tmp_path / "vae")]) == 0
    scheduler = {"beta_schedule": "cosine", "prediction_type": "sample"}
    latent = {"vae": {"pretrained": str(tmp_path / "vae" / "run")}, "scheduler": scheduler, "train": {"max_steps": 1}}
    assert main([str(tiny.config_file(tmp_path / "latent", **latent))]) == 0
    assert main([config(tmp_path / "few", tmp_path / "latent" / "run", train={"max_steps": 1})]) == 0
    pipe = SfumatoPipeline.from_pretrained(tmp_path / "few" / "run" / "pipeline")
    assert pipe.vae_scale_factor == 2 and pipe("a red circle", num_inference_steps=1).images[0].size == (16, 16)


def test_evaluate_and_doctor_know_it(student, tmp_path, capsys):
    out = str(tmp_path / "figures")
    assert cli(["evaluate", "--model", str(student), "--images", "8", "--out", out]) == 0
    assert "4 steps" in capsys.readouterr().out
    assert cli(["doctor", str(student.parent / "tiny.yaml")]) in (0, 1)
    assert "error" not in capsys.readouterr().out.lower().split("samples")[0]
