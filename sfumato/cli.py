"""The command `sfumato`: train, sample, evaluate, ema, export, push, doctor. Heavy imports are inside the verbs."""

import argparse
import sys
from pathlib import Path

SHIPPED = str(Path(__file__).resolve().parent.parent / "models" / "openmoji")


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit code (2 for wrong input)."""
    parser = argparse.ArgumentParser(prog="sfumato", description="Train, sample and share text-conditional diffusion models.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    train = verbs.add_parser("train", help="train from a config (several GPUs: accelerate launch training/train.py)")
    train.add_argument("config", help="a YAML file, see configs/")
    train.add_argument("overrides", nargs="*", metavar="key.subkey=value", help="settings that replace the file's")

    _add_sample(verbs)
    _add_others(verbs)
    options = parser.parse_args(arguments)
    try:
        return globals()[f"_{options.verb}"](options)
    except (ValueError, ModuleNotFoundError, OSError) as error:
        print(f"sfumato: {error}", file=sys.stderr)
        return 2


def _add_sample(verbs) -> None:
    from sfumato.pipelines.choices import GUIDERS, RUNTIMES, SAMPLERS

    sample = verbs.add_parser("sample", help="draw pictures with a trained model")
    sample.add_argument("prompts", nargs="+", help="what to draw; one picture for each")
    sample.add_argument(
        "--model", default=SHIPPED, help="an exported folder, a run folder, or a Hub id (default: ours, of emoji)"
    )
    sample.add_argument("--out", "--grid", default="grid.png", help="where the grid goes (default: %(default)s)")
    sample.add_argument("--each", metavar="FOLDER", help="write each picture by itself too, as it is, in this folder")
    sample.add_argument("--seed", type=int, default=0, help="picture i has seed SEED + i (default: %(default)s)")
    sample.add_argument("--steps", type=int, help="sampling steps (default: what the model's card names, else 30)")
    sample.add_argument("--guidance-scale", type=float, help="1 is none (default: what the model's card names, else 3)")
    sample.add_argument("--negative-prompt", help="what to steer away from")
    sample.add_argument("--sampler", help=f"{', '.join(SAMPLERS)} (default: the model's)")
    sample.add_argument("--guider", default="cfg", help=f"{', '.join(GUIDERS)} (default: %(default)s)")
    sample.add_argument("--weak", help="for the guider autoguidance: an earlier checkpoint of the same run")
    sample.add_argument(
        "--guidance-interval", nargs=2, type=float, default=[0.0, 1.0], metavar=("START", "STOP"),
        help="guide only in this part of the steps; outside it one pass instead of two (default: 0 1)",
    )  # fmt: skip
    sample.add_argument("--runtime", default="torch", help=f"on a CPU: {', '.join(RUNTIMES)} (default: %(default)s)")
    sample.add_argument("--image", help="a picture to start from, to redraw a part of, or to make larger")
    sample.add_argument("--mask", help="a picture that is white where --image is redrawn")
    sample.add_argument("--strength", type=float, help="how much of --image is redrawn, 0 to 1")
    sample.add_argument("--control", help="a map that a model with a ControlNet follows, such as edges")
    sample.add_argument("--gif", help="show the denoising, step by step, in this file")


def _add_others(verbs) -> None:
    from sfumato.pipelines.choices import SAMPLERS

    evaluate = verbs.add_parser("evaluate", help="measure how good a model is; the figures go into its card")
    evaluate.add_argument("--model", default=SHIPPED, help="a run folder, a pipeline or a Hub id (default: ours, of emoji)")
    evaluate.add_argument("--data", help="a config, or what data.name takes (default: what the model was trained on)")
    evaluate.add_argument("--pictures", type=int, default=512, help="captions that are drawn (default: %(default)s)")
    evaluate.add_argument("--sampler", help=f"{', '.join(SAMPLERS)} (default: the model's)")
    evaluate.add_argument("--steps", type=int, help="sampling steps (default: what the model's card names, else 30)")
    evaluate.add_argument("--guidance-scale", type=float, help="(default: what the model's card names, else 3)")
    evaluate.add_argument("--seed", type=int, default=0, help="picture i has seed SEED + i (default: %(default)s)")
    evaluate.add_argument(
        "--extractor",
        default="efficientnet-lite0",
        help="whose features: efficientnet-lite0, inception[:WEIGHTS], transformers:FOLDER_OR_HUB_ID (default: %(default)s)",
    )
    evaluate.add_argument("--bits", type=int, default=0, help="bound the bits per dimension of so many pictures, too")
    evaluate.add_argument("--out", help="a folder for evaluation.json and memorisation.png, in place of the model's own")

    ema = verbs.add_parser("ema", help="average a run's weights over another length, from the snapshots that it kept")
    ema.add_argument("run", help="the run folder, trained with ema.snapshot_steps")
    ema.add_argument("folder", help="where the model goes")
    ema.add_argument("--length", type=float, default=0.1, help="share of the run that the average spreads over (default: 0.1)")

    export = verbs.add_parser("export", help="write a run, a checkpoint or any Stable Diffusion folder as a shareable folder")
    export.add_argument("source", help="a run folder, a checkpoint or a pipeline folder")
    export.add_argument("folder", help="where to")
    export.add_argument("--half", action="store_true", help="store the UNet in half precision: half the size")
    export.add_argument("--upscaler", help="a run or folder of an upscaling model, to go with it as a cascade")
    export.add_argument("--variants", nargs="*", default=[], choices=["fp16", "raw"], help="further copies of the weights")
    export.add_argument("--max-shard-size", default="10GB", help="of a file of weights (default: %(default)s)")

    push = verbs.add_parser("push", help="put a run's result or an exported folder on the Hub, in one commit")
    push.add_argument("source", help="a run folder, a checkpoint or an exported folder")
    push.add_argument("repo_id", help="NAME or OWNER/NAME")
    push.add_argument("--private", action="store_true", help="make a new repository private")
    push.add_argument("--branch", help="where to (default: main)")
    push.add_argument("--tag", help="name for the result")
    push.add_argument("--pull-request", action="store_true", help="propose the change, where one may not write")
    push.add_argument("--dry-run", action="store_true", help="list what would go and change nothing")

    doctor = verbs.add_parser("doctor", help="check a config, its data and, once it has run, its result; says what to do")
    doctor.add_argument("config", help="a YAML file, see configs/")
    doctor.add_argument("overrides", nargs="*", metavar="key.subkey=value", help="settings that replace the file's")


def _train(options) -> int:
    from sfumato.training.train import main as train

    return train([options.config, *options.overrides])


def _find_pipeline(source: str) -> str:
    """The pipeline in a run folder or checkpoint (the one written last), or the folder or Hub id itself."""
    folder = Path(source)
    if source == SHIPPED and not folder.is_dir():
        raise ValueError("the model that comes with the sources of sfumato is not here; name one with --model")
    if folder.is_dir():
        if (folder / "model_index.json").is_file():
            return str(folder)
        inside = [folder / "pipeline", *sorted(folder.glob("checkpoints/step-*/pipeline"))]
        if found := [path for path in inside if (path / "model_index.json").is_file()]:
            return str(max(reversed(found), key=lambda path: (path / "model_index.json").stat().st_mtime))
        raise ValueError(f"{source} holds no model: no model_index.json in it, in its pipeline/ or in its checkpoints")
    if folder.is_absolute() or source.startswith(".") or source.count("/") != 1 or Path(source).parent.is_dir():
        raise ValueError(f"there is no folder {source}")
    return source


def _opened(options, model: str):
    """The model with the sampler, guider and runtime that `options` name."""
    import torch

    from sfumato.pipelines import SfumatoPipeline
    from sfumato.pipelines.choices import with_guider, with_sampler

    pipe = SfumatoPipeline.from_pretrained(model)
    if options.sampler:
        pipe = with_sampler(pipe, options.sampler)
    pipe.to("cuda" if torch.cuda.is_available() and options.runtime == "torch" else "cpu")
    start, stop = options.guidance_interval
    if options.guider != "cfg" or options.weak or (start, stop) != (0.0, 1.0):
        weak = SfumatoPipeline.from_pretrained(_find_pipeline(options.weak)) if options.weak else None
        pipe = with_guider(pipe, options.guider, weak, start=start, stop=stop)
    if options.runtime != "torch":
        from sfumato.pipelines.runtimes import with_runtime

        pipe = with_runtime(pipe, options.runtime)
    return pipe


def _read_pictures(options, pipe) -> dict:
    """The pictures that a command names, upright and, but for one that is to be made larger, cropped to the model's shape."""
    from PIL import Image, ImageOps

    given, (height, width) = {}, pipe.trained_size
    for name, path in (("image", options.image), ("mask_image", options.mask), ("control_image", options.control)):
        if not path:
            continue
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
        scale = min(picture.width / width, picture.height / height)
        size = round(width * scale), round(height * scale)
        if pipe.reads != "low_res" and size != picture.size:
            print(f"{path}: cropped to its middle, {size[0]} x {size[1]} pixels", file=sys.stderr)
            left, top = (picture.width - size[0]) // 2, (picture.height - size[1]) // 2
            picture = picture.crop((left, top, left + size[0], top + size[1]))
        given[name] = picture
    return given


