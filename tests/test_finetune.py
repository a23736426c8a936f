"""A trained folder is trained further, whole or by LoRA, and the result goes where such results go."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
import yaml
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from sfumato.pipelines import SfumatoPipeline
from sfumato.training.config.load import load_config
from sfumato.training.models import build
from sfumato.training.models.text import extend_vocabulary, remember_words, train_tokenizer
from sfumato.training.train import main


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    assert main([str(tiny.config_file(folder))]) == 0
    return folder / "run" / "pipeline"


def finetune_config(folder, base, **sections):
    path = tiny.config_file(folder, **sections)
    content = yaml.safe_load(path.read_text())
    for name in ("unet", "scheduler", "text_encoder"):
        content.pop(name)
    path.write_text(yaml.safe_dump({**content, "init_from": str(base)}))
    return path


def draw(pipe, prompt="a small red circle at the top left on white"):
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe(
        prompt, num_inference_steps=3, guidance_scale=2.0, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images[0]


def test_whole_model_is_trained_from_where_it_was(tmp_path, base):
    assert main([str(finetune_config(tmp_path, base, train={"max_steps": 2}, optim={"lr": 1e-7}))]) == 0
    before, after = (SfumatoPipeline.from_pretrained(folder) for folder in (base, tmp_path / "run" / "pipeline"))
    old, new = dict(before.unet.named_parameters()), dict(after.unet.named_parameters())
    assert all((old[name] - new[name]).abs().max() < 1e-5 for name in old)
    assert any(not torch.equal(old[name], new[name]) for name in old)
    for a, b in zip(before.text_encoder.parameters(), after.text_encoder.parameters()):
        assert torch.equal(a, b)  # frozen, unless text_encoder.train is set
    assert after.scheduler.config.trained_betas == before.scheduler.config.trained_betas


@pytest.mark.parametrize("place", ["", "checkpoints/step-*"])
def test_a_run_and_a_checkpoint_can_be_trained_further(tmp_path, base, place):
    (start,) = sorted(base.parent.glob(place))[-1:] if place else [base.parent]
    assert main([str(finetune_config(tmp_path, start, train={"max_steps": 1}))]) == 0
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()


def test_a_half_precision_folder_is_trained_in_float32_at_the_wanted_size(tmp_path, base):
    StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float16).save_pretrained(tmp_path / "half")
    path = finetune_config(tmp_path, tmp_path / "half", data={"resolution": 24}, text_encoder={})
    with pytest.warns(UserWarning, match="draws images of 16 x 16 pixels and is now trained on 24 x 24.*data.resolution"):
        assert main([str(path)]) == 0
    after = StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert after.unet.config.sample_size == 24
    assert {p.dtype for part in (after.unet, after.text_encoder) for p in part.parameters()} == {torch.float32}


def test_resume_says_that_frozen_weights_are_others(tmp_path, base, capsys):
    shutil.copytree(base, tmp_path / "base")
    path = str(finetune_config(tmp_path, tmp_path / "base", optim={"lr_decay": "constant"}))
    main([path, "train.max_steps=2"])
    assert main([path, "checkpoint.resume=auto", "train.max_steps=3"]) == 0
    assert "frozen weights" not in capsys.readouterr().out
    file = tmp_path / "base" / "text_encoder" / "model.safetensors"
    save_file({name: 1.1 * value for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    assert main([path, "checkpoint.resume=auto", "train.max_steps=4"]) == 0
    assert "frozen weights: " in capsys.readouterr().out


def test_a_resumed_fine_tuning_keeps_its_tokenizer(tmp_path, base):
    shutil.copytree(base, tmp_path / "base")
    path = str(finetune_config(tmp_path, tmp_path / "base", text_encoder={}))
    main([path, "text_encoder.train=true", "train.max_steps=2"])
    words = (tmp_path / "run" / "pipeline" / "tokenizer" / "vocab.json").read_text()
    file = tmp_path / "base" / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    first, second = list(content["model"]["vocab"])[:2]
    vocab = content["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    file.write_text(json.dumps(content))
    main([path, "text_encoder.train=true", "train.max_steps=3", "checkpoint.resume=auto"])
    assert (tmp_path / "run" / "pipeline" / "tokenizer" / "vocab.json").read_text() == words


def test_a_tokenizer_grows_and_known_words_keep_their_tokens():
    captions = ["a red circle", "a blue square on white", "Ärzte", "红心", "蓝书"]
    old = train_tokenizer(captions, 600, 20)
    remember_words(old, captions)
    new = extend_vocabulary(old, [*captions, *["a zebra 斑马", "斑马", "zebras", "红心脏"] * 3], 60, 24)
    assert len(old) < len(new) <= len(old) + 60 and new.model_max_length == 20  # no caption is longer
    assert new(captions).input_ids == old(captions).input_ids
    assert len(new.tokenize("zebra 斑马")) < len(old.tokenize("zebra 斑马"))
    assert new.eos_token_id == old.eos_token_id and new.decode(new("斑马").input_ids[1:-1]).strip() == "斑马"
    assert extend_vocabulary(old, [*captions, "zebra " * 22], 60, 24).model_max_length == 24
    old.init_kwargs.pop("caption_words")
    with pytest.raises(ValueError, match="which words its model knows"):
        extend_vocabulary(old, captions, 40, 24)


def test_a_model_learns_words_of_another_language_and_goes_on_after_a_break(tmp_path, base):
    data = {"name": "openmoji", "words": ["heart"], "languages": ["en", "zh"], "resolution": 16}
    path = str(finetune_config(tmp_path, base, data=data, text_encoder={}, optim={"lr_decay": "constant"}))
    content = yaml.safe_load((tmp_path / "tiny.yaml").read_text())
    content["text_encoder"] = {"train": True, "extra_vocab": 200, "max_length": 40}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
    assert main([path, "train.max_steps=2"]) == 0
    assert main([path, "train.max_steps=3", "checkpoint.resume=auto"]) == 0
    before, after = (SfumatoPipeline.from_pretrained(folder) for folder in (base, tmp_path / "run" / "pipeline"))
    assert len(after.tokenizer) > len(before.tokenizer) and 20 <= after.tokenizer.model_max_length <= 40
    assert after.text_encoder.config.vocab_size == len(after.tokenizer)
    assert len(after.tokenizer.tokenize("红心")) < len(before.tokenizer.tokenize("红心"))
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    np.testing.assert_allclose(draw(stock, "红心"), draw(after, "红心"), atol=1e-5)
    with pytest.warns(UserWarning, match="extra_vocab=200 has no effect without text_encoder.train"):
        frozen = load_config(path, ["text_encoder.train=false"])
    assert len(build.build_pipeline(frozen, ["红心"]).tokenizer) == len(before.tokenizer)
    with pytest.warns(UserWarning, match="extra_vocab=200 has no effect without .*lora.rank"):
        adapted = load_config(path, ["lora.rank=2"])
    assert len(build.build_pipeline(adapted, ["红心"]).tokenizer) == len(before.tokenizer)


def test_a_pixel_model_goes_on_in_latents(tmp_path, base):
    """At once it predicts what it predicted, of the image made smaller; of the other channels nothing."""
    torch.manual_seed(0)
    vae = tiny.vae()
    vae.save_pretrained(tmp_path / "vae")
    path = finetune_config(tmp_path, base, data={"resolution": 32}, vae={"pretrained": str(tmp_path / "vae")}, text_encoder={})
    before, after = SfumatoPipeline.from_pretrained(base), build.build_pipeline(load_config(path), [])
    assert after.unet.config.in_channels == after.unet.config.out_channels == 4 and after.unet.config.sample_size == 16
    noisy = torch.randn(2, 4, 16, 16)
    t = torch.tensor([10, 500])
    text = torch.randn(2, 5, 32)
    with torch.no_grad():
        old = before.unet(noisy[:, :3], t, text).sample
        new = after.unet(noisy, t, text).sample
    torch.testing.assert_close(new[:, :3], old)
    assert (new[:, 3:] == 0).all() and not after.scheduler.config.thresholding
    assert main([str(path)]) == 0
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    ours = SfumatoPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert draw(stock).shape == (32, 32, 3)
    np.testing.assert_allclose(draw(stock), draw(ours), atol=1e-5)


@pytest.mark.parametrize(
    "source, task, rank, message",
    [
        ("latents", "text_to_image", 0, "can move into latents, of at least"),
        ("base", "inpainting", 0, "task=text_to_image"),
        ("base", "text_to_image", 2, "without lora.rank"),
    ],
)
def test_what_cannot_move_into_latents_is_told(tmp_path, base, capsys, source, task, rank, message):
    tiny.vae().save_pretrained(tmp_path / "vae")
    vae = {"pretrained": str(tmp_path / "vae")}
    if source == "latents":
        assert main([str(tiny.config_file(tmp_path, vae=vae, train={"max_steps": 1}))]) == 0
        source = (tmp_path / "run").rename(tmp_path / "first")
    else:
        source = base
    path = finetune_config(tmp_path, source, vae=vae, task=task, data={"resolution": 32}, text_encoder={})
    assert main([str(path), f"lora.rank={rank}"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*has no effect")
@pytest.mark.parametrize("setting", ["text_encoder.pretrained", "vae.pretrained"])
def test_a_pretrained_part_that_is_not_there_is_told(tmp_path, capsys, setting):
    assert main([str(tiny.config_file(tmp_path)), f"{setting}={tmp_path / 'nothing'}"]) == 2
    assert f"{setting}=" in (error := capsys.readouterr().err) and "cannot be opened" in error


@pytest.mark.filterwarnings("ignore:.*has no effect")
def test_a_part_of_a_pipeline_and_a_part_alone_are_both_taken(tmp_path, base):
    for source in (base, base / "text_encoder"):
        if source != base:
            shutil.copytree(base / "tokenizer", tmp_path / "alone")
            shutil.copytree(source, source := tmp_path / "alone", dirs_exist_ok=True)
        path = tiny.config_file(tmp_path, text_encoder={}, train={"max_steps": 1}, output_dir=str(tmp_path / source.name))
        assert main([str(path), f"text_encoder.pretrained={source}"]) == 0
        used, given = (
            load_file(f / "text_encoder" / "model.safetensors") for f in (tmp_path / source.name / "pipeline", base)
        )
        assert all(torch.equal(used[name], given[name]) for name in given)


def test_another_sampler_in_the_folder_does_not_matter(tmp_path, base):
    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "ddim")
    assert main([str(finetune_config(tmp_path, tmp_path / "ddim", train={"max_steps": 1}))]) == 0
    after = SfumatoPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert after.scheduler.config.trained_betas == pipe.scheduler.config.trained_betas


def test_lora_is_read_by_stock_diffusers_and_equals_the_whole_folder(tmp_path, base):
    pytest.importorskip("peft")
    sections = {"lora": {"rank": 4}, "optim": {"lr": 0.02, "lr_warmup_steps": 0, "lr_decay": "constant"}}
    assert main([str(finetune_config(tmp_path, base, **sections))]) == 0
    kept = load_file(tmp_path / "run" / "checkpoints" / "step-00000006" / "state.safetensors")
    assert all("lora" in name for name in kept if name.startswith(("raw.", "ema.")))
    adapted = StableDiffusionPipeline.from_pretrained(base)
    plain = draw(StableDiffusionPipeline.from_pretrained(base))
    adapted.load_lora_weights(tmp_path / "run" / "lora")
    whole = draw(StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline"))
    np.testing.assert_allclose(draw(adapted), whole, atol=1e-4)
    assert np.abs(whole - plain).max() > 1e-3
    ours = SfumatoPipeline.from_pretrained(base)
    ours.load_lora_weights(tmp_path / "run" / "lora")
    np.testing.assert_allclose(draw(ours), whole, atol=1e-4)


def test_lora_resumes_exactly(tmp_path, base):
    pytest.importorskip("peft")
    import crashes

    hashes = []
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        path = str(finetune_config(tmp_path / name, base, lora={"rank": 2}, optim={"lr_decay": "constant"}))
        if name == "parts":
            main([path, "train.max_steps=3"])
        main([path, *(["checkpoint.resume=auto"] if name == "parts" else [])])
        hashes.append(crashes.result(tmp_path / name / "run", ended_before=True))
    assert hashes[0] == hashes[1]


@pytest.mark.filterwarnings("ignore:.*has no effect")
def test_what_cannot_be_fine_tuned_is_told(tmp_path, base, capsys):
    assert main([str(finetune_config(tmp_path, tmp_path / "nowhere"))]) == 2
    assert "init_from" in capsys.readouterr().err
    assert main([str(finetune_config(tmp_path, base)), "data.name=x", "data.channels=1"]) == 2
    assert main([str(finetune_config(tmp_path, base)), "unet.layers_per_block=2"]) == 2
    assert "comes from init_from" in capsys.readouterr().err


def test_tensorboard_gets_losses_grids_and_the_config(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main([str(tiny.config_file(tmp_path, train={"trackers": ["tensorboard"]}))]) == 0
    files = sorted((tmp_path / "run").rglob("*tfevents*"))
    tags = {"scalars": set(), "images": set()}
    for file in files:
        events = EventAccumulator(str(file.parent)).Reload()
        for kind in tags:
            tags[kind] |= set(events.Tags()[kind])
    assert {"loss", "lr", "grad_norm"} <= tags["scalars"] and "samples" in tags["images"]
    assert any("block_out_channels" in file.read_text() for file in (tmp_path / "run").rglob("hparams.yml"))


def test_trackio_gets_losses_grids_and_the_config_of_a_run_that_goes_on(tmp_path):
    pytest.importorskip("trackio")
    path = str(tiny.config_file(tmp_path, train={"trackers": ["trackio"]}))
    command = [sys.executable, "-m", "sfumato.training.train", path]
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "tracked"), "HF_HUB_OFFLINE": "1"}  # read as it is imported
    for steps in (3, 6):
        done = subprocess.run(
            [*command, f"train.max_steps={steps}", "checkpoint.resume=auto"], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    with sqlite3.connect(tmp_path / "tracked" / "sfumato.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by step").fetchall()
        (settings,) = database.execute("select config from configs").fetchone()
    assert {name for name, _, _ in rows} == {f"{tmp_path.name}-run"}  # one page for both parts
    losses = [step for _, step, values in rows if "loss" in json.loads(values)]
    assert losses == [1, 2, 3, 4, 5, 6]
    assert any("samples" in json.loads(values) for _, _, values in rows) and b"block_out_channels" in settings
    assert list((tmp_path / "tracked" / "media").rglob("*.png"))


def test_an_unknown_tracker_is_told(tmp_path, capsys):
    assert main([str(tiny.config_file(tmp_path)), "train.trackers=[ledger]"]) == 2
    assert "'ledger' is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "override", ["optim.name=muon", "train.gradient_checkpointing=true", "ema.offload=true", "train.mixed_precision=bf16"]
)
def test_settings_of_speed_and_memory_train_and_resume_exactly(tmp_path, override):
    import crashes

    hashes = []
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        path = str(tiny.config_file(tmp_path / name, optim={"lr_decay": "constant"}))
        if name == "parts":
            assert main([path, override, "train.max_steps=3"]) == 0
        assert main([path, override, *(["checkpoint.resume=auto"] if name == "parts" else [])]) == 0
        hashes.append(crashes.result(tmp_path / name / "run", ended_before=True))
    assert hashes[0] == hashes[1]


def test_gradient_checkpointing_changes_no_loss(tmp_path):
    import json

    losses = []
    for value in ("false", "true"):
        (tmp_path / value).mkdir()
        main([str(tiny.config_file(tmp_path / value)), f"train.gradient_checkpointing={value}"])
        lines = (tmp_path / value / "run" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)


def test_8_bit_adam_without_its_package_is_told(tmp_path, capsys):
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        assert main([str(tiny.config_file(tmp_path)), "optim.name=adamw_8bit"]) == 2
        assert "sfumato[8bit]" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("how", ["unet", "regional", "loss", "graphs"])
def test_compiled_training_follows_eager(tmp_path, how):
    import json
    import shutil

    if not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    losses = []
    for value in ("no", how):
        (tmp_path / value).mkdir()
        assert main([str(tiny.config_file(tmp_path / value, train={"max_steps": 3})), f"train.compile={value}"]) == 0
        lines = (tmp_path / value / "run" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)
