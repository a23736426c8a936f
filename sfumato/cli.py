"""The `sfumato` command: its parser and verbs. The work is done in `sfumato.api` and below; heavy imports are local."""

import argparse
import os
import re
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from sfumato import __version__
from sfumato.files import printable, refresh_bars_slowly_in_files
from sfumato.pipelines.locate import DEFAULT
from sfumato.registries import GUIDERS, METRICS, SAMPLERS, SOURCES, TASKS

OVERRIDES = {"nargs": "*", "metavar": "key.subkey=value", "help": "settings that override the file's"}
CONFIG = "a YAML file, the name of a packaged config such as demo, or a run folder"


def main(arguments: list[str] | None = None) -> int:
    """Run one verb and return the exit code (2 for invalid input)."""
    refresh_bars_slowly_in_files()
    options = _parse(arguments)
    verb: Callable[[argparse.Namespace], int] = options.run
    try:
        return verb(options)
    except (ValueError, ModuleNotFoundError, OSError) as error:
        print(f"sfumato: {printable(error)}", file=sys.stderr)
        return 2


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the arguments; settings may also follow a verb's options, where argparse does not expect them."""
    top = parser()
    options, more = top.parse_known_args(arguments)
    if more and not (hasattr(options, "overrides") and all(re.match(r"[a-z][\w.]*=", item) for item in more)):
        top.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        options.overrides += more
    return options


def parser() -> argparse.ArgumentParser:
    """Build the parser of the whole command line."""
    top = argparse.ArgumentParser(prog="sfumato", description="Train, sample and share text-conditional diffusion models.")
    top.add_argument("--version", action="version", version=f"sfumato {__version__}")
    _add_completion(top)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add in VERBS:
        add(verbs)
    return top


def _add_completion(top: argparse.ArgumentParser) -> None:
    try:
        import shtab
    except ModuleNotFoundError:
        return
    shtab.add_argument_to(top, ["--print-completion"], help="print a completion script for bash, zsh or tcsh")


def _add_train(verbs) -> None:
    train = verbs.add_parser(
        "train",
        help="train from a config",
        description="Train from a config. For several GPUs: accelerate launch -m sfumato.training.train CONFIG ...",
        epilog=f"tasks: {', '.join(TASKS)}; data.name: {', '.join(n for n, s in SOURCES.items() if s.named)}, a folder, "
        "a file, or a Hub id",
    )
    train.add_argument("config", help=CONFIG)
    train.add_argument("overrides", **OVERRIDES)
    train.set_defaults(run=_train)


def _add_init(verbs) -> None:
    init = verbs.add_parser("init", help="write a commented config to start from")
    init.add_argument("folder", help="the folder in which config.yaml is written")
    init.add_argument("--preset", default="folder_cpu", help="the packaged config to copy (default: %(default)s)")
    init.set_defaults(run=_init)


def _add_sample(verbs) -> None:
    from sfumato.pipelines.choices import RUNTIMES

    sample = verbs.add_parser("sample", help="draw images with a trained model")
    sample.add_argument("prompts", nargs="+", help="what to draw; one image per prompt")
    sample.add_argument(
        "--model", default=DEFAULT, help="an exported folder, a run folder, or a Hub id (default: our emoji model)"
    )
    sample.add_argument("--out", "--grid", default="grid.png", help="the file for the grid (default: %(default)s)")
    sample.add_argument("--each", metavar="FOLDER", help="also write each image, unscaled, to a file in this folder")
    sample.add_argument("--seed", type=int, default=0, help="image i has seed SEED + i (default: %(default)s)")
    sample.add_argument("--steps", type=int, help="sampling steps (default: as in the model's card, else 30)")
    sample.add_argument("--guidance-scale", type=float, help="1 turns guidance off (default: as in the model's card, else 3)")
    sample.add_argument("--negative-prompt", help="what to steer away from")
    sample.add_argument("--sampler", help=f"{', '.join(SAMPLERS)} (default: the model's)")
    sample.add_argument("--guider", default="cfg", help=f"{', '.join(GUIDERS)} (default: %(default)s)")
    sample.add_argument("--weak", help="for the autoguidance guider: an earlier checkpoint of the same run")
    sample.add_argument(
        "--guidance-interval",
        nargs=2,
        type=float,
        default=[0.0, 1.0],
        metavar=("START", "STOP"),
        help="guide only in this part of the steps; the other steps need one pass instead of two (default: 0 1)",
    )
    sample.add_argument("--runtime", default="torch", help=f"on a CPU: {', '.join(RUNTIMES)} (default: %(default)s)")
    sample.add_argument(
        "--device", help="for the torch runtime: cuda, mps, xpu, cpu (default: the accelerator that torch finds)"
    )
    sample.add_argument("--image", help="an image to start from, to redraw in part, or to enlarge")
    sample.add_argument("--mask", help="an image that is white where --image is to be redrawn")
    sample.add_argument("--strength", type=float, help="how much of --image is redrawn, 0 to 1")
    sample.add_argument("--control", help="a map for a model with a ControlNet to follow, such as edges")
    sample.add_argument("--gif", help="write an animation of the denoising, step by step, to this file")
    sample.set_defaults(run=_sample)


