"""The folder that travels: stock classes, opened in fresh processes where sfumato cannot be imported."""

import ast
import inspect
import json
import os
import re
import signal
import stat
import sys
from pathlib import Path

import crashes
import diffusers
import numpy as np
import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from stock_process import run_stock

from sfumato import cli, files
from sfumato.pipelines import SfumatoPipeline, export_pipeline
from sfumato.pipelines.export import RunRecord, WeightFiles, joined_source
from sfumato.schedulers import SfumatoDDPMScheduler
from sfumato.training.config.load import default_config, dump_config, load_config
from sfumato.training.publish.facts import public_settings
from sfumato.training.train import main

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
    run = RunRecord(samples=[("a red circle", Image.new("RGB", (16, 16)))])
    export_pipeline(pipe, folder / "model", {"title": "Tiny", "steps": 3}, run=run)
    return pipe, folder / "model"


def draw(pipe):
    return pipe(
        "a red circle",
        guidance_scale=3.0,
        num_inference_steps=3,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images


def test_a_process_without_sfumato_draws_the_same_image(exported, tmp_path):
    pipe, folder = exported
    child = run_stock(CHILD, folder, tmp_path / "images")
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


STOCK = sorted(
    name
    for name in dir(diffusers)
    if name.endswith("Scheduler")
    and "trained_betas" in inspect.signature(getattr(diffusers, name).__init__).parameters
    # RePaint takes an image and a mask, CogVideoX shifts every schedule, the inverse ones end in noise, IPNDM keeps none.
    and not name.startswith(("RePaint", "CogVideoX", "IPNDM", "UnCLIP", "CosineDPM"))
    and "Inverse" not in name
)


@pytest.mark.parametrize("name", STOCK)
def test_every_stock_scheduler_keeps_the_trained_schedule_and_draws(exported, tmp_path, name):
    pipe, folder = exported
    cls = getattr(diffusers, name)
    swapped = cls.from_config(pipe.scheduler.config)
    swapped.save_pretrained(tmp_path / "1")
    stored = {
        "swapped": swapped,
        "read": cls.from_pretrained(folder, subfolder="scheduler"),
        "again": cls.from_pretrained(tmp_path / "1"),
    }
    for how, scheduler in stored.items():
        torch.testing.assert_close(scheduler.alphas_cumprod, pipe.scheduler.alphas_cumprod, rtol=0, atol=1e-7, msg=how)
        assert scheduler.config.prediction_type == "v_prediction"
        assert "trained_betas" not in scheduler.config.get("_use_default_values", [])
    stored["again"].save_pretrained(tmp_path / "2")
    assert (tmp_path / "1" / "scheduler_config.json").read_bytes() == (tmp_path / "2" / "scheduler_config.json").read_bytes()
    drawing = SfumatoPipeline.from_pipe(pipe, scheduler=swapped)
    drawing.set_progress_bar_config(disable=True)
    images = drawing(
        "a red circle", num_inference_steps=4, output_type="np", generator=torch.Generator().manual_seed(0)
    ).images
    assert np.isfinite(images).all()


def test_there_are_many_stock_schedulers():
    assert len(STOCK) > 15


def test_half_raw_and_split_weights(exported, tmp_path):
    pipe, _ = exported
    raw = {f"unet.{name}": value + 1 for name, value in pipe.unet.state_dict().items()}
    weights = WeightFiles(variants=["fp16", "raw"], raw=raw, max_shard_size="60KB")
    export_pipeline(pipe, tmp_path / "m", weights=weights)
    assert (tmp_path / "m" / "unet" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    plain = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "m")
    assert {plain.unet.dtype, plain.text_encoder.dtype, plain.vae.dtype} == {torch.float32}
    np.testing.assert_allclose(draw(plain), draw(pipe), atol=1e-6)
    half = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "m", variant="fp16", torch_dtype=torch.float16)
    assert {half.unet.dtype, half.text_encoder.dtype} == {torch.float16}
    for name, value in half.unet.state_dict().items():
        assert torch.equal(value, pipe.unet.state_dict()[name].half())
    unaveraged = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "m", subfolder="unet", variant="raw")
    assert all(torch.equal(value, raw[f"unet.{name}"]) for name, value in unaveraged.state_dict().items())
    bf16 = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "m", dtype=torch.bfloat16, device_map="cpu")
    assert np.isfinite(draw(bf16)).all()
    assert '`variant="fp16"`' in (tmp_path / "m" / "README.md").read_text()
    with pytest.raises(ValueError, match="raw needs"):
        export_pipeline(pipe, tmp_path / "n", weights=WeightFiles(variants=["raw"]))


