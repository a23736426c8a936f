"""The folder that travels: stock classes, opened in fresh processes where sfumato cannot be imported."""

import ast
import json
import os
import re
import stat
import subprocess
import sys
import textwrap

import diffusers
import numpy as np
import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from sfumato.pipelines import SfumatoPipeline, export_pipeline
from sfumato.pipelines.export import joined_source
from sfumato.schedulers import SfumatoDDPMScheduler

FILES = {
    "README.md",
    "model_index.json",
    "pipeline.py",
    "samples/0.png",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}

# A child that cannot see sfumato draws with every stock door and with the code that travels.
CHILD = """
    import sys, numpy as np, torch
    sys.meta_path.insert(0, type("No", (), {"find_spec": staticmethod(
        lambda name, *a: (_ for _ in ()).throw(ImportError(name)) if name.split(".")[0] == "sfumato" else None)}))
    import diffusers
    folder, out = sys.argv[1:]
    def draw(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe("a red circle", guidance_scale=3.0, num_inference_steps=3, output_type="np",
                    generator=torch.Generator().manual_seed(0)).images
    pipes = {name: getattr(diffusers, name).from_pretrained(folder) for name in
             ("DiffusionPipeline", "StableDiffusionPipeline", "AutoPipelineForText2Image")}
    pipes["code"] = diffusers.DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    assert type(pipes["code"]).__name__ == "SfumatoPipeline", type(pipes["code"])
    assert type(pipes["code"].scheduler).__name__ == "SfumatoDDPMScheduler"
    assert type(pipes["DiffusionPipeline"]).__name__ == "StableDiffusionPipeline"
    assert "sfumato" not in sys.modules
    pipes["code"].save_pretrained(out + "-resaved")
    np.savez(out, **{name: draw(pipe) for name, pipe in pipes.items()},
             resaved=draw(diffusers.DiffusionPipeline.from_pretrained(out + "-resaved")))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    pipe = tiny.pipeline(folder, scheduler={"beta_schedule": "chen_sigmoid", "schedule_params": {"tau": 0.8}})
    export_pipeline(pipe, folder / "model", {"title": "Tiny", "steps": 3}, [("a red circle", Image.new("RGB", (16, 16)))])
    return pipe, folder / "model"


def draw(pipe):
    return pipe(
        "a red circle",
        guidance_scale=3.0,
        num_inference_steps=3,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images


def run_child(code, *arguments):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr
    return child


def test_a_process_without_sfumato_draws_the_same_picture(exported, tmp_path):
    pipe, folder = exported
    child = run_child(CHILD, folder, tmp_path / "images")
    expected = draw(pipe)
    for name, images in np.load(tmp_path / "images.npz").items():
        np.testing.assert_allclose(images, expected, atol=1e-5, err_msg=name)
    for trouble in ("newly initialized", "not expected", "Expected types", "MISSING", "UNEXPECTED"):
        assert trouble not in child.stderr


def test_folder_holds_just_these_files_readable_by_all(exported):
    _, folder = exported
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    assert set(files) == FILES
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o644 for path in files.values())


def test_index_names_stock_classes_only(exported):
    index = json.loads((exported[1] / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    for name, value in index.items():
        if isinstance(value, list) and value != [None, None]:
            assert value[0] in ("diffusers", "transformers"), name
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]


def test_ours_opens_it_without_a_flag_and_gets_our_scheduler_back(exported):
    pipe, folder = exported
    again = SfumatoPipeline.from_pretrained(folder)
    again.set_progress_bar_config(disable=True)
    assert isinstance(again.scheduler, SfumatoDDPMScheduler)
    assert again.scheduler.config._sfumato["schedule_params"]["tau"] == 0.8
    assert again.scheduler.config.prediction_type == "v_prediction"
    assert torch.equal(again.scheduler.betas, pipe.scheduler.betas)
    np.testing.assert_allclose(draw(again), draw(pipe), atol=1e-6)


def test_loading_says_nothing_odd(exported, capfd):
    SfumatoPipeline.from_pretrained(exported[1])
    assert "not expected" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["DDPM", "DDIM", "DPMSolverMultistep", "UniPCMultistep", "DEISMultistep", "EulerDiscrete"])
def test_any_stock_scheduler_reads_the_trained_schedule(exported, name):
    pipe, folder = exported
    stock = getattr(diffusers, f"{name}Scheduler").from_pretrained(folder, subfolder="scheduler")
    torch.testing.assert_close(stock.alphas_cumprod, pipe.scheduler.alphas_cumprod, rtol=0, atol=1e-7)


def test_saving_again_gives_the_same_folder(exported, tmp_path):
    _, folder = exported
    export_pipeline(SfumatoPipeline.from_pretrained(folder), tmp_path / "again")
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        if path.is_file() and relative.name != "README.md" and relative.parts[0] != "samples":
            assert (tmp_path / "again" / relative).read_bytes() == path.read_bytes(), relative


def test_transformers_4_finds_what_it_needs(exported):
    _, folder = exported
    assert all(key.startswith("text_model.") for key in load_file(folder / "text_encoder" / "model.safetensors"))
    from tokenizers import Tokenizer

    full = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    vocab = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    assert vocab == full.get_vocab()
    lines = (folder / "tokenizer" / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("#version") and all(len(line.split(" ")) == 2 for line in lines[1:])


def test_travelling_code_is_one_self_contained_file():
    tree = ast.parse(joined_source())
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            roots.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            roots |= {name.name.split(".")[0] for name in node.names}
    assert roots <= {"torch", "numpy", "PIL", "diffusers", "transformers"} | set(sys.stdlib_module_names)
    classes = [
        n
        for n in tree.body
        if isinstance(n, ast.ClassDef) and any(getattr(b, "id", "") == "DiffusionPipeline" for b in n.bases)
    ]
    assert [c.name for c in classes] == ["SfumatoPipeline"]


def test_code_in_a_folder_does_not_run_unasked(exported, tmp_path):
    _, folder = exported
    with pytest.raises(ValueError, match="trust_remote_code"):
        diffusers.DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder))


def test_card_is_valid_complete_and_its_snippet_runs(exported, tmp_path):
    _, folder = exported
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-image"
    assert "TODO" not in card.content and "{" not in card.text.split("```")[0]
    for item in card.data.to_dict()["widget"]:
        assert (folder / item["output"]["url"]).is_file()
    snippet = re.search(r"```python\n(.*?)```", card.content, re.S).group(1)
    run_child(snippet + f"\nimage.save({str(tmp_path / 'x.png')!r})\nassert image.size == (16, 16)")


def test_export_replaces_an_export_but_nothing_else(exported, tmp_path):
    pipe, _ = exported
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="is no pipeline"):
        export_pipeline(pipe, tmp_path / "precious")
    for _ in range(2):
        export_pipeline(pipe, tmp_path / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "precious"]


def test_a_crash_while_exporting_leaves_the_old_folder(exported, tmp_path, monkeypatch):
    pipe, _ = exported
    export_pipeline(pipe, tmp_path / "model")
    before = {p: p.read_bytes() for p in (tmp_path / "model").rglob("*") if p.is_file()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ModelCard, "save", full)
    with pytest.raises(OSError, match="No space"):
        export_pipeline(pipe, tmp_path / "model")
    assert {p: p.read_bytes() for p in (tmp_path / "model").rglob("*") if p.is_file()} == before
