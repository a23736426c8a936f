"""Settings are checked before anything is loaded, and told by name."""

import os
import warnings

import pytest
import tiny

from sfumato.training.config import schema
from sfumato.training.config.load import dump_config, load_config


def test_round_trip(tmp_path):
    loaded = load_config(tiny.config_file(tmp_path), ["optim.lr=3e-4", "optim.betas=[0.8,0.9]", "checkpoint.resume=null"])
    assert loaded.optim.lr == 3e-4 and loaded.optim.betas == (0.8, 0.9) and loaded.checkpoint.resume is None
    (tmp_path / "again.yaml").write_text(dump_config(loaded))
    assert load_config(tmp_path / "again.yaml") == loaded


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.batchsize=3", "batchsize"),
        ("train.batch_size=many", "train.batch_size"),
        ("train.batch_size=0", "train.batch_size=0: must be from 1 to 65,536"),
        ("train.mixed_precision=fp8", "mixed_precision"),
        ("objective.caption_dropout=1.5", r"must be in \[0, 1\]"),
        ("optim.lr=-1", "optim.lr"),
        ("ema.decay=1", "ema.decay"),
        ("train.max_steps=null", "train.max_minutes=None: set it or train.max_steps"),
        ("data.languages=[fr]", "choose en, zh"),
        ("text_encoder.vocab_size=100", "must be from 514"),
        ("text_encoder.hidden_size=33", "heads"),
        ("validation.every_steps=0", "or null"),
        ("validation.sampler=magic", "choose one of ddpm, ddim"),
        ("validation.guider=autoguidance", "choose one of cfg, apg"),
        ("validation.guidance_interval=[0.8,0.2]", "the lower one first"),
        ("validation.guidance_interval=[0.5]", "two numbers"),
        ("data.num_figures=3", "must be 1 or 2"),
        (["task=inpainting", "data.name=x", "data.buckets=[[16,16]]"], "images of one size"),
        (["task=autoencoder", "lora.rank=4"], "is for task=text_to_image"),
        (["validation.guider=pag", "validation.guidance_scale=1"], "must not be 1 with guider pag"),
        ("seed", "key=value"),
        ("data.channels=2", "must be 1, 3 or 4"),
        ("data.buckets=[[16,16]]", "not for openmoji and shapes"),
        ("lora.rank=4", "set init_from"),
        ("init_from=somewhere", "unet.*comes from init_from"),
        ("optim.betas=[1", "tiny.yaml"),
        ("unet=[1,2]", "tiny.yaml"),
        ("train.num_workers=-1", "must be from 0 to 256"),
    ],
)
def test_wrong_settings_are_named(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        load_config(tiny.config_file(tmp_path), override if isinstance(override, list) else [override])


def test_a_wrong_type_is_one_line_with_its_key(tmp_path):
    with pytest.raises(ValueError, match=r"\(key: train.batch_size\)") as told:
        load_config(tiny.config_file(tmp_path), ["train.batch_size=many"])
    assert "\n" not in str(told.value)


def test_all_wrong_settings_are_told_at_once(tmp_path):
    with pytest.raises(ValueError, match="(?s)optim.lr.*ema.decay"):
        load_config(tiny.config_file(tmp_path), ["optim.lr=0", "ema.decay=2"])


def test_missing_file_is_told(tmp_path):
    with pytest.raises(ValueError, match="no config file"):
        load_config(tmp_path / "none.yaml")


def test_a_bare_no_is_no(tmp_path):
    path = tiny.config_file(tmp_path, train={"mixed_precision": False})
    loaded = load_config(path, ["train.compile=no"])
    assert loaded.train.compile == loaded.train.mixed_precision == "no"


def test_a_section_of_the_file_can_be_emptied_on_the_command_line(tmp_path):
    path = tiny.config_file(tmp_path)
    with pytest.raises(ValueError, match="on the command line: unet={}"):
        load_config(path, ["init_from=x"])
    with pytest.warns(UserWarning, match="text_encoder"):
        loaded = load_config(path, ["init_from=x", "unet={}", "scheduler=null"])
    more = load_config(path, ["init_from=x", "unet={}", "text_encoder={}", "scheduler={}", "text_encoder.train=true"])
    assert more.text_encoder.train is True and more.text_encoder.hidden_size == schema.TextEncoderConfig().hidden_size
    assert loaded.unet == loaded.scheduler == {} and loaded.train.batch_size == 4


def test_data_named_twice_are_refused(tmp_path):
    """As the shell makes of a pattern without quotes: the last shard alone would be trained on."""
    path = tiny.config_file(tmp_path)
    with pytest.raises(ValueError, match="given twice, as a/0.tar and a/1.tar.*in quotes"):
        load_config(path, ["data.name=a/0.tar", "data.name=a/1.tar"])
    with pytest.raises(ValueError, match="oc.env") as error:
        load_config(path, ["data.name=${oc.env:HOME}", "data.name=b"])
    assert os.environ["HOME"] not in str(error.value)
    assert load_config(path, ["train.max_steps=2", "train.max_steps=3"]).train.max_steps == 3  # of others the last one counts


def test_settings_without_effect_are_told_and_others_are_not(tmp_path):
    path = tiny.config_file(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_config(path)
    for override, needed in {
        "objective.min_snr_gamma=3": "objective.weight=min_snr",
        "objective.log_snr_mean=1": "objective.timesteps=normal",
        "lora.alpha=4": "lora.rank",
        "data.words=[cat]": "data.name=openmoji",
        "data.colours=true": "data.name=openmoji",
        "data.split=test": "images from files",
    }.items():
        with pytest.warns(UserWarning, match=f"{override.split('=')[0]}=.* has no effect without {needed}"):
            load_config(path, [override])
    (tmp_path / "pictures").mkdir()
    with warnings.catch_warnings(record=True) as caught:
        load_config(path, [f"data.name={tmp_path / 'pictures'}", "data.split=test"])
    assert "data.split" not in str([str(warning.message) for warning in caught])