def test_what_was_loaded_by_remote_code_is_exported_as_the_same_folder(exported, tmp_path):
    _, folder = exported
    remote = diffusers.DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    assert type(remote).__module__.startswith("diffusers_modules")
    export_pipeline(remote, tmp_path / "again", source=folder)
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "README.md":
            assert (tmp_path / "again" / path.relative_to(folder)).read_bytes() == path.read_bytes(), path
    card = (folder / "README.md").read_text().replace(f'"{folder.name}"', '"again"')
    assert (tmp_path / "again" / "README.md").read_text() == card


@pytest.mark.parametrize("renames", [1, 2])
def test_killed_between_the_renames_of_a_system_without_exchange(exported, tmp_path, monkeypatch, renames):
    pipe, _ = exported
    export_pipeline(pipe, tmp_path / "model", {"title": "Old"})
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)

    def work():
        seen = []

        def hook(event, arguments):
            if event == "os.rename" and ".model" in str(arguments):
                seen.append(arguments)
                if len(seen) == renames:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        export_pipeline(pipe, tmp_path / "model", {"title": "New"})

    assert crashes.wait([crashes.fork(work)]) == [-signal.SIGKILL]
    assert (tmp_path / "model").exists() == (renames == 1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ModelCard, "save", full)
        with pytest.raises(OSError, match="No space"):
            export_pipeline(pipe, tmp_path / "model")
    assert "# Old" in (tmp_path / "model" / "README.md").read_text()
    SfumatoPipeline.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("moment", range(0, 60, 12))
def test_killed_while_exporting_the_old_folder_or_the_new_one_opens(exported, tmp_path, moment):
    pipe, _ = exported
    export_pipeline(pipe, tmp_path / "model")
    old = (tmp_path / "model" / "README.md").read_text()

    def work():
        seen = [0]

        def hook(event, arguments):
            if event in ("open", "os.rename", "os.chmod", "os.mkdir", "os.rmdir") and str(tmp_path) in str(arguments[0]):
                seen[0] += 1
                if seen[0] > moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        export_pipeline(pipe, tmp_path / "model", {"title": "New"})

    assert crashes.wait([crashes.fork(work)]) == [-signal.SIGKILL]
    assert (tmp_path / "model" / "README.md").read_text() == old
    SfumatoPipeline.from_pretrained(tmp_path / "model")
    export_pipeline(pipe, tmp_path / "model", {"title": "New"})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert "# New" in (tmp_path / "model" / "README.md").read_text()


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
    assert roots <= {"torch", "numpy", "PIL", "safetensors", "diffusers", "transformers"} | set(sys.stdlib_module_names)
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


def test_card_is_valid_complete_and_every_snippet_runs(exported, tmp_path):
    _, folder = exported
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-image"
    assert "TODO" not in card.content and "None" not in card.content and "{}" not in card.content
    for item in card.data.to_dict()["widget"]:
        assert (folder / item["output"]["url"]).is_file()
    snippets = re.findall(r"```python\n(.*?)```", card.content, re.S)
    assert len(snippets) == 4
    code = "\n".join(f"{code}\nassert image.size == (16, 16)" for code in snippets)

    def run():
        os.chdir(folder.parent)
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # threads that a fork begins find OpenMP's pool invalid
        exec(code, {})

    assert str(folder.parent) not in card.content  # no path of this machine travels
    assert crashes.wait([crashes.fork(run, quiet=False)]) == [0]


