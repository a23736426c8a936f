"""Real classes at tiny size."""

import yaml

from sfumato.training.config.load import load_config
from sfumato.training.models import build

CAPTIONS = ["a red circle", "a blue square on a white ground", "披萨"]

CONFIG = {
    "data": {"name": "shapes", "resolution": 16, "num_pictures": 64},
    "text_encoder": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_length": 20, "vocab_size": 600},
    "unet": {
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": 2,
    },
    "scheduler": {"beta_schedule": "cosine", "prediction_type": "v_prediction"},
    "train": {"max_steps": 6, "batch_size": 4, "num_threads": 1, "trackers": []},
    "validation": {"every_steps": None, "num_inference_steps": 2, "num_judged": 4, "num_held_out": 2},
    "checkpoint": {"every_steps": 3},
}


def config_file(folder, **sections):
    """Write the tiny config, sections updated, and return its path; run and cache live in `folder`."""
    content = {"output_dir": str(folder / "run"), **{k: dict(v) for k, v in CONFIG.items()}}
    content["data"]["cache_dir"] = str(folder / "cache")
    for name, values in sections.items():
        content[name] = {**content.get(name, {}), **values} if isinstance(values, dict) else values
    if content["data"]["name"] != "shapes":
        content["data"].pop("num_pictures")
        if "num_judged" not in sections.get("validation", {}):
            content["validation"].pop("num_judged")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True))
    return path


def pipeline(tmp_path, **sections):
    """A pipeline with random weights."""
    pipe = build.build_pipeline(load_config(config_file(tmp_path, **sections)), CAPTIONS)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def vae():
    """A VAE with random weights that halves images."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def unet(**settings):
    """A UNet with random weights for text of width `cross_attention_dim`."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**{**CONFIG["unet"], "sample_size": 16, "in_channels": 3, "out_channels": 3, **settings})


def task(config, images=None, **context):
    """The task of a config, on this process alone."""
    from accelerate import Accelerator

    from sfumato.registries import TASKS
    from sfumato.training.data.prepare import prepare
    from sfumato.training.data.streams import STREAM_VERSION, streams_of
    from sfumato.training.tasks.protocol import TaskContext

    settings = {
        "images": prepare(config.data) if images is None else images,
        "accelerator": Accelerator(cpu=True),
        "streams": streams_of(STREAM_VERSION, config.seed),
        **context,
    }
    return TASKS.load(config.task)(TaskContext(config=config, **settings))


def samples(images, block=1, seed=0, **objective):
    """The training samples of a set, of a default config but for its seed and some settings of the objective."""
    from sfumato.training.config.load import default_config
    from sfumato.training.data.loader import TrainingSamples

    config = default_config()
    config.seed = seed
    for key, value in objective.items():
        setattr(config.objective, key, value)
    return TrainingSamples(images, config, block=block)


def batches(images, config, texts, **place):
    """Batches of a set without a task."""
    from sfumato.training.data.loader import SampleData, batches
    from sfumato.training.data.streams import STREAM_VERSION, streams_of

    streams = streams_of(STREAM_VERSION, config.seed)
    return batches(SampleData(images=images, texts=texts, streams=streams), config, **place)
