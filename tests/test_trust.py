"""A stranger's folder runs no code, unpickles nothing and does not fill the memory."""

import json
import os
import pickle
import resource
import shutil

import crashes
import pytest
import tiny
import torch
from safetensors.torch import load_file

from sfumato import cli
from sfumato.pipelines import SfumatoPipeline, export_pipeline
from sfumato.training.train import main


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    return export_pipeline(tiny.pipeline(folder), folder / "model")


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


class Payload:
    """Touches a file when unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def sample(folder):
    return cli.main(["sample", "x", "--model", str(folder), "--steps", "1", "--out", str(folder.parent / "x.png")])


def test_planted_code_does_not_run(folder, tmp_path, capsys):
    mark = f"import os; os.mkdir({str(tmp_path / 'ran')!r})\n"
    for name in ("pipeline.py", "__init__.py", "unet/__init__.py"):
        (folder / name).write_text(mark)
    assert sample(folder) == 0
    for name in ("unet/diffusers.py", "scheduler/scheduling_sfumato.py"):
        (folder / name).write_text(mark)
        assert sample(folder) == 2 and "contains custom code" in capsys.readouterr().err
        (folder / name).unlink()
        change(folder / "model_index.json", scheduler=["scheduling_sfumato", "Evil"])
    change(folder / "model_index.json", _class_name=["pipeline", "SfumatoPipeline"])
    assert sample(folder) == 2 and "trust_remote_code" in capsys.readouterr().err
    change(folder / "model_index.json", scheduler=["diffusers", "DDPMScheduler"])
    assert sample(folder) == 0, "this class stands in for the folder's own"
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:.*has no effect")
@pytest.mark.parametrize("part, name", [("unet", "diffusion_pytorch_model.bin"), ("text_encoder", "pytorch_model.bin")])
def test_a_pickle_is_refused_with_the_reason(folder, tmp_path, capsys, part, name):
    (folder / part / name).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    assert sample(folder) == 0  # beside safetensors it is not looked at
    for path in (folder / part).glob("*.safetensors"):
        path.unlink()
    assert sample(folder) == 2
    assert "a pickle, which can run code when opened" in capsys.readouterr().err
    path = tiny.config_file(tmp_path, init_from=str(folder))
    assert main([str(path), "unet={}", "scheduler={}"]) == 2
    assert "a pickle, which can run code when opened" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:.*has no effect")
@pytest.mark.parametrize("part, setting", [("vae", "vae.pretrained"), ("text_encoder", "text_encoder.pretrained")])
def test_a_pretrained_part_that_is_a_pickle_is_refused(folder, tmp_path, capsys, part, setting):
    """A sound state dict, so that nothing but the refusal keeps it from being opened."""
    for path in (folder / part).glob("*.safetensors"):
        name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
        torch.save(load_file(path), folder / part / name)
        path.unlink()
    assert main([str(tiny.config_file(tmp_path)), f"{setting}={folder}"]) == 2
    assert f"{setting}=" in capsys.readouterr().err


def test_a_safetensors_file_that_is_a_pickle_is_refused(folder, tmp_path, capsys):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    assert sample(folder) == 2
    assert "is damaged" in capsys.readouterr().err and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "file, values",
    [
        ("unet/config.json", {"block_out_channels": [10**9] * 2}),
        ("unet/config.json", {"block_out_channels": [10**5] * 2}),
        ("unet/config.json", {"in_channels": 10**9}),
        ("unet/config.json", {"layers_per_block": 10**6}),
        ("unet/config.json", {"layers_per_block": 90, "transformer_layers_per_block": 90}),
        ("unet/config.json", {"sample_size": 16_000}),
        ("unet/config.json", {"transformer_layers_per_block": [[10**6]]}),
        ("vae/config.json", {"layers_per_block": 10**6}),
        ("vae/config.json", {"block_out_channels": [10**6]}),
        ("text_encoder/config.json", {"num_hidden_layers": 10**6}),
        ("text_encoder/config.json", {"vocab_size": 10**10}),
        ("text_encoder/config.json", {"max_position_embeddings": 10**10}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**10}),
        ("unet/config.json", {"block_out_channels": "many"}),
    ],
)
def test_an_absurd_config_is_refused_before_it_fills_the_memory(folder, file, values):
    change(folder / file, **values)

    def attempt():
        limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + 500_000_000
        try:
            SfumatoPipeline.from_pretrained(folder)
        except ValueError as error:
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            return 7 if str(folder / file.split("/")[0]) in str(error) and used < limit else 1
        return 0

    assert crashes.wait([crashes.fork(attempt)]) == [7]


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_damaged_json_is_told(folder, capsys, file):
    (folder / file).write_text("{" * 100_000)
    assert sample(folder) == 2
    assert "damaged" in capsys.readouterr().err


def test_a_list_of_shards_may_name_no_pickle(folder, tmp_path, capsys):
    (folder / "unet" / "weights.dat").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "decoy.safetensors")
    for name in ("weights.dat", "../unet/weights.safetensors", 7):
        listing = {"metadata": {}, "weight_map": {"conv_in.weight": name}}
        (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(listing))
        assert sample(folder) == 2
        assert "not a safetensors file beside it" in capsys.readouterr().err and not (tmp_path / "ran").exists()


def test_a_part_of_another_kind_is_refused_but_for_what_the_caller_brings(folder, tmp_path):
    shutil.copytree(folder / "text_encoder", folder / "safety_checker")
    change(folder / "model_index.json", safety_checker=["transformers", "CLIPModel"])
    with pytest.raises(ValueError, match="safety_checker is a transformers.CLIPModel, which is not a part"):
        SfumatoPipeline.from_pretrained(folder)
    assert SfumatoPipeline.from_pretrained(folder, safety_checker=None).safety_checker is None


def test_an_endless_tokenizer_is_held_to_what_the_text_encoder_reads(folder):
    change(folder / "tokenizer" / "tokenizer_config.json", model_max_length=3 * 10**7)
    assert sample(folder) == 0


def test_settings_of_strangers_name_no_secrets(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SECRET", "hunter2")
    path = tiny.config_file(tmp_path, title="${oc.env:SECRET}")
    assert main([str(path)]) == 2
    assert "are not read" in (error := capsys.readouterr().err) and "hunter2" not in error


def test_links_out_of_the_folder_are_not_taken_over(folder, tmp_path, capsys):
    (tmp_path / "secret").write_text("secret")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(tmp_path / "secret")
    assert cli.main(["export", str(folder), str(tmp_path / "shared")]) == 2
    assert "link out of its folder" in capsys.readouterr().err
    assert not (tmp_path / "shared").exists()


def test_evaluate_reads_no_path_that_came_with_a_model(tmp_path):
    """Its cache is one's own, and files of this machine are named by --data alone."""
    from sfumato.training.config.schema import DataConfig
    from sfumato.training.quality.command import config_of, training_config

    model = tmp_path / "model"
    export_pipeline(tiny.pipeline(tmp_path), model)
    for name in (str(tmp_path), "./secret", "shapes"):
        (model / "training_args.yaml").write_text(
            f"train: {{max_steps: 1}}\ndata: {{name: {name}, cache_dir: {tmp_path}/theirs}}\n"
        )
        config = training_config(str(model))
        assert config.data.cache_dir == DataConfig().cache_dir
        assert config.data.name == ("shapes" if name == "shapes" else "")
    (model / "training_args.yaml").write_text("train: {max_steps: 1}\ndata: {name: ./secret}\n")
    with pytest.raises(ValueError, match="--data"):
        config_of(str(model), None, SfumatoPipeline.from_pretrained(model))


@pytest.mark.parametrize("key", ["vae", "text_encoder"])
def test_parts_are_looked_at_before_they_are_opened(tmp_path, key):
    """A config that asks for more than its weights hold, and weights that are a named pipe."""
    from sfumato.training.models.pretrained import load_part

    pipe = tiny.pipeline(tmp_path)
    part = getattr(pipe, key)
    part.save_pretrained(tmp_path / key)
    name = "layers_per_block" if key == "vae" else "num_hidden_layers"
    file = tmp_path / key / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, name: 10**6}))
    with pytest.raises(ValueError, match="asks for"):
        load_part(type(part), f"{key}.pretrained", str(tmp_path / key), key)
    file.write_text(json.dumps(config))
    weights = next((tmp_path / key).glob("*.safetensors"))
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(ValueError, match="not a plain file"):
        load_part(type(part), f"{key}.pretrained", str(tmp_path / key), key)


def test_names_of_strangers_do_not_reach_the_terminal():
    from sfumato.files import printable

    assert printable("a\x1b[31mb\u202ec") == "a\\x1b[31mb\\u202ec" and printable("Bär 披萨\n") == "Bär 披萨\n"