def test_export_replaces_an_export_but_nothing_else(exported, tmp_path):
    pipe, _ = exported
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="is not a pipeline"):
        export_pipeline(pipe, tmp_path / "precious")
    export_pipeline(pipe, tmp_path / "clone")
    (tmp_path / "clone" / "notes.md").write_text("x")
    with pytest.raises(ValueError, match="holds more than an export.*notes.md"):
        export_pipeline(pipe, tmp_path / "clone")
    (tmp_path / "clone" / "notes.md").rename(tmp_path / "precious" / "notes.md")
    (tmp_path / "clone" / ".DS_Store").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "clone")
    export_pipeline(pipe, tmp_path / "link", {"title": "New"})
    assert "# New" in (tmp_path / "clone" / "README.md").read_text()
    for _ in range(2):
        export_pipeline(pipe, tmp_path / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clone", "link", "model", "precious"]


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


def test_shared_settings_hold_no_place_of_this_machine():
    """Of every setting that may name a folder or a file."""
    place, config = "/home/somebody/private/thing", default_config()
    config.output_dir = config.init_from = config.checkpoint.resume = place
    config.data.name = config.data.keywords = config.data.links_into = config.data.cache_dir = place
    config.vae.pretrained = config.text_encoder.pretrained = place
    text = public_settings(config)
    assert "somebody" not in text and "keywords: thing" in text


def test_what_a_run_shares_tells_how_it_was_made_and_repeats_it(tmp_path):
    path = tiny.config_file(tmp_path, train={"max_steps": 12}, hub={"variants": ["fp16", "raw"]})
    assert main([str(path)]) == 0
    folder = tmp_path / "run" / "pipeline"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"training_args.yaml", "samples/0.png", "samples/loss.png"} < names
    assert {f"unet/diffusion_pytorch_model.{v}safetensors" for v in ("", "fp16.", "raw.")} < names
    assert {"text_encoder/model.raw.safetensors", "text_encoder/model.fp16.safetensors"} < names
    text = "".join((folder / name).read_text() for name in names if name.endswith((".json", ".yaml")))
    assert str(tmp_path) not in text
    run = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_sfumato"]["run"]
    assert run["step"] == 12 and run["objective"]["weight"] == "unit" and len(run["data"]["fingerprint"]) == 16
    assert run["versions"]["diffusers"] == diffusers.__version__ and run["guidance_scale"] == 3.0
    assert run["commit"] is None or len(run["commit"]) == 40
    card = (folder / "README.md").read_text()
    for fact in ("| Steps | 12 |", "| Images seen | 48 |", "minutes", "learning rate 0.001", "judged by", "Train it again"):
        assert fact in card, fact
    # The settings that travel make the same model, and export keeps what the folder tells.
    again = load_config(
        folder / "training_args.yaml", [f"output_dir={tmp_path / 'again'}", f"data.cache_dir={tmp_path / 'cache'}"]
    )
    (tmp_path / "again.yaml").write_text(dump_config(again))
    assert main([str(tmp_path / "again.yaml")]) == 0
    for part in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        assert (tmp_path / "again" / "pipeline" / f"{part}.safetensors").read_bytes() == (
            folder / f"{part}.safetensors"
        ).read_bytes()
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "shared"), "--variants", "fp16", "raw"]) == 0
    for name in names - {"README.md"}:
        assert (tmp_path / "shared" / name).read_bytes() == (folder / name).read_bytes(), name
    shared = (tmp_path / "shared" / "README.md").read_text()
    assert shared == card.replace(f'"{folder.name}"', '"shared"') and "Variants" in shared
    assert cli.main(["export", str(tmp_path / "shared"), str(tmp_path / "plain")]) == 0
    assert "Variants" not in (tmp_path / "plain" / "README.md").read_text()


def test_a_model_that_learned_its_variance_draws_the_same_in_stock_diffusers(tmp_path):
    """So it needs no code of ours to travel."""
    pipe = tiny.pipeline(tmp_path, scheduler={"prediction_type": "epsilon", "variance_type": "learned_range"})
    unet = diffusers.UNet2DConditionModel.from_config({**pipe.unet.config, "out_channels": 6})
    pipe.register_modules(unet=unet)
    export_pipeline(pipe, tmp_path / "model")
    for cls in (diffusers.DiffusionPipeline, SfumatoPipeline):
        again = cls.from_pretrained(tmp_path / "model")
        again.set_progress_bar_config(disable=True)
        np.testing.assert_allclose(draw(again), draw(pipe), atol=1e-6)


def test_half_precision_halves_the_folder_and_opens_in_float32(exported, tmp_path):
    pipe, folder = exported[0], Path(exported[1])
    small = export_pipeline(pipe, tmp_path / "small", source=folder, weights=WeightFiles(half=True))
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        whole, half = ((where / f"{name}.safetensors").stat().st_size for where in (folder, small))
        assert half < 0.65 * whole
    stock = diffusers.DiffusionPipeline.from_pretrained(small)
    assert {stock.unet.dtype, stock.text_encoder.dtype, stock.vae.dtype} == {torch.float32}
    images = [
        p("a red circle", num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np").images
        for p in (stock, pipe)
    ]
    np.testing.assert_allclose(*images, atol=0.02)