def _add_explain(verbs) -> None:
    explain = verbs.add_parser("explain", help="show where in the image each word of the prompt was read")
    explain.add_argument("prompt", help="what to draw")
    explain.add_argument("--model", default=DEFAULT, help="a run, a folder or a Hub id (default: our emoji model)")
    explain.add_argument("--out", default="explained.png", help="the file for the figure (default: %(default)s)")
    explain.add_argument("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
    explain.add_argument("--without", action="store_true", help="also show what changes without each word (an image per word)")
    explain.set_defaults(run=_explain)


def _add_evaluate(verbs) -> None:
    evaluate = verbs.add_parser(
        "evaluate",
        help="measure the quality of a model; the figures go into its card",
        epilog=f"metrics: {', '.join(name for name, metric in METRICS.items() if metric.of == 'drawings')}",
    )
    evaluate.add_argument("--model", default=DEFAULT, help="a run folder, a pipeline or a Hub id (default: our emoji model)")
    evaluate.add_argument("--data", help="a config, or a value for data.name (default: the model's training data)")
    evaluate.add_argument(
        "--images", "--pictures", type=int, default=512, help="number of captions to draw (default: %(default)s)"
    )
    evaluate.add_argument("--sampler", help=f"{', '.join(SAMPLERS)} (default: the model's)")
    evaluate.add_argument("--steps", type=int, help="sampling steps (default: as in the model's card, else 30)")
    evaluate.add_argument("--guidance-scale", type=float, help="(default: as in the model's card, else 3)")
    evaluate.add_argument("--seed", type=int, default=0, help="image i has seed SEED + i (default: %(default)s)")
    evaluate.add_argument(
        "--extractor",
        default="efficientnet-lite0",
        help="features: efficientnet-lite0, inception[:WEIGHTS], transformers:FOLDER_OR_HUB_ID (default: %(default)s)",
    )
    evaluate.add_argument("--bits", type=int, default=0, help="also bound the bits per dimension of this many images")
    evaluate.add_argument("--out", help="a folder for evaluation.json and memorisation.png, instead of the model's own")
    evaluate.set_defaults(run=_evaluate)


def _add_ema(verbs) -> None:
    ema = verbs.add_parser("ema", help="average a run's weights over a different length, from the snapshots that it saved")
    ema.add_argument("source", metavar="RUN", help="the run folder, trained with ema.snapshot_steps")
    ema.add_argument("folder", help="the folder for the resulting model")
    ema.add_argument("--length", type=float, default=0.1, help="length of the average, as a share of the run (default: 0.1)")
    ema.set_defaults(run=_ema)


def _add_export(verbs) -> None:
    export = verbs.add_parser("export", help="write a run, a checkpoint or any Stable Diffusion folder as a shareable folder")
    export.add_argument("source", help="a run folder, a checkpoint or a pipeline folder")
    export.add_argument("folder", help="the folder to write")
    export.add_argument("--half", action="store_true", help="store the weights in half precision, at half the size")
    export.add_argument("--upscaler", help="a run or folder of an upscaling model, to form a cascade with it")
    export.add_argument("--variants", nargs="*", default=[], choices=["fp16", "raw"], help="additional copies of the weights")
    export.add_argument("--max-shard-size", default="10GB", help="maximum size of a weights file (default: %(default)s)")
    export.set_defaults(run=_export)


def _add_push(verbs) -> None:
    push = verbs.add_parser("push", help="put a run's result or an exported folder on the Hub, in one commit")
    push.add_argument("source", help="a run folder, a checkpoint or an exported folder")
    push.add_argument("repo_id", help="NAME or OWNER/NAME")
    push.add_argument("--private", action="store_true", help="make a new repository private")
    push.add_argument("--branch", default="main", help="the branch to push to (default: %(default)s)")
    push.add_argument("--tag", help="a tag for the result")
    push.add_argument("--pull-request", action="store_true", help="propose the change, for repositories without write access")
    push.add_argument("--space", metavar="NAME", help="also create or update a Space that draws with the model")
    push.add_argument("--dry-run", action="store_true", help="list what would be pushed, without changing anything")
    push.set_defaults(run=_push)


def _add_doctor(verbs) -> None:
    doctor = verbs.add_parser("doctor", help="check a config, its data and, after training, its result, and say what to do")
    doctor.add_argument("config", help=CONFIG)
    doctor.add_argument("overrides", **OVERRIDES)
    doctor.add_argument("--verify", action="store_true", help="read all bytes of the prepared set and check their hash")
    plan = "say instead what the run needs on a GPU such as h100 or rtx4090, without having one"
    doctor.add_argument("--gpu", help=plan)
    doctor.add_argument("--gpus", type=int, default=1, help="number of these GPUs (default: %(default)s)")
    doctor.add_argument("--images", type=float, help="number of images for the run to see, to estimate its hours and price")
    doctor.set_defaults(run=_doctor)


def _add_tune(verbs) -> None:
    tune = verbs.add_parser("tune", help="find the sampler that draws best in a few steps and save it in the model's folder")
    tune.add_argument("--model", required=True, help="a run folder or an exported folder")
    tune.add_argument("--steps", type=int, default=8, help="number of steps to tune for (default: %(default)s)")
    tune.add_argument("--guidance-scale", type=float, help="(default: as in the model's card, else 3)")
    tune.add_argument("--prompts", nargs="+", help="what to draw in the trials (default: captions of the card's samples)")
    tune.add_argument("--out", help="a new folder for the model with that sampler, instead of its own")
    tune.set_defaults(run=_tune)


def _add_app(verbs) -> None:
    app = verbs.add_parser("app", help="draw, redraw, ask why, compare, train and watch runs in a browser (extra app)")
    app.add_argument("model", nargs="?", default=DEFAULT, help="a run, a folder or a Hub id (default: our emoji model)")
    app.add_argument("--runs", default="runs", help="a folder of run folders to watch (default: %(default)s)")
    app.add_argument("--host", default="127.0.0.1", help="any other host needs --password (default: %(default)s)")
    app.add_argument("--port", type=int, default=7860, help="0 picks a free port (default: %(default)s)")
    app.add_argument("--password", help="password of the user sfumato (default: the value of SFUMATO_PASSWORD)")
    app.add_argument("--language", default="en", choices=["en", "zh"], help="(default: %(default)s)")
    app.set_defaults(run=_app)


VERBS = (
    *(_add_train, _add_init, _add_sample, _add_explain, _add_evaluate, _add_tune),
    *(_add_ema, _add_export, _add_push, _add_doctor, _add_app),
)


def _app(options: argparse.Namespace) -> int:
    from sfumato.app import launch

    settings = {name: getattr(options, name) for name in ("runs", "host", "port", "language")}
    settings["password"] = options.password or os.environ.get("SFUMATO_PASSWORD")
    launch(options.model, **settings)
    return 0


def _train(options: argparse.Namespace) -> int:
    from sfumato.training.train import main as train

    return train([options.config, *options.overrides])


def _init(options: argparse.Namespace) -> int:
    from sfumato.training.config.load import config_text

    text, path = config_text(options.preset), Path(options.folder) / "config.yaml"
    if path.exists():
        raise ValueError(f"{path} already exists; choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = re.compile(rf"accelerate launch training/train.py configs/{re.escape(options.preset)}.yaml")
    path.write_text(mine.sub(lambda found: f"sfumato train {path}", text, count=1), encoding="utf-8")
    print(f"wrote {path}. Review it, then:  sfumato doctor {path}  and  sfumato train {path}")
    return 0


def _sample(options: argparse.Namespace) -> int:
    from sfumato.pipelines.sample import SampleOptions, sample

    sample(SampleOptions(**{field.name: getattr(options, field.name) for field in fields(SampleOptions)}))
    return 0


def _explain(options: argparse.Namespace) -> int:
    import torch
    from PIL import Image

    from sfumato.pipelines import SfumatoPipeline
    from sfumato.pipelines.card import recommended_settings
    from sfumato.pipelines.explain import explain
    from sfumato.pipelines.locate import locate_pipeline

    if Path(options.out).suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--out {options.out}: not an image format; use .png")
    model = locate_pipeline(options.model)
    pipe = SfumatoPipeline.from_pretrained(model)
    generator = torch.Generator().manual_seed(options.seed)
    explanation = explain(pipe, options.prompt, ablate=options.without, generator=generator, **recommended_settings(model))
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    explanation.figure().save(options.out)
    second = "; below, what changes without it" if options.without else ""
    print(f"wrote {options.out}: the image, and in red where each word was read{second}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from sfumato import api

    names = ("data", "images", "sampler", "steps", "guidance_scale", "seed", "extractor", "bits", "out")
    report = api.evaluate(options.model, **{name: getattr(options, name) for name in names})
    if report is None:  # not the first process
        return 0
    for name, score in report.scores.items():
        print(f"{name:70} {score.value:.4g}" + ("" if score.half_width is None else f" ± {score.half_width:.2g}"))
    print(report.protocol)
    if report.folder is None:
        print("The model is on the Hub, so the figures are printed but not saved; give a folder for them with --out")
    else:
        print(f"wrote evaluation.json{' and the card' if options.out is None else ''} of {report.folder}")
    return 0


def _tune(options: argparse.Namespace) -> int:
    from sfumato import api

    trials, folder = api.tune(
        options.model,
        steps=options.steps,
        guidance_scale=options.guidance_scale,
        prompts=options.prompts,
        out=options.out,
    )
    print("difference from many steps, best first:")
    print("\n".join(map(str, trials[:5])))
    print(f"wrote {folder}, which draws with the first of these in {options.steps} steps")
    return 0


def _ema(options: argparse.Namespace) -> int:
    from sfumato.training.engine.ema import export_average

    folder = export_average(options.source, options.folder, options.length)
    print(f"wrote {folder}, averaged over {options.length:g} of the run")
    return 0


def _export(options: argparse.Namespace) -> int:
    from sfumato.pipelines.locate import locate_pipeline
    from sfumato.training.publish.reexport import reexport

    folder = reexport(
        locate_pipeline(options.source),
        options.folder,
        variants=options.variants,
        max_shard_size=options.max_shard_size,
        upscaler=options.upscaler and locate_pipeline(options.upscaler),
        half=options.half,
    )
    print(f"wrote {folder}. Open it with:  DiffusionPipeline.from_pretrained({str(folder)!r})")
    return 0


def _push(options: argparse.Namespace) -> int:
    from sfumato.pipelines.locate import locate_pipeline
    from sfumato.training.publish import hub, space

    model = Path(locate_pipeline(options.source))
    target = hub.Target(
        repo_id=options.repo_id,
        private=options.private,
        branch=options.branch,
        tag=options.tag,
        pull_request=options.pull_request,
    )
    if options.space and options.pull_request:
        raise ValueError("--space draws with what is on the Hub, which excludes an open pull request; leave one of them out")
    if options.space:
        space.check_space(model)
    if options.dry_run:
        print("\n".join(hub.describe_push(model, target)))
        return 0
    print(f"pushed {hub.push(model, target)}")
    if options.space:
        named = replace(target, repo_id=hub.check(target.repo_id, private=target.private))
        print(f"made {space.push_space(model, options.space, named)}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from sfumato import api

    config = api.load_config(options.config, options.overrides)
    if options.gpu is not None:
        findings = api.plan(config, gpu=options.gpu, gpus=options.gpus, images=options.images)
    else:
        findings = api.doctor(config, verify=options.verify)
    print("\n".join(map(str, findings)))
    return 1 if any(finding.severity == "error" for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
