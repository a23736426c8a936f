"""Write the folder that travels: stock classes, safetensors, both tokenizer forms, `pipeline.py` and a model card."""

import copy
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard
from PIL.Image import Image
from safetensors.torch import load_file, save_file

from sfumato import __version__
from sfumato.files import replace_folder
from sfumato.pipelines import conditions, guided, images, inputs, pipeline_sfumato, stock, trust
from sfumato.pipelines.card import model_card, public_path, variants_line
from sfumato.pipelines.cascade import UPSCALER, Cascade
from sfumato.pipelines.codecs import write_codec
from sfumato.pipelines.conditions import codec_facts
from sfumato.pipelines.pipeline_sfumato import SfumatoPipeline
from sfumato.schedulers import scheduling_sfumato_ddpm, scheduling_sfumato_flow

NETWORKS = ("unet", "text_encoder", "vae", "controlnet")


CODEC_FILES = ("codec.json", "codec.py")
CARRIED_FILES = ("README.md", "training_args.yaml", "evaluation.json", "memorisation.png")


_CASCADE = """## Larger images

`upscaler/` holds a second model, which makes the images larger; it can also be opened on its own.
With `pip install sfumato`, both run in one call:

```python
from sfumato.pipelines import Cascade

image = Cascade.from_pretrained("{where}")("").images[0]
```

## What it is
"""


def joined_source() -> str:
    """The text of `pipeline.py`: the modules that travel, as one file that does not import `sfumato`."""
    schedulers = (scheduling_sfumato_ddpm, scheduling_sfumato_flow)
    modules = (*schedulers, trust, images, inputs, conditions, stock, guided, pipeline_sfumato)
    sources = (Path(str(module.__file__)).read_text(encoding="utf-8") for module in modules)
    sources = [re.sub(r"^from sfumato\.[\w.]+ import (\([^)]*\)|[^(\n]+)\n", "", source, flags=re.M) for source in sources]
    return "\n\n".join([f"# Written by Sfumato {__version__}, Apache-2.0.", *sources])


def _prefixed(table: dict) -> dict:
    kept = ("text_model.", "text_projection.")
    return {key if key.startswith(kept) else f"text_model.{key}": value for key, value in table.items()}


