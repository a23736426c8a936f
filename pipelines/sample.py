"""`sfumato sample`: opens a model as the options say, draws images and writes them with the settings that reproduce them."""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from sfumato.figures import grid, open_image
from sfumato.pipelines.card import recommended_settings
from sfumato.pipelines.cascade import UPSCALER, Cascade
from sfumato.pipelines.choices import with_guider, with_sampler
from sfumato.pipelines.codecs import Codec, object_endings, to_pictures
from sfumato.pipelines.locate import DEFAULT, locate_pipeline
from sfumato.pipelines.pipeline_sfumato import SfumatoPipeline
from sfumato.pipelines.runtimes import find_device, with_runtime
from sfumato.pipelines.trust import UNREAD


@dataclass(kw_only=True)
class SampleOptions:
    """What to draw, with what, and where to write it; each field is the command-line option of the same name."""

    prompts: list[str]
    model: str = DEFAULT
    out: str = "grid.png"
    each: str | None = None
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    sampler: str | None = None
    guider: str = "cfg"
    weak: str | None = None
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    runtime: str = "torch"
    device: str | None = None
    image: str | None = None
    mask: str | None = None
    strength: float | None = None
    control: str | None = None
    gif: str | None = None


def sample(options: SampleOptions) -> list[Image.Image]:
    """Draw one image per prompt and write the grid, the single images and the GIF that the options name.

    Raises:
        ValueError: something cannot be drawn or saved; raised before anything is drawn.
    """
    model = locate_pipeline(options.model)
    check_outputs(options, object_endings())
    pipe, advice = open_model(options, model), recommended_settings(model)
    check_outputs(options, pipe.codec.endings if pipe.codec is not None else ())
    options.steps = advice["num_inference_steps"] if options.steps is None else options.steps
    options.guidance_scale = advice["guidance_scale"] if options.guidance_scale is None else options.guidance_scale
    if options.negative_prompt and options.guidance_scale <= 1 and options.guider == "cfg":
        print("--negative-prompt has no effect without guidance; set --guidance-scale above 1", file=sys.stderr)
    arguments: dict[str, Any] = read_images(options, pipe)
    if options.strength is not None:
        arguments["strength"] = options.strength
    draw: SfumatoPipeline | Cascade = pipe
    if upscaler := find_upscaler(model):
        draw = Cascade(pipe, SfumatoPipeline.from_pretrained(str(upscaler)).to(pipe.device))
        advice = recommended_settings(str(upscaler))
        arguments["upscaling_steps"] = advice["num_inference_steps"]
        arguments["upscaling_guidance_scale"] = advice["guidance_scale"]
    frames: list[Image.Image] = []

    def keep_frame(pipe, step, t, tensors):
        kind = "pil" if pipe.codec is None else "np"
        drawn = pipe.image_processor.postprocess(pipe.decode_latents(tensors["latents"]), output_type=kind)
        frames.append(grid(to_pictures(pipe.codec, drawn), options.prompts))
        return tensors

    if pipe.codec is not None:
        arguments["output_type"] = "decoded"
    images: Any = draw(
        options.prompts,
        [options.negative_prompt or ""] * len(options.prompts),
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        generator=[torch.Generator().manual_seed((options.seed + i) % 2**64) for i in range(len(options.prompts))],
        callback_on_step_end=keep_frame if options.gif else None,
        return_dict=False,
        **arguments,
    )[0]
    things = None
    if pipe.codec is not None:
        things, images = images, [Image.fromarray(pipe.codec.picture(thing)) for thing in images]
        write_things(options, things, pipe.codec)
    write_outputs(options, images, frames, pipe.num_passes)
    return images


def open_model(options: SampleOptions, model: str) -> SfumatoPipeline:
    """The model with the sampler, guider and runtime that `options` name."""
    pipe = SfumatoPipeline.from_pretrained(model)
    if options.sampler:
        pipe = with_sampler(pipe, options.sampler)
    if options.runtime != "torch" and options.device not in (None, "cpu"):
        raise ValueError(f"--runtime {options.runtime} is for the CPU; leave --device {options.device} out")
    pipe.to(find_device(options.device if options.runtime == "torch" else "cpu"))
    start, stop = options.guidance_interval
    if options.guider != "cfg" or options.weak or (start, stop) != (0.0, 1.0):
        weak = SfumatoPipeline.from_pretrained(locate_pipeline(options.weak)) if options.weak else None
        pipe = with_guider(pipe, options.guider, weak, start=start, stop=stop)
    return pipe if options.runtime == "torch" else with_runtime(pipe, options.runtime)


