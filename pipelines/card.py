"""The model card of an exported folder: what the run knows, snippets that work, and nothing left to fill in."""

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from yaml import YAMLError

from sfumato import __version__
from sfumato.pipelines.codecs import repeat_of
from sfumato.pipelines.guided import guidance_width
from sfumato.pipelines.images import MODES
from sfumato.pipelines.pipeline_sfumato import SfumatoPipeline
from sfumato.schedulers import SfumatoFlowScheduler, training_scheduler

_CARD = """---
{data}
---

# {title}

{origin}

<Gallery />

{use}## What it is

{model}
{training}
## Intended use and limits

{limits} It has not been checked for bias or for harmful images, and it can reproduce training images. It is not meant
for images that could be taken for records of real people or events.
{again}
Made by Sfumato {version}.
"""

_USE = """## Use it

{doors}

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{where}"{flag})
{given}image = pipe({call}, guidance_scale={guidance_scale}, num_inference_steps={num_inference_steps},
             generator=torch.Generator().manual_seed(0)).images[0]
```

Another sampler, here one that needs few steps; it keeps the trained noise schedule:

```python
from diffusers import DiffusionPipeline, {solver}

pipe = DiffusionPipeline.from_pretrained("{where}"{flag})
pipe.scheduler = {solver}.from_config(pipe.scheduler.config)
{given}image = pipe({call}, guidance_scale={guidance_scale}, num_inference_steps=12).images[0]
```

With half the memory:

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{where}"{flag}, torch_dtype=torch.bfloat16)
{given}image = pipe({call}, guidance_scale={guidance_scale}, num_inference_steps={num_inference_steps}).images[0]
```

With `pip install sfumato`, other kinds of guidance and a check of every argument:

```python
from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.choices import with_guider

pipe = with_guider(SfumatoPipeline.from_pretrained("{where}"), "apg", guidance_scale={guidance_scale})
{given}image = pipe({ours}, num_inference_steps={num_inference_steps}).images[0]
```

"""

_USE_FEW = """## Use it

{doors} It draws in one to four steps with one pass each: `guidance_scale` is an input of the network, so a large
value costs nothing, values above 2.5 change little, and negative prompts have no effect.

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{where}")
{given}image = pipe({call}, guidance_scale={guidance_scale}, num_inference_steps={num_inference_steps},
             generator=torch.Generator().manual_seed(0)).images[0]
```

With `pip install sfumato`, faster on a CPU:

```python
from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.runtimes import with_runtime

pipe = with_runtime(SfumatoPipeline.from_pretrained("{where}"), "onnx")
{given}image = pipe({ours}, guidance_scale={guidance_scale}, num_inference_steps={num_inference_steps}).images[0]
```

"""

_USE_CODEC = """## Use it

The model draws arrays of {shape}; `codec.py` in this folder, which needs only numpy, decodes them: {kind}. {doors}

```python
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download

pipe = DiffusionPipeline.from_pretrained("{where}")
sys.path.insert(0, "{where}" if Path("{where}").is_dir() else snapshot_download("{where}"))
from codec import open_codec

codec = open_codec()
array = pipe({call}, guidance_scale={guidance_scale}, num_inference_steps={num_inference_steps}, output_type="np",
             generator=torch.Generator().manual_seed(0)).images[0]
thing = codec.decode(array)
```

`codec.write(thing, "thing{ending}")` saves it. With `pip install sfumato`, one call does it all:

```python
from sfumato.pipelines import SfumatoPipeline

pipe = SfumatoPipeline.from_pretrained("{where}")
thing = pipe({call}, guidance_scale={guidance_scale}, num_inference_steps={num_inference_steps},
             output_type="decoded").images[0]
```

"""