def _upscaler(model: str) -> Path | None:
    """The folder of a cascade's second model, downloaded where the first one is on the Hub; None: there is none."""
    from sfumato.pipelines.cascade import UPSCALER
    from sfumato.pipelines.trust import UNREAD

    if not Path(model).is_dir():
        from huggingface_hub import snapshot_download

        model = snapshot_download(model, allow_patterns=[f"{UPSCALER}/*"], ignore_patterns=UNREAD)
    folder = Path(model) / UPSCALER
    return folder if (folder / "model_index.json").is_file() else None


def _check_outputs(options) -> None:
    """Raise ValueError before anything is drawn for a place or a format in which the pictures could not be kept."""
    from PIL import Image

    kinds = Image.registered_extensions()
    for name, path in (("out", options.out), ("gif", options.gif)):
        if path and (Path(path).suffix.lower() not in kinds or Path(path).is_dir()):
            raise ValueError(f"--{name}={path} is no name for a picture; end it in .{'png' if name == 'out' else 'gif'}")
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
    if options.each:
        Path(options.each).mkdir(parents=True, exist_ok=True)


def _sample(options) -> int:
    model = _find_pipeline(options.model)
    _check_outputs(options)
    import torch

    from sfumato.figures import grid
    from sfumato.pipelines import Cascade, SfumatoPipeline
    from sfumato.pipelines.card import recommended

    pipe = _opened(options, model)
    advice = recommended(model)
    options.steps = advice["num_inference_steps"] if options.steps is None else options.steps
    options.guidance_scale = advice["guidance_scale"] if options.guidance_scale is None else options.guidance_scale
    if options.negative_prompt and options.guidance_scale <= 1 and options.guider == "cfg":
        print("--negative-prompt has no effect without guidance; set --guidance-scale above 1", file=sys.stderr)
    frames, given = [], _read_pictures(options, pipe)
    given |= {} if options.strength is None else {"strength": options.strength}

    draw = pipe
    if upscaler := _upscaler(model):
        draw = Cascade(pipe, SfumatoPipeline.from_pretrained(str(upscaler)).to(pipe.device))
        advice = recommended(str(upscaler))
        given |= {"upscaling_steps": advice["num_inference_steps"], "upscaling_guidance_scale": advice["guidance_scale"]}

    def keep(pipe, step, t, tensors):
        frames.append(grid(pipe.image_processor.postprocess(pipe.decode_latents(tensors["latents"])), options.prompts))
        return tensors

    pictures = draw(
        options.prompts,
        [options.negative_prompt or ""] * len(options.prompts),
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        generator=[torch.Generator().manual_seed(options.seed + i) for i in range(len(options.prompts))],
        callback_on_step_end=keep if options.gif else None,
        **given,
    ).images
    settings = {k: v for k, v in vars(options).items() if k not in ("verb", "out", "gif", "each") and v is not None}
    for name in {"model", "image", "mask", "control", "weak"} & settings.keys():
        if Path(settings[name]).exists():  # a name, not where it lies on this machine
            settings[name] = Path(settings[name]).resolve().name
    settings["passes"] = pipe.num_passes
    sheet = grid(pictures, options.prompts)
    _write(sheet, Path(options.out), settings)
    print(f"wrote {options.out} ({options.steps} steps, {pipe.num_passes} passes of the network for each picture)")
    if options.each:
        for i, (picture, prompt) in enumerate(zip(pictures, options.prompts)):
            own = {**settings, "prompts": [prompt], "seed": options.seed + i}
            _write(picture, Path(options.each) / f"{options.seed + i:05d}.png", own)
        print(f"wrote {len(pictures)} pictures in {options.each}")
    if options.gif:
        frames[0].save(options.gif, save_all=True, append_images=[*frames[1:], *[sheet] * 10], duration=80, loop=0)
        print(f"wrote {options.gif}")
    return 0