def _write_for_transformers_4(folder: Path) -> None:
    """Prefix the text encoder's keys and write `vocab.json` and `merges.txt`.

    transformers 5 omits both; transformers 4 would then load a random text encoder with only a warning.
    """
    for file in (folder / "text_encoder").glob("*.safetensors"):
        weights = load_file(file)
        save_file(_prefixed(weights), file, metadata={"format": "pt"})
    for index in (folder / "text_encoder").glob("*.safetensors.index*.json"):
        content = json.loads(index.read_text())
        content["weight_map"] = _prefixed(content["weight_map"])
        index.write_text(json.dumps(content, indent=2))
    model = json.loads((folder / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def _forget_local_paths(folder: Path) -> None:
    """Drop what diffusers and transformers record about the local folder that a part was loaded from."""
    for path in [folder / "model_index.json", *folder.glob("*/config.json"), *folder.glob("*/tokenizer_config.json")]:
        content = json.loads(path.read_text(encoding="utf-8"))
        kept = {k: v for k, v in content.items() if k not in ("_name_or_path", "name_or_path", "is_local", "local_files_only")}
        if kept != content:
            path.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _add_metadata(file: Path, metadata: dict) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    config["_sfumato"] = {**(config.get("_sfumato") or {}), "run": metadata}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What an exported folder keeps about the run that made the model.

    Attributes:
        samples: pairs of prompt and image for the card's gallery.
        metadata: JSON for programs; stored in the scheduler's config under `_sfumato`, key `run`.
        settings: YAML for `training_args.yaml`.
        curve: an image of the training loss.
    """

    samples: Sequence[tuple[str, Image]] = ()
    metadata: dict | None = None
    settings: str | None = None
    curve: Image | None = None


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """How weights are stored.

    Attributes:
        variants: `fp16` for a copy in half precision, `raw` for a copy of the weights before averaging.
        raw: the weights before averaging, for the variant; named like `unet.conv_in.weight` and `text_encoder. ...`.
        max_shard_size: weights are split into files of at most this size.
        half: store weights in half precision, which halves the size of the folder; it still opens in float32.
    """

    variants: Sequence[str] = ()
    raw: dict | None = None
    max_shard_size: str = "10GB"
    half: bool = False


def _save_weights(pipe: SfumatoPipeline, folder: Path, weights: WeightFiles) -> None:
    """Save all parts in float32, and next to them the copies that `variants` names."""
    variants = weights.variants
    raw = weights.raw or {}
    max_shard_size = weights.max_shard_size
    if "raw" in variants and not raw:
        raise ValueError("the variant raw needs the weights before averaging, which the checkpoints of a run contain")
    pipe.save_pretrained(folder, max_shard_size=max_shard_size)
    parts = {name: getattr(pipe, name) for name in NETWORKS}
    copies = []
    if "fp16" in variants:
        copies += [("fp16", part, copy.deepcopy(model).half()) for part, model in parts.items() if model]
    if "raw" in variants:
        for part in NETWORKS:
            if tensors := {k.removeprefix(f"{part}."): v for k, v in raw.items() if k.startswith(f"{part}.")}:
                module = copy.deepcopy(parts[part])
                if unexpected := module.load_state_dict(tensors, strict=False).unexpected_keys:
                    raise ValueError(f"the raw weights belong to another model: {', '.join(unexpected[:3])}")
                copies.append(("raw", part, module))
    for variant, part, module in copies:
        # Save elsewhere and move only the weights: a save writes its dtype into config.json and removes the shards of others.
        aside = folder / f".{variant}"
        module.save_pretrained(aside, variant=variant, max_shard_size=max_shard_size)
        for path in aside.glob(f"*.{variant}*"):
            path.rename(folder / part / path.name)
        shutil.rmtree(aside)


def _halve(folder: Path) -> None:
    """Store weights in half precision. diffusers opens them in float32, and so does transformers if the config says so."""
    files = [*folder.glob("unet/diffusion_*.safetensors"), *folder.glob("vae/diffusion_*.safetensors")]
    if json.loads((folder / "text_encoder" / "config.json").read_text()).get("dtype") == "float32":
        files += folder.glob("text_encoder/model*.safetensors")
    for file in files:
        save_file({name: value.half() for name, value in load_file(file).items()}, file, metadata={"format": "pt"})


def _take_over(source: Path, new: Path, where: str, variants: list[str]) -> None:
    """Copy card, samples and settings from the folder a pipeline came from, but nothing that a link outside it points to.

    In a card written by Sfumato, the snippets and the list of variants are updated.
    """
    for path in [source / name for name in CARRIED_FILES if (source / name).exists()] + sorted(
        (source / "samples").glob("*.png")
    ):
        if not path.resolve().is_relative_to(source.resolve()) and not _is_hub_cache(path):
            raise ValueError(f"{path} is a link out of its folder; it is not copied")
        target = new / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    card = new / "README.md"
    if card.is_file() and "Made by Sfumato" in (text := card.read_text("utf-8", "replace")):
        if old := re.search(r'from_pretrained\("([^"]*)"', text):
            text = text.replace(f'"{old[1]}"', f'"{where}"')
        text = re.sub(r"^- Variants: .*\n", "", text, flags=re.M)
        if variants:
            text = re.sub(r"^(- Noise schedule: .*\n)", lambda line: line[1] + variants_line(variants), text, flags=re.M)
        card.write_text(text, "utf-8")


def _is_hub_cache(path: Path) -> bool:
    """Whether a path is in the Hub's own cache, where files are links from `snapshots/COMMIT/` to `blobs/` beside it."""
    return path.resolve().parent.name == "blobs" and path.resolve().parents[1] in path.absolute().parents


def export_pipeline(
    pipe: SfumatoPipeline,
    folder: str | os.PathLike,
    facts: dict | None = None,
    *,
    run: RunRecord | None = None,
    weights: WeightFiles | None = None,
    where: str | None = None,
    source: str | os.PathLike | None = None,
    upscaler: str | os.PathLike | None = None,
) -> Path:
    """Write `pipe` as a complete, shareable folder that plain `DiffusionPipeline.from_pretrained(folder)` opens.

    It is written next to `folder`, synced to disk and moved into place in one step, so a crash leaves the old or the new one.

    Args:
        pipe: the model to share.
        folder: the folder to write; an older export there is replaced.
        facts, where: for the card, see `card.model_card`; its snippets name `folder` if `where` is not given.
        run: what else to keep about the run that made the model.
        weights: how the weights are stored.
        source: the exported folder that `pipe` was opened from; its card, samples and settings are copied.
        upscaler: the exported folder of an upscaling model; a copy is put inside, which makes the result a `Cascade`. By
            default that of `source`, if it has one.

    Raises:
        ValueError: `folder` exists and is not an exported pipeline, a variant is unknown, or `raw` lacks its weights.
    """
    where, folder = public_path(where or str(folder)), Path(folder).resolve()
    run, weights = run or RunRecord(), weights or WeightFiles()
    _check_replaceable(folder)
    if unknown := set(weights.variants) - {"fp16", "raw"}:
        raise ValueError(f"unknown variant {', '.join(sorted(unknown))}; choose from fp16 and raw")
    new, old = (folder.with_name(f".{folder.name}.{state}") for state in ("new", "old"))
    if old.exists() and not folder.exists():  # a crash happened between two renames
        old.rename(folder)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        _save_weights(pipe, new, weights)
        _write_for_transformers_4(new)
        _forget_local_paths(new)
        (new / "pipeline.py").write_text(joined_source(), encoding="utf-8")
        if facts_of_codec := codec_facts(pipe.unet):
            write_codec(facts_of_codec, new)
        gallery = _write_run(run, new)
        if source is not None:
            _take_over(Path(source), new, where, list(weights.variants))
        if not (new / "README.md").exists():
            curve = "samples/loss.png" if run.curve is not None else None
            card = model_card(
                pipe, where, facts, gallery=gallery, curve=curve, settings=run.settings is not None, variants=weights.variants
            )
            ModelCard(card).save(new / "README.md")
        _add_upscaler(pipe, new, where, source, upscaler)
        if weights.half:
            _halve(new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    replace_folder(new, folder)
    return folder


def _write_run(run: RunRecord, new: Path) -> list[tuple[str, str]]:
    """Write the record of a run; return pairs of prompt and file name."""
    if run.metadata:
        _add_metadata(new / "scheduler" / "scheduler_config.json", run.metadata)
    if run.samples or run.curve is not None:
        (new / "samples").mkdir(exist_ok=True)
    gallery = []
    for number, (prompt, image) in enumerate(run.samples):
        image.save(new / "samples" / f"{number}.png")
        gallery.append((prompt, f"samples/{number}.png"))
    if run.curve is not None:
        run.curve.save(new / "samples" / "loss.png")
    if run.settings is not None:
        (new / "training_args.yaml").write_text(run.settings, encoding="utf-8")
    return gallery


def _add_upscaler(pipe, new: Path, where: str, source, upscaler) -> None:
    """Turn the folder `new` into a cascade if there is a second model; arguments as for `export_pipeline`."""
    if upscaler is None and source is not None and (Path(source) / UPSCALER / "model_index.json").is_file():
        upscaler = Path(source) / UPSCALER
    if upscaler is not None:
        upscaling_pipe = SfumatoPipeline.from_pretrained(str(upscaler))
        Cascade(pipe, upscaling_pipe)  # raises if the two do not fit together
        export_pipeline(upscaling_pipe, new / UPSCALER, where=f"{where}/{UPSCALER}", source=upscaler)
        card = new / "README.md"
        text = card.read_text("utf-8")
        if f"`{UPSCALER}/` holds a second model" not in text:
            card.write_text(text.replace("## What it is\n", _CASCADE.format(where=where), 1), "utf-8")


def _check_replaceable(folder: Path) -> None:
    """Raise ValueError unless `folder` does not exist or contains an export and nothing else."""
    if not folder.exists():
        return
    ours = folder.is_dir() and (folder / "pipeline.py").is_file() and (folder / "model_index.json").is_file()
    if not ours or not (folder / "pipeline.py").read_text("utf-8", "replace").startswith("# Written by Sfumato"):
        raise ValueError(
            f"{folder} exists and is not a pipeline exported by Sfumato; export to a new folder or remove it first"
        )
    parts = json.loads((folder / "model_index.json").read_text("utf-8"))
    known = {
        "model_index.json",
        "pipeline.py",
        "samples",
        UPSCALER,
        *CARRIED_FILES,
        *CODEC_FILES,
        *(path.name for path in folder.glob("*.png")),  # image sheets of an evaluation
        *(".DS_Store", ".cache", ".gitattributes"),  # left by Finder and by downloads from the Hub
        *(name for name in parts if not name.startswith("_")),
    }
    if more := sorted(path.name for path in folder.iterdir() if path.name not in known):
        raise ValueError(f"{folder} holds more than an export, which would be lost: {', '.join(more[:5])}; export elsewhere")