_USE_MOTION = """## Use it

diffusers draws clips with it. {doors}

```python
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_gif

pipe = DiffusionPipeline.from_pretrained("{where}")  # an AnimateDiffPipeline
frames = pipe({call}, num_frames={frames}, guidance_scale={guidance_scale}, num_inference_steps={num_inference_steps},
              generator=torch.Generator().manual_seed(0)).frames[0]
export_to_gif(frames, "clip.gif")
```

The adapter by itself is `MotionAdapter.from_pretrained("{where}", subfolder="motion_adapter")`. With `pip install sfumato`:

```python
from sfumato.pipelines import SfumatoPipeline

pipe = SfumatoPipeline.from_pretrained("{where}")
clip = pipe({call}, guidance_scale={guidance_scale}, num_inference_steps={num_inference_steps},
            output_type="decoded").images[0]
pipe.codec.write(clip, "clip.gif")
```

"""

_STOCK = "The model loads without any flag and needs only diffusers, transformers and torch."
_REMOTE = """The network reads its own last estimate besides the noise (self-conditioning), which no stock pipeline does.
The class that does is in `pipeline.py` here and runs only with `trust_remote_code=True`. With sfumato no flag is needed."""

_LIMITS = """For drawing images like those it was trained on, from captions like theirs, for study and play. It draws only
what its training images show, at the resolution given above; words that no caption had mean nothing to it."""
_OTHER_LIMITS = """For drawing images from text, for study and play. The limits and licences of the model or the parts that it
started from also apply."""

_TRAINING = """
## How it was trained

{rows}
{curve}{settings}"""

_AGAIN = """
## Train it again

`training_args.yaml` in this folder is the whole config. With [Sfumato](https://pypi.org/project/sfumato) {version}:

```sh
sfumato train training_args.yaml output_dir=runs/again
```

(For your own images, append `data.name=FOLDER`.)
"""

_EVALUATION = """## How good it is

| | | ± |
|---|---|---|
{rows}
{protocol}
{image}
To measure again: `sfumato evaluate --model FOLDER` (add `--data FOLDER` for your own images).

"""

_SECTION = re.compile(r"^## How good it is\n.*?(?=^## |\Z)", flags=re.M | re.S)

# How to draw if a card does not say.
ADVICE = {"num_inference_steps": 30, "guidance_scale": 3.0}

# Facts that come first on the card, in this order.
ORDER = ("data", "data licence", "captions", "skipped records", "steps", "images seen", "training time", "hardware")


def model_card(
    pipe: SfumatoPipeline,
    where: str,
    facts: dict | None = None,
    *,
    gallery: Sequence[tuple[str, str]] = (),
    curve: str | None = None,
    settings: bool = False,
    variants: Sequence[str] = (),
) -> str:
    """The text of the card.

    Args:
        pipe: the model.
        where: the path or repository that the snippets name.
        facts: what the trainer knows. `title`, `license`, `language`, `datasets`, `base_model` and the keys of `ADVICE` have
            their own places; the rest is listed.
        gallery: pairs of prompt and image path, the latter relative to the folder.
        curve: an image of the training loss, relative to the folder.
        settings: whether `training_args.yaml` is in the folder.
        variants: variants of the weights, in addition to float32.
    """
    facts = dict(facts or {})
    base, title = facts.pop("base_model", None), facts.pop("title", "A Sfumato model")
    advice = {name: facts.pop(name, default) for name, default in ADVICE.items()}
    parts = [name for name in facts if name.startswith("pretrained")]
    scratch, kind = bool(facts) and not base and not parts, _kind(pipe)
    front = ModelCardData(
        library_name="diffusers",
        pipeline_tag=None if pipe.codec else "text-to-image" if kind == "A text-to-image" else "image-to-image",
        license=facts.pop("license", None),
        language=facts.pop("language", None),
        datasets=facts.pop("datasets", None),
        tags=["diffusers", "sfumato", f"text-to-{pipe.codec.kind}" if pipe.codec else "text-to-image"]
        + (["diffusers-training"] if facts or base else [])
        + (["trained-from-scratch"] if scratch else []),
        base_model=base if base and base.count("/") == 1 else None,
        base_model_relation="finetune" if base and base.count("/") == 1 else None,
        inference={"parameters": advice},
        widget=[{"text": prompt, "output": {"url": image}} for prompt, image in gallery] or None,
    )
    origin = " in Stable Diffusion's form, exported by Sfumato."
    if base:
        origin = f", fine-tuned with Sfumato from `{base}`."
    elif parts:
        origin = ", its UNet trained from random weights with Sfumato."
    elif scratch:
        origin = ", trained from random weights with Sfumato."
    return _CARD.format(
        data=front.to_yaml(),
        title=_plain(title),
        origin=f"{kind} {'flow matching' if _flows(pipe) else 'diffusion'} model{origin}",
        use=_use(pipe, where, gallery[0][0] if gallery else "", advice),
        limits=_LIMITS if scratch else _OTHER_LIMITS,
        model=_describe(pipe, variants),
        training=_tell(facts, curve, settings),
        again=_AGAIN.format(version=__version__) if settings else "",
        version=__version__,
    )