def _write(picture, path: Path, settings: dict) -> None:
    """Save a picture; in a PNG, with the settings that draw it again."""
    import json

    from PIL.PngImagePlugin import PngInfo

    notes = PngInfo()
    notes.add_itxt("sfumato", json.dumps(settings, ensure_ascii=False))
    picture.save(path, **({"pnginfo": notes} if path.suffix.lower() == ".png" else {}))


def _ema(options) -> int:
    model = _find_pipeline(options.run)
    from sfumato.pipelines import SfumatoPipeline, export_pipeline
    from sfumato.pipelines.card import forget_figures
    from sfumato.training.engine.ema import post_hoc

    weights, pipe = post_hoc(Path(options.run) / "ema", options.length), SfumatoPipeline.from_pretrained(model)
    for part in ("unet", "text_encoder", "controlnet"):
        own = {k.removeprefix(f"{part}."): v for k, v in weights.items() if k.startswith(f"{part}.")}
        if own and (odd := getattr(pipe, part).load_state_dict(own, strict=False).unexpected_keys):
            raise ValueError(f"the snapshots are of another model: {', '.join(odd[:3])}")
    folder = export_pipeline(pipe, options.folder, source=model)
    forget_figures(folder, f"averaged afterwards over {options.length:g} of the run")
    print(f"wrote {folder}, averaged over {options.length:g} of the run")
    return 0


