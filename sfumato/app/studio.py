"""The model that the app has open, and what it draws; without Gradio, so that it can be tested alone."""

import json
import queue
import shlex
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sfumato.figures import grid, open_image
from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.card import recommended_settings
from sfumato.pipelines.choices import with_guider, with_sampler
from sfumato.pipelines.explain import Explanation, Recorder, explain
from sfumato.pipelines.locate import locate_pipeline
from sfumato.pipelines.sample import write_image
from sfumato.registries import GUIDERS, SAMPLERS

MAX_IMAGES = 16
MAX_STEPS = 200
MAX_CELLS = 36  # of a comparison
RENAMED = {"scale": "guidance_scale"}  # as it is stored in images
AXES = {"prompt": str, "seed": int, "steps": int, "scale": float, "sampler": str, "guider": str, "checkpoint": int}


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A moment while drawing: what is finished, as files, and what the network expects of the image in progress.

    Attributes:
        done: images; for other objects, pictures of them.
        things: for a model that does not draw images, the objects themselves: `.wav`, `.gif`, `.glb` or `.sdf`.
    """

    done: list[str]
    expected: Image.Image | None
    command: str
    things: list[str]


class Studio:
    """One open model.

    Args:
        model: what `sfumato sample --model` takes.

    Raises:
        ValueError: no such model.
    """

    def __init__(self, model: str):
        self.model = model
        folder = locate_pipeline(model)
        self.pipe = SfumatoPipeline.from_pretrained(folder)
        self.pipe.set_progress_bar_config(disable=True)
        self.advice = recommended_settings(folder)
        self.places = tempfile.TemporaryDirectory(prefix="sfumato-app-")
        self._busy = threading.Lock()
        self._under_way: set[threading.Event] = set()  # one per drawing, which ends once it is set
        self._count = 0
        self.last: str | None = None  # the file of the image that was drawn last
        self._earlier: dict[int, Studio] = {}

    @property
    def image_input(self) -> str | None:
        """The pipeline argument for the image without which the model cannot draw: `image`, to be enlarged, or
        `control_image`, the map that a ControlNet follows.
        """
        if self.pipe.controlnet is not None:
            return "control_image"
        return "image" if self.pipe.reads == "low_res" else None

    def stop(self) -> None:
        """End the drawings in progress after their current step."""
        for event in list(self._under_way):
            event.set()
        for studio in self._earlier.values():
            studio.stop()

    def draw(
        self,
        text: str,
        *,
        negative: str = "",
        seed: int = 0,
        steps: int | None = None,
        scale: float | None = None,
        sampler: str | None = None,
        guider: str = "cfg",
        live: bool = True,
        **inputs: Any,
    ) -> Iterator[Drawing]:
        """Draw one image per line of `text`, image i with seed + i; if `live`, yield the state at every step.

        Raises:
            ValueError: nothing to draw, or invalid settings.
        """
        prompts = [line.strip() for line in text.splitlines() if line.strip()][:MAX_IMAGES]
        if not prompts and self.image_input == "image":
            prompts = [""]  # an image can be enlarged without a prompt, too
        if not prompts or (self.image_input is not None and inputs.get(self.image_input) is None):
            raise ValueError("Nothing to draw.")
        steps = int(steps or self.advice["num_inference_steps"])
        scale = float(self.advice["guidance_scale"] if scale is None else scale)
        if not 1 <= steps <= MAX_STEPS:
            raise ValueError(f"steps={steps}: must be from 1 to {MAX_STEPS}")
        pipe = with_sampler(self.pipe, sampler) if sampler else self.pipe
        pipe = with_guider(pipe, guider) if guider != "cfg" else pipe
        settings = {"model": Path(self.model).name, "steps": steps, "guidance_scale": scale}
        settings |= {"negative_prompt": negative or None, "sampler": sampler or None, "guider": guider}
        settings = {key: value for key, value in settings.items() if value is not None}
        settings |= {"strength": inputs["strength"]} if "strength" in inputs else {}
        command = self.command(prompts, seed, settings)
        call = {"num_inference_steps": steps, "guidance_scale": scale, "negative_prompt": negative or None, **inputs}
        done: list[str] = []
        things: list[str] = []
        stop = threading.Event()
        self._under_way.add(stop)
        try:
            with self._busy:
                for number, prompt in enumerate(prompts):
                    for image in self._one(pipe, prompt, (seed + number) % 2**64, call, stop, live):
                        if isinstance(image, Image.Image):
                            yield Drawing(done=list(done), expected=image, command=command, things=list(things))
                        else:
                            kept = self._keep(image[0], {**settings, "prompts": [prompt], "seed": seed + number})
                            done.append(kept[0])
                            things += kept[1:]
                    if stop.is_set():
                        break
                yield Drawing(done=list(done), expected=None, command=command, things=list(things))
        finally:
            self._under_way.discard(stop)

    def _one(
        self, pipe: SfumatoPipeline, prompt: str, seed: int, call: dict, stop: threading.Event, live: bool
    ) -> Iterator[Image.Image | tuple[Any]]:
        """Yield what is expected at each step, and at the end what is drawn, in a tuple; nothing more after a stop."""
        recorder = Recorder.of(pipe)
        moments: queue.Queue = queue.Queue()

        def tell(pipe, step, t, tensors):
            # A preview of sounds and solids takes longer than a step, so none is made while another one waits.
            if live and (pipe.codec is None or moments.empty()):
                moments.put(self._look_at(recorder.expected[-1]))
            pipe._interrupt = stop.is_set()
            return tensors

        def work():
            try:
                generator = torch.Generator().manual_seed(seed)
                kind = "decoded" if pipe.codec is not None else "pil"
                image = recorder(prompt, generator=generator, callback_on_step_end=tell, output_type=kind, **call).images[0]
                moments.put((image,))
            except BaseException as error:  # noqa: BLE001  (raised again by the thread that waits)
                moments.put(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        ended = False
        try:
            while not ended:
                moment = moments.get()
                ended = not isinstance(moment, Image.Image)
                if isinstance(moment, BaseException):
                    raise moment
                if not (ended and stop.is_set()):
                    yield moment
        finally:  # also when the caller has stopped iterating
            if not ended:
                stop.set()
            thread.join()

    def _look_at(self, array: np.ndarray) -> Image.Image:
        """What a model draws, `(H, W, C)` in [0, 1], as an image to look at."""
        codec = self.pipe.codec
        if codec is None:
            return _to_pil(array)
        glance = getattr(codec, "glance", None)  # a preview without decoding an object
        return enlarge(Image.fromarray(glance(array) if glance else codec.picture(codec.decode(array))))

    def _keep(self, thing: Any, settings: dict) -> list[str]:
        """Write an image, or a picture of an object and the object, unless no file can hold the latter; returns the files."""
        self._count += 1
        path, codec = Path(self.places.name) / f"{self._count:05d}-seed-{settings['seed']}.png", self.pipe.codec
        write_image(thing if codec is None else enlarge(Image.fromarray(codec.picture(thing))), path, settings)
        self.last = str(path)
        if codec is None:
            return [str(path)]
        try:
            codec.write(thing, str(path.with_suffix(codec.endings[0])))
        except ValueError:
            return [str(path)]
        return [str(path), str(path.with_suffix(codec.endings[0]))]

    def compare(
        self, prompt: str, rows: tuple[str, list], columns: tuple[str, list], settings: dict[str, Any]
    ) -> Iterator[tuple[Image.Image, str | None]]:
        """Draw a grid of one image for each pair of values of two settings, all from the same noise unless the seed differs.

        Args:
            rows, columns: a name of `AXES` and its values.
            settings: the other settings: `seed`, `steps`, `scale`, `sampler`, `guider`.

        Yields:
            The grid as far as it is drawn, and at the end also the file that holds it.

        Raises:
            ValueError: too many images, or invalid values.
        """
        cells = [(row, column) for row in rows[1] for column in columns[1]]
        if rows[0] == columns[0]:
            raise ValueError("down and across are the same")
        if not cells or len(cells) > MAX_CELLS:
            raise ValueError(f"{len(cells)} images; a grid has 1 to {MAX_CELLS}")
        images, titles = [], []
        for row, column in cells:
            chosen = {"prompt": prompt, **settings, rows[0]: row, columns[0]: column}
            studio = self._at(chosen.pop("checkpoint", None))
            drawn = list(studio.draw(chosen.pop("prompt"), live=False, **chosen))[-1].done
            if not drawn:  # stopped
                return
            with Image.open(drawn[0]) as image:
                images.append(image.convert("RGB"))
            titles.append(f"{rows[0]} {row}, {columns[0]} {column}")
            sheet = grid(images, titles, columns=len(columns[1]))
            yield sheet, None
        self._count += 1
        path = Path(self.places.name) / f"{self._count:05d}-comparison.png"
        kept = {"model": Path(self.model).name, "prompts": [prompt], **settings}
        kept = {RENAMED.get(key, key): value for key, value in kept.items() if key not in (rows[0], columns[0])}
        write_image(sheet, path, {**kept, "rows": list(rows), "columns": list(columns)})
        yield sheet, str(path)

    def checkpoints(self) -> list[int]:
        """The steps of the checkpoints that this model's run has kept."""
        return sorted(self._checkpoints())

    def _checkpoints(self) -> dict[int, Path]:
        found = Path(self.model).glob("checkpoints/step-*")
        return {int(path.name[5:]): path for path in found if path.name[5:].isdigit()}

    def _at(self, step: int | None) -> "Studio":
        """The model as it was at a step of its run."""
        if step is None:
            return self
        if step not in self.checkpoints():
            raise ValueError(f"there is no checkpoint of step {step}; there are {self.checkpoints() or 'none'}")
        if step not in self._earlier:
            self._earlier[step] = Studio(str(self._checkpoints()[step]))
        return self._earlier[step]

    def command(self, prompts: list[str], seed: int, settings: dict) -> str:
        """`sfumato sample ...` with the same settings."""
        words = ["sfumato", "sample", *prompts, "--model", self.model, "--seed", str(seed)]
        for key in ("steps", "guidance_scale", "negative_prompt", "sampler"):
            if settings.get(key) is not None:
                words += [f"--{key.replace('_', '-')}", str(settings[key])]
        if settings.get("guider", "cfg") != "cfg":
            words += ["--guider", settings["guider"]]
        return shlex.join(words)

    def explain(self, prompt: str, *, seed: int = 0, ablate: bool = False) -> Explanation:
        """Explain why an image looks as it does, with the steps and the scale of the model's card.

        Raises:
            ValueError: an empty prompt, or a model without cross-attention.
        """
        with self._busy:
            generator = torch.Generator().manual_seed(seed)
            return explain(self.pipe, prompt, ablate=ablate, generator=generator, **self.advice)