def add_evaluation(
    folder: Path, scores: dict[str, tuple[float, float | None]], protocol: str, data: str, sheet: str | None = None
) -> None:
    """Put scores into the card of a folder, for readers and as metadata for the Hub; older ones are replaced.

    Args:
        scores: name -> score, and half the width of its confidence interval.
        protocol: how they were measured.
        data: name of the data set.
        sheet: image of samples beside the training images nearest to them, relative to the folder.

    Raises:
        ValueError: the folder has no card.
    """
    if not (folder / "README.md").is_file():
        raise ValueError(f"{folder} has no README.md to put the scores into")
    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=True)
    title = re.search(r"^# (.+)$", card.text, flags=re.M)
    front: Any = card.data
    front.model_name = title[1] if title else folder.name
    front.eval_results = [
        EvalResult(
            task_type="text-to-image", dataset_type=data, dataset_name=data, metric_type=name, metric_value=round(value, 5)
        )
        for name, (value, _) in scores.items()
    ]  # fmt: skip
    rows = "".join(
        f"| {_capital(name)} | {value:.4g} | {'' if half is None else f'{half:.2g}'} |\n"
        for name, (value, half) in scores.items()
    )
    image_line = (
        f"\n![Generated images, and the training images nearest to them in pixels and in features]({sheet})\n" if sheet else ""
    )
    section = _EVALUATION.format(rows=rows, protocol=protocol, image=image_line)
    text = _SECTION.sub("", card.text)
    before = "## Intended use and limits"
    card.text = text.replace(before, section + before, 1) if before in text else f"{text.rstrip()}\n\n{section}"
    card.save(folder / "README.md")


def remove_figures(folder: Path, weights: str) -> None:
    """Remove from a folder what was measured or drawn with other weights; the card then calls its own weights `weights`."""
    for path in [folder / "evaluation.json", folder / "memorisation.png", *(folder / "samples").glob("[0-9]*.png")]:
        path.unlink(missing_ok=True)
    if (folder / "README.md").is_file():
        card = ModelCard.load(folder / "README.md", ignore_metadata_errors=True)
        data: Any = card.data
        data.eval_results = data.model_name = None
        card.data.__dict__.pop("widget", None)
        text = _SECTION.sub("", card.text).replace("<Gallery />\n\n", "")
        card.text = re.sub(r"^\| Weights \| .*$", f"| Weights | {weights} |", text, flags=re.M)
        card.save(folder / "README.md")


def _kind(pipe: SfumatoPipeline) -> str:
    if pipe.controlnet is not None:
        return "A controlled text-to-image"
    if pipe.codec is not None:
        return f"A text-to-{pipe.codec.kind}"
    return {None: "A text-to-image", "estimate": "A text-to-image", "masks": "An inpainting", "low_res": "An upscaling"}[
        pipe.reads
    ]