def read_images(options: SampleOptions, pipe: SfumatoPipeline) -> dict[str, Any]:
    """The images that a command names, upright and, unless they are to be upscaled, cropped to the model's aspect ratio."""
    images, (height, width) = {}, pipe.trained_size
    for name, path in (("image", options.image), ("mask_image", options.mask), ("control_image", options.control)):
        if not path:
            continue
        try:
            with open_image(Path(path)) as file:
                image = ImageOps.exif_transpose(file)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from error
        cut = image if pipe.reads == "low_res" else crop_middle(image, width, height)
        if cut.size != image.size:
            print(f"{path}: cropped to its middle, {cut.width} x {cut.height} pixels", file=sys.stderr)
        images[name] = cut
    return images


def crop_middle(image: Image.Image, width: int, height: int) -> Image.Image:
    """The largest centre crop with the aspect ratio of `width` x `height`, or the image itself if it has that ratio."""
    scale = min(image.width / width, image.height / height)
    across, down = round(width * scale), round(height * scale)
    if (across, down) == image.size:
        return image
    left, top = (image.width - across) // 2, (image.height - down) // 2
    return image.crop((left, top, left + across, top + down))


def find_upscaler(model: str) -> Path | None:
    """The folder of a cascade's second model, downloaded if the first one is on the Hub; None if there is none."""
    if not Path(model).is_dir():
        model = snapshot_download(model, allow_patterns=[f"{UPSCALER}/*"], ignore_patterns=UNREAD)
    folder = Path(model) / UPSCALER
    return folder if (folder / "model_index.json").is_file() else None


def check_outputs(options: SampleOptions, others: tuple[str, ...] = ()) -> None:
    """Before anything is drawn, raise ValueError for a path or a file format to which the images could not be saved.

    `others` are the endings of files that hold a single object.
    """
    formats = set(Image.registered_extensions())
    if Path(options.out).suffix.lower() in others:
        formats.update(others)
        if len(options.prompts) > 1 and Path(options.out).suffix.lower() not in (".png", ".gif"):
            raise ValueError(f"--out={options.out} holds one of {len(options.prompts)} prompts; name a folder with --each")
    for name, path in (("out", options.out), ("gif", options.gif)):
        if path and (Path(path).suffix.lower() not in formats or Path(path).is_dir()):
            raise ValueError(f"--{name}={path} does not name an image; end it in .{'png' if name == 'out' else 'gif'}")
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
    if options.each:
        Path(options.each).mkdir(parents=True, exist_ok=True)


def write_things(options: SampleOptions, things: list, codec: Codec) -> None:
    """Write objects where the options say: one file each with `each`, or one as `out`, which then becomes an image name."""
    out = Path(options.out)
    if out.suffix.lower() in codec.endings and out.suffix.lower() != ".png" and len(things) == 1:
        codec.write(things[0], str(out))
        print(f"wrote {out}")
        options.out = str(out.with_suffix(".png"))
    for i, thing in enumerate(things if options.each else ()):
        try:
            codec.write(thing, str(Path(str(options.each)) / f"{options.seed + i:05d}{codec.endings[0]}"))
        except ValueError as error:  # what was drawn is not a valid object
            print(f"{options.prompts[i]!r}, seed {options.seed + i}: {error}", file=sys.stderr)


def write_outputs(options: SampleOptions, images: list[Image.Image], frames: list[Image.Image], num_passes: int) -> None:
    """Write what was drawn where the options say, and print where."""
    settings = {k: v for k, v in asdict(options).items() if k not in ("out", "gif", "each") and v is not None}
    for name in {"model", "image", "mask", "control", "weak"} & settings.keys():
        if Path(settings[name]).exists():  # the name, not the path on this machine
            settings[name] = Path(settings[name]).resolve().name
    settings["passes"] = num_passes
    sheet = grid(images, options.prompts)
    write_image(sheet, Path(options.out), settings)
    print(f"wrote {options.out} ({options.steps} steps, {num_passes} passes of the network for each image)")
    if options.each:
        for i, (image, prompt) in enumerate(zip(images, options.prompts)):
            own = {**settings, "prompts": [prompt], "seed": options.seed + i}
            write_image(image, Path(options.each) / f"{options.seed + i:05d}.png", own)
        print(f"wrote {len(images)} images in {options.each}")
    if options.gif:
        frames[0].save(options.gif, save_all=True, append_images=[*frames[1:], *[sheet] * 10], duration=80, loop=0)
        print(f"wrote {options.gif}")


def write_image(image: Image.Image, path: Path, settings: dict) -> None:
    """Save an image; a PNG also records the settings that reproduce it."""
    notes = PngInfo()
    notes.add_itxt("sfumato", json.dumps(settings, ensure_ascii=False))
    if path.suffix.lower() == ".png":
        image.save(path, pnginfo=notes)
    else:
        image.save(path)