def read_values(axis: str, text: str) -> list:
    """Read the values given for a setting of `AXES`: one per line, or separated by commas unless they are prompts.

    Raises:
        ValueError: no value, or one that is not valid for this setting.
    """
    kind = AXES[axis]
    parts = [part.strip() for part in (text.splitlines() if axis == "prompt" else text.replace(",", "\n").splitlines())]
    try:
        values = [kind(part) for part in parts if part]
    except ValueError as error:
        raise ValueError(f"{axis}: {error}") from error
    if not values:
        raise ValueError(f"{axis}: no value")
    return values


def enlarge(image: Image.Image, side: int = 320) -> Image.Image:
    """Enlarge an image by the largest whole factor that keeps it within `side` pixels of width."""
    scale = max(1, side // image.width)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def read_settings(path: str | None) -> dict[str, Any]:
    """The valid ones of the settings that `sfumato sample` and the app write into a PNG.

    Raises:
        ValueError: it holds none.
    """
    try:
        with open_image(Path(str(path))) as image:
            found = json.loads(image.info["sfumato"])
        assert isinstance(found, dict)
    except (OSError, ValueError, KeyError, AssertionError, TypeError) as error:
        raise ValueError("This image holds no settings.") from error
    sound: dict[str, Any] = {}
    prompts = found.get("prompts")
    if isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts):
        sound["prompts"] = "\n".join(prompts[:MAX_IMAGES])
    for key, kind in (("seed", int), ("steps", int), ("guidance_scale", (int, float)), ("negative_prompt", str)):
        if isinstance(found.get(key), kind) and not isinstance(found.get(key), bool):
            sound[key] = found[key]
    for key, names in (("sampler", SAMPLERS), ("guider", GUIDERS)):
        if found.get(key) in names:
            sound[key] = found[key]
    return sound


def _to_pil(array: np.ndarray) -> Image.Image:
    """`(H, W, C)` in [0, 1]."""
    pixels = (array.clip(0, 1) * 255).round().astype(np.uint8)
    return enlarge(Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))