def _doors(pipe: SfumatoPipeline, where: str) -> dict[str, str]:
    """How to open the folder: its name, an explanation, a flag; and a sampler of few steps that can draw it."""
    learned = pipe.scheduler.config.get("variance_type") == "learned_range"
    more = {"where": where, "solver": "DPMSolverMultistepScheduler" if learned else "UniPCMultistepScheduler"}
    if pipe.reads == "estimate":
        return {**more, "doors": _REMOTE, "flag": ", trust_remote_code=True"}
    return {**more, "doors": _STOCK, "flag": ""}


def _use(pipe: SfumatoPipeline, where: str, prompt: str, advice: dict) -> str:
    """The section with the snippets."""
    codec = pipe.codec
    if codec is None and guidance_width(pipe.unet) is not None:
        return _USE_FEW.format(**_doors(pipe, where), **_call(pipe, prompt), **advice)
    if codec is None:
        return _USE.format(**_doors(pipe, where), **_call(pipe, prompt), **advice)
    shape, doors = " x ".join(map(str, codec.shape)), _doors(pipe, where)["doors"]
    if hasattr(pipe.vae, "frames"):
        return _USE_MOTION.format(where=where, doors=doors, frames=pipe.vae.frames, call=repr(prompt), **advice)
    return _USE_CODEC.format(
        where=where, doors=doors, shape=shape, kind=codec.kind, ending=codec.endings[0], call=repr(prompt), **advice
    )


def _flows(pipe: SfumatoPipeline) -> bool:
    return isinstance(training_scheduler(pipe.scheduler), SfumatoFlowScheduler)


def _call(pipe: SfumatoPipeline, prompt: str) -> dict[str, str]:
    """The arguments of the snippets' calls, for stock pipelines and for ours, and the lines that must come before."""
    factor, (height, width) = pipe.vae_scale_factor, pipe.trained_size
    mode = MODES[pipe.vae.config.in_channels]
    if pipe.reads == "low_res":
        lines = (
            "# The smaller image, here a white one, at the size of the latents.\nfrom PIL import Image\n"
            f'small = Image.new("{mode}", {(width // factor, height // factor)}, "white")\n'
        )
        call = f"{prompt!r}, image=small, noise_level={min(20, pipe.config['max_noise_level'])}"
        return {"call": call, "ours": call, "given": lines}
    if pipe.controlnet is not None:
        lines = (
            "# The map to follow: here a black one, with no edges.\nfrom PIL import Image\n"
            f'edges = Image.new("{MODES[pipe.controlnet.config.conditioning_channels]}", {(width, height)})\n'
        )
        return {"call": f"{prompt!r}, image=edges", "ours": f"{prompt!r}, control_image=edges", "given": lines}
    if pipe.reads != "masks":
        return {"call": repr(prompt), "ours": repr(prompt), "given": ""}
    lines = (
        "# The image to change, and a mask that is white where to change it: here everywhere.\nfrom PIL import Image\n"
        f"size = {pipe.trained_size[::-1]}\n"
        f'original, mask = Image.new("{mode}", size, "white"), Image.new("L", size, 255)\n'
    )
    call = f"{prompt!r}, image=original, mask_image=mask, height=size[1], width=size[0], strength=1.0"
    return {"call": call, "ours": call, "given": lines}


def recommended_settings(source: str) -> dict:
    """The `num_inference_steps` and `guidance_scale` that the card of a folder or Hub id recommends, else `ADVICE`.

    In the card they are `inference.parameters`, which the Hub knows.
    """
    try:
        file = Path(source) / "README.md" if Path(source).is_dir() else source
        parameters = (ModelCard.load(file, ignore_metadata_errors=True).data.to_dict().get("inference") or {})["parameters"]
    except (OSError, ValueError, LookupError, TypeError, YAMLError, HfHubHTTPError):  # no card, or one of another form
        parameters = {}
    parameters = parameters if isinstance(parameters, dict) else {}
    steps: Any = parameters.get("num_inference_steps")
    scale: Any = parameters.get("guidance_scale")
    settings_ = dict(ADVICE)
    if type(steps) is int and 0 < steps <= 1000:
        settings_["num_inference_steps"] = steps
    if type(scale) in (int, float) and 0 <= scale < 1000:
        settings_["guidance_scale"] = float(scale)
    return settings_


