"""Models of every task in processes that cannot import sfumato: the stock pipeline of their kind, and the same images."""

import json

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from stock_process import run_stock
from test_autoencoder import vae_config
from test_control_task import config as control_config
from test_flow import config as flow_config

from sfumato import cli
from sfumato.pipelines import Cascade, SfumatoPipeline
from sfumato.pipelines.batches import draw_in_batches
from sfumato.pipelines.choices import with_guider, with_sampler
from sfumato.training.publish import hub
from sfumato.training.train import main

CHILD = """
    import json, sys, numpy as np, torch
    from diffusers import DiffusionPipeline
    from PIL import Image
    root, image = sys.argv[1], Image.open(sys.argv[1] + "/image.png")
    white = Image.new("L", (16, 16), 255)
    given = {"inpainting": {"image": image, "mask_image": white, "height": 16, "width": 16, "strength": 1.0},
             "upscaling": {"image": image}, "control": {"image": image}}
    kinds = {}
    for task, folder in json.loads(sys.argv[2]).items():
        pipe = DiffusionPipeline.from_pretrained(folder)
        kinds[task] = type(pipe).__name__
        images = pipe("a red circle", guidance_scale=2.0, num_inference_steps=3, output_type="np",
                      generator=torch.Generator().manual_seed(0), **given.get(task, {})).images
        np.save(f"{root}/{task}.npy", images)
    print(json.dumps(kinds))
"""
KINDS = {
    "flow": "StableDiffusionPipeline",
    "latent": "StableDiffusionPipeline",
    "inpainting": "StableDiffusionInpaintPipeline",
    "upscaling": "StableDiffusionUpscalePipeline",
    "control": "StableDiffusionControlNetPipeline",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Task -> its exported folder."""
    root, sampler = tmp_path_factory.mktemp("doors"), {"sampler": "unipc"}
    for name in (*KINDS, "vae", "base"):
        (root / name).mkdir()
    assert main([vae_config(root / "vae")]) == 0
    assert main([str(tiny.config_file(root / "base"))]) == 0
    assert main([flow_config(root / "flow")]) == 0
    # Stock inpainting draws numbers while it encodes, so a sampler that draws its own would get others.
    for task in ("inpainting", "upscaling"):
        assert main([str(tiny.config_file(root / task, task=task, validation=sampler))]) == 0
    assert main([control_config(root / "control", root / "base" / "run" / "pipeline")]) == 0
    assert main([str(tiny.config_file(root / "latent", vae={"pretrained": str(root / "vae" / "run")}))]) == 0
    return {task: root / task / "run" / "pipeline" for task in (*KINDS, "base")}


IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def test_stock_pipelines_draw_the_same_without_sfumato(folders, tmp_path):
    IMAGE.save(tmp_path / "image.png")
    named = json.dumps({task: str(folders[task]) for task in KINDS})
    child = run_stock(CHILD, tmp_path, named)
    assert json.loads(child.stdout.splitlines()[-1]) == KINDS
    given = {"upscaling": {"image": IMAGE}, "control": {"control_image": IMAGE}}
    for task in KINDS:
        pipe = SfumatoPipeline.from_pretrained(folders[task])
        pipe.set_progress_bar_config(disable=True)
        call = {"guidance_scale": 2.0, "num_inference_steps": 3, "output_type": "np", **given.get(task, {})}
        images = pipe("a red circle", generator=torch.Generator().manual_seed(0), **call).images
        np.testing.assert_allclose(images, np.load(tmp_path / f"{task}.npy"), atol=1e-5, err_msg=task)


def test_a_cascade_is_one_folder_and_one_call(folders, tmp_path, capsys):
    folder = tmp_path / "cascade"
    command = ["export", str(folders["base"]), str(folder), "--upscaler", str(folders["upscaling"])]
    assert cli.main(command) == 0
    assert cli.main(command) == 0  # an export again replaces it
    card = (folder / "README.md").read_text()
    assert (
        f'Cascade.from_pretrained("{folder.name}")' in card
        and f'"{folder.name}/upscaler"' in (folder / "upscaler/README.md").read_text()
    )
    cascade = Cascade.from_pretrained(folder)
    cascade.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 3, "guidance_scale": 2.0, "upscaling_steps": 2}
    texts = ["a red circle", "a blue square"]
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    images = cascade(texts, generator=generators, num_images_per_prompt=2, output_type="np", **call).images
    assert images.shape == (4, 16, 16, 3)
    drawn = draw_in_batches(cascade, texts, seeds=[0, 2], batch_size=1, output_type="np", **call)
    np.testing.assert_allclose(np.stack(drawn), images[[0, 2]], atol=1e-5)
    small = cascade.base(
        "a blue square", generator=generators[3].manual_seed(3), num_inference_steps=3, guidance_scale=2.0
    ).images
    alone = cascade.upscaler("a blue square", image=small, generator=generators[3], num_inference_steps=2, guidance_scale=1.0)
    np.testing.assert_allclose(np.asarray(alone.images[0]) / 255, images[3], atol=3e-3)
    assert cli.main(["sample", "a red circle", "--model", str(folder), "--steps", "2", "--out", str(tmp_path / "g.png")]) == 0
    assert (tmp_path / "g.png").is_file()
    capsys.readouterr()
    assert cli.main(["export", str(folders["upscaling"]), str(tmp_path / "x"), "--upscaler", str(folders["upscaling"])]) == 2
    assert "draws from text and nothing else" in capsys.readouterr().err
    assert cli.main(["export", str(folders["base"]), str(tmp_path / "x"), "--upscaler", str(folders["base"])]) == 2
    assert "must be one for upscaling" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_a_cascade_keeps_its_second_model_and_the_shape_of_its_images(folders, tmp_path):
    folder, again = tmp_path / "cascade", tmp_path / "again"
    assert cli.main(["export", str(folders["base"]), str(folder), "--upscaler", str(folders["upscaling"])]) == 0
    assert cli.main(["export", str(folder), str(again)]) == 0
    assert (again / "upscaler" / "model_index.json").is_file()
    assert cli.main(["export", str(again), str(again), "--upscaler", str(folders["upscaling"])]) == 0
    assert (again / "README.md").read_text().count("## Larger images") == 1
    cascade = Cascade.from_pretrained(again, local_files_only=True)
    call = {"num_inference_steps": 2, "upscaling_steps": 2, "output_type": "np", "return_dict": False}
    assert cascade("a red circle", height=16, width=32, **call)[0].shape == (1, 16, 32, 3)
    pushed = hub._content(again / "upscaler" / "README.md", "me/mine", "upscaler").decode()
    assert 'from_pretrained(snapshot_download("me/mine") + "/upscaler")' in pushed
    assert "```python\nfrom huggingface_hub import snapshot_download\n" in pushed


def test_upscaling_keeps_the_shape_of_the_image(folders):
    pipe = SfumatoPipeline.from_pretrained(folders["upscaling"])
    call = {"num_inference_steps": 2, "output_type": "np"}
    for given, shape in (((16, 8), (16, 32)), ((32, 24), (24, 32)), ((16, 16), (16, 16))):
        assert pipe("a red circle", image=IMAGE.resize(given), **call).images.shape[1:3] == shape
    assert pipe("a red circle", image=torch.rand(1, 3, 24, 16), **call).images.shape[1:3] == (24, 16)
    with pytest.raises(ValueError, match="`noise_level` is for upscaling"):
        SfumatoPipeline.from_pretrained(folders["base"])("a red circle", noise_level=5)


@pytest.mark.parametrize("task", ["control", "flow"])
def test_autoguidance_steers_away_from_the_weaker_model(folders, task):
    pipe, weak = (SfumatoPipeline.from_pretrained(folders[task]) for _ in range(2))
    part = weak.unet if task == "flow" else weak.controlnet  # a control run's checkpoints differ in their ControlNets only
    with torch.no_grad():
        for parameter in part.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    if task == "flow":
        pipe = with_sampler(pipe, "euler")
    given = {"control_image": IMAGE} if task == "control" else {}
    images = []
    for model, scale in ((pipe, 1.0), (with_guider(pipe, "autoguidance", weak), 4.0)):
        call = {"num_inference_steps": 3, "output_type": "np", "generator": torch.Generator().manual_seed(0), **given}
        images.append(model("a red circle", guidance_scale=scale, **call).images)
    assert np.abs(images[0] - images[1]).max() > 1e-3
    with pytest.raises(ValueError, match="ControlNet" if task == "control" else "prediction_type"):
        with_guider(pipe, "autoguidance", SfumatoPipeline.from_pretrained(folders["base"]))


def test_the_command_draws_with_every_task(folders, tmp_path):
    IMAGE.save(tmp_path / "image.png")
    image = str(tmp_path / "image.png")
    for task, more in (
        ("upscaling", ["--image", image]),
        ("control", ["--control", image]),
        ("flow", ["--sampler", "euler"]),
    ):
        out = tmp_path / f"{task}.png"
        command = ["sample", "a red circle", "--model", str(folders[task]), "--steps", "2", "--out", str(out), *more]
        assert cli.main(command) == 0 and out.is_file()


def test_the_doctor_looks_at_every_task(folders, tmp_path, capsys):
    for task in ("flow", "upscaling", "control", "inpainting"):
        path = folders[task].parents[1] / "tiny.yaml"
        assert cli.main(["doctor", str(path)]) == 0
        assert "weights are trained" in capsys.readouterr().out