def _evaluate(options) -> int:
    model = _find_pipeline(options.model)
    from sfumato.training.quality.command import evaluate

    return evaluate(model, options)


def _export(options) -> int:
    model = _find_pipeline(options.source)
    from sfumato.pipelines import SfumatoPipeline, export_pipeline
    from sfumato.pipelines.cascade import UPSCALER
    from sfumato.pipelines.export import TAKEN
    from sfumato.pipelines.trust import UNREAD

    raw, source = None, model
    if not Path(model).is_dir():
        from huggingface_hub import snapshot_download

        source = snapshot_download(model, allow_patterns=[*TAKEN, "samples/*.png", f"{UPSCALER}/*"], ignore_patterns=UNREAD)
    if "raw" in options.variants:
        from sfumato.training.engine import checkpoints

        near = [Path(model).parent, *reversed(checkpoints.folders(Path(model).parent))]
        raw = next((checkpoints.raw_weights(f) for f in near if (f / "state.safetensors").is_file()), None)
    pipe = SfumatoPipeline.from_pretrained(model)
    folder = export_pipeline(
        pipe, options.folder, variants=options.variants, raw=raw, max_shard_size=options.max_shard_size, source=source,
        upscaler=options.upscaler and _find_pipeline(options.upscaler), half=options.half,
    )  # fmt: skip
    print(f"wrote {folder}. Open it with:  DiffusionPipeline.from_pretrained({str(folder)!r})")
    return 0


def _push(options) -> int:
    model = _find_pipeline(options.source)
    from sfumato.training.publish import hub

    if options.dry_run:
        names = hub.files_to_push(Path(model))
        repo_id = hub.check(options.repo_id, options.pull_request, options.private)
        print(f"would push to {repo_id}, {options.branch or 'main'}:")
        for name in hub.stale(repo_id, options.branch or "main", names):
            print(f"     removed {name}")
        print("\n".join(f"{(Path(model) / name).stat().st_size:12,} {name}" for name in names))
        return 0
    address = hub.push(model, options.repo_id, options.private, options.branch, options.tag, options.pull_request)
    print(f"pushed {address}")
    return 0


def _doctor(options) -> int:
    from sfumato.training.config.load import load_config

    config = load_config(options.config, options.overrides)
    from sfumato.training.doctor import examine

    findings = examine(config)
    print("\n".join(map(str, findings)))
    return 1 if any(finding.severity == "error" for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