def sample_prompts(folder: Path) -> list[str]:
    """The prompts of the samples in the card of a folder."""
    try:
        widget = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.to_dict().get("widget")
    except (OSError, ValueError, YAMLError):
        return []
    samples = widget if isinstance(widget, list) else []
    return [each["text"] for each in samples if isinstance(each, dict) and isinstance(each.get("text"), str)]


def _tell(facts: dict, curve: str | None, settings: bool) -> str:
    """The section on training; empty if nothing is known about it."""
    if not facts:
        return ""
    ordered = {name: facts.pop(name) for name in ORDER if name in facts} | facts
    return _TRAINING.format(
        rows="| | |\n|---|---|\n" + "".join(f"| {_capital(name)} | {_cell(value)} |\n" for name, value in ordered.items()),
        curve=f"\n![Training loss]({curve})\n" if curve else "",
        settings="\nEvery setting: `training_args.yaml`.\n" if settings else "",
    )


def _describe(pipe: SfumatoPipeline, variants: Sequence[str]) -> str:
    size, channels = pipe.unet.config.sample_size, pipe.vae.config.latent_channels
    height, width = (size, size) if isinstance(size, int) else size
    counts = {name: sum(p.numel() for p in getattr(pipe, name).parameters()) for name in ("unet", "text_encoder", "vae")}
    factor = pipe.vae_scale_factor
    space = f"on latents of {channels} channels at {height} x {width}"
    if factor == 1:
        space = "on pixels: its VAE is the identity"
    elif pipe.codec is not None and repeat_of(pipe.codec) == factor:
        space = f"on one value per square of {factor} x {factor} pixels, which its VAE repeats over the square"
    scheduler = pipe.scheduler.config
    notes = {key: value for key, value in (scheduler.get("_sfumato") or {}).items() if key not in ("run", "trained")}
    schedule = notes or {"beta_schedule": scheduler.get("beta_schedule")}
    if _flows(pipe):
        schedule = {"flow": "straight", "shift": training_scheduler(pipe.scheduler).config["shift"]}
    rows = {
        "Parameters": ", ".join(f"{name} {count:,}" for name, count in counts.items()),
        "Resolution": f"{height * factor} x {width * factor} pixels, {pipe.vae.config.out_channels} channels; works {space}",
        "Text": f"CLIP text encoder, up to {pipe.tokenizer.model_max_length} tokens, vocabulary of {len(pipe.tokenizer):,}",
        "Prediction": f"{training_scheduler(pipe.scheduler).prediction_type}, {scheduler.num_train_timesteps} noise levels",
        "Noise schedule": f"`{json.dumps(schedule)}`"
        + (", zero terminal SNR" if scheduler.get("rescale_betas_zero_snr") else ""),
    }
    return "".join(f"- {name}: {value}\n" for name, value in rows.items()) + (variants_line(variants) if variants else "")


def variants_line(variants: Sequence[str]) -> str:
    """The line about further copies of the weights."""
    return "- Variants: " + ", ".join(f'`variant="{name}"`' for name in variants) + "\n"


def _plain(text) -> str:
    """A text on one line, escaped so that nothing in it is read as Markdown or HTML."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))


def _cell(value) -> str:
    return html.escape(" ".join(str(value).replace("|", "\\|").split()), quote=False)


def public_path(where: str) -> str:
    """A path fit to publish: relative to the working folder, or its last part if it is elsewhere; a repository as it is."""
    path = Path(where)
    if not path.is_absolute():
        return where
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) and path != here else path.name


def _capital(name: str) -> str:
    return name.replace("_", " ")[:1].upper() + name.replace("_", " ")[1:]
