"""Write the folder that travels: stock classes, safetensors, both tokenizer forms, `pipeline.py` and a model card."""

import json
import os
import shutil
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import load_file, save_file

from sfumato import __version__
from sfumato.pipelines import pipeline_sfumato
from sfumato.pipelines.pipeline_sfumato import SfumatoPipeline
from sfumato.schedulers import scheduling_sfumato_ddpm

_LINK = "from sfumato.schedulers.scheduling_sfumato_ddpm import SfumatoDDPMScheduler\n"

_CARD = """---
{data}
---

# {title}

{made}

<Gallery />

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{where}")
image = pipe({prompt!r}, guidance_scale={guidance_scale}, num_inference_steps=30,
             generator=torch.Generator().manual_seed(0)).images[0]
```

No flag and no other package than diffusers, transformers and torch is needed. With `pip install sfumato`,
`SfumatoPipeline.from_pretrained("{where}")` adds guiders and per-call checks.

## What it is

{facts}

## Limits

It draws only what its training pictures show, at the resolution given above. It has not been checked for bias, and it
can reproduce training pictures.

Made by Sfumato {version}.
"""


def joined_source() -> str:
    """`pipeline.py`: the scheduler's and the pipeline's source as one file without `sfumato` in its imports."""
    scheduler = Path(scheduling_sfumato_ddpm.__file__).read_text(encoding="utf-8")
    pipeline = Path(pipeline_sfumato.__file__).read_text(encoding="utf-8")
    if _LINK not in pipeline:
        raise RuntimeError("pipeline_sfumato.py no longer imports the scheduler in the one form that export knows")
    return f"# Written by Sfumato {__version__}, Apache-2.0.\n{scheduler}\n\n{pipeline.replace(_LINK, '')}"


def sync(path: Path) -> None:
    """Force a file, or a folder and all in it, to the disk, so that renaming it into place never shows it unwritten."""
    for part in [*path.rglob("*"), path]:
        handle = os.open(part, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _prefixed(table: dict) -> dict:
    return {key if key.startswith("text_model.") else f"text_model.{key}": value for key, value in table.items()}


def _write_for_transformers_4(folder: Path) -> None:
    """Prefix the text encoder's keys and write `vocab.json` and `merges.txt`.

    transformers 5 leaves both out; transformers 4 then loads a random text encoder with only a warning.
    """
    for file in (folder / "text_encoder").glob("*.safetensors"):
        weights = load_file(file)
        save_file(_prefixed(weights), file, metadata={"format": "pt"})
    for index in (folder / "text_encoder").glob("*.safetensors.index.json"):
        content = json.loads(index.read_text())
        content["weight_map"] = _prefixed(content["weight_map"])
        index.write_text(json.dumps(content, indent=2))
    model = json.loads((folder / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def _forget_local_paths(folder: Path) -> None:
    """Drop what diffusers and transformers note of the folder of this machine that a part came from."""
    for path in [folder / "model_index.json", *folder.glob("*/config.json"), *folder.glob("*/tokenizer_config.json")]:
        content = json.loads(path.read_text(encoding="utf-8"))
        kept = {k: v for k, v in content.items() if k not in ("_name_or_path", "name_or_path", "is_local", "local_files_only")}
        if kept != content:
            path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def model_card(pipe: SfumatoPipeline, where: str, facts: dict | None = None, gallery: list[tuple[str, str]] = ()) -> str:
    """Text of the card.

    Args:
        pipe: the model.
        where: the path or repository that the snippets name.
        facts: what the trainer knows. `title`, `license`, `language` and `base_model` are placed; the rest is listed.
        gallery: pairs of prompt and picture, the latter relative to the folder.
    """
    facts = dict(facts or {})
    base = facts.pop("base_model", None)
    made = "A text-to-image diffusion model in Stable Diffusion's form, exported by Sfumato."
    if base:
        made = f"A text-to-image diffusion model, fine-tuned with Sfumato from `{base}`."
    elif facts:
        made = "A text-to-image diffusion model, trained from random weights with Sfumato."
    size, channels = pipe.unet.config.sample_size, pipe.unet.config.in_channels
    parts = {name: sum(p.numel() for p in getattr(pipe, name).parameters()) for name in ("unet", "text_encoder", "vae")}
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=facts.pop("license", None),
        language=facts.pop("language", None),
        tags=["diffusers", "sfumato", "text-to-image"]
        + (["diffusers-training"] if facts else [])
        + (["trained-from-scratch"] if facts and not base else []),
        base_model=base if base and base.count("/") == 1 else None,
        widget=[{"text": prompt, "output": {"url": picture}} for prompt, picture in gallery] or None,
    )
    lines = {
        "Parameters": ", ".join(f"{name} {count:,}" for name, count in parts.items()),
        "Resolution": f"{size * pipe.vae_scale_factor} pixels ({channels} channels at {size} inside the UNet)",
        "Prediction": pipe.scheduler.config.prediction_type,
        "Noise schedule": json.dumps(pipe.scheduler.config.get("_sfumato") or pipe.scheduler.config.beta_schedule),
    }
    title, guidance = facts.pop("title", "A Sfumato model"), facts.pop("guidance_scale", 3.0)
    lines.update({name.replace("_", " ").capitalize(): value for name, value in facts.items()})
    return _CARD.format(
        made=made,
        data=data.to_yaml(),
        title=title,
        where=where,
        prompt=gallery[0][0] if gallery else "",
        guidance_scale=guidance,
        facts="\n".join(f"- {name}: {value}" for name, value in lines.items()),
        version=__version__,
    )


def export_pipeline(
    pipe: SfumatoPipeline,
    folder: str | os.PathLike,
    facts: dict | None = None,
    samples: list[tuple[str, "PIL.Image.Image"]] = (),  # noqa: F821
    where: str | None = None,
) -> Path:
    """Write `pipe` as a complete, shareable folder that plain `DiffusionPipeline.from_pretrained(folder)` opens.

    Everything is written beside and renamed into place at the end, so a crash leaves the old folder or none.

    Args:
        pipe: the model to share.
        folder: where to; an older export there is replaced.
        facts: for the card, see `model_card`.
        samples: pairs of prompt and picture for the card's gallery.
        where: the path or repository that the card's snippets name; `folder` where not given.

    Raises:
        ValueError: `folder` exists and is not an exported pipeline.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} exists and is no pipeline; export to a new folder or remove it first")
    new, old = (folder.with_name(f".{folder.name}.{state}") for state in ("new", "old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    pipe.save_pretrained(new)
    _write_for_transformers_4(new)
    _forget_local_paths(new)
    (new / "pipeline.py").write_text(joined_source(), encoding="utf-8")
    gallery = []
    for number, (prompt, picture) in enumerate(samples):
        (new / "samples").mkdir(exist_ok=True)
        picture.save(new / "samples" / f"{number}.png")
        gallery.append((prompt, f"samples/{number}.png"))
    ModelCard(model_card(pipe, where or str(folder), facts, gallery)).save(new / "README.md")
    for path in new.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes 0600
    sync(new)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder
