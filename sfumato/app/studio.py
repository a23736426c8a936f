"""The model that the app has open, and what it draws; without Gradio, so that it can be tried alone."""

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

from sfumato.figures import open_image
from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.card import recommended_settings
from sfumato.pipelines.choices import with_guider, with_sampler
from sfumato.pipelines.explain import Explanation, Recorder, explain
from sfumato.pipelines.locate import locate_pipeline
from sfumato.pipelines.sample import write_image
from sfumato.registries import GUIDERS, SAMPLERS

MAX_IMAGES = 16
MAX_STEPS = 200


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A moment of drawing: the images that are done, as files, and what the network expects of the one under way."""

    done: list[str]
    expected: Image.Image | None
    command: str


class Studio:
    """One model, open.

    Args:
        model: what `sfumato sample --model` takes.

    Raises:
        ValueError: no such model, or one that draws no images from text.
    """

    def __init__(self, model: str):
        self.model = model
        folder = locate_pipeline(model)
        self.pipe = SfumatoPipeline.from_pretrained(folder)
        self.pipe.set_progress_bar_config(disable=True)
        if self.pipe.reads is not None or self.pipe.codec is not None or self.pipe.controlnet is not None:
            raise ValueError(f"{model}: the app draws images from text; this model does something else")
        self.advice = recommended_settings(folder)
        self.places = tempfile.TemporaryDirectory(prefix="sfumato-app-")
        self._busy = threading.Lock()
        self._under_way: set[threading.Event] = set()  # a drawing each; set, it ends
        self._count = 0

    def stop(self) -> None:
        """End the drawings under way after their step."""
        for event in list(self._under_way):
            event.set()

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
        **inputs: Any,
    ) -> Iterator[Drawing]:
        """Draw one image a line of `text`, image i with seed + i; says at every step how far it is.

        Raises:
            ValueError: nothing to draw, or settings that cannot be.
        """
        prompts = [line.strip() for line in text.splitlines() if line.strip()][:MAX_IMAGES]
        if not prompts:
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
        stop = threading.Event()
        self._under_way.add(stop)
        try:
            with self._busy:
                for number, prompt in enumerate(prompts):
                    for image in self._one(pipe, prompt, (seed + number) % 2**64, call, stop):
                        if isinstance(image, Image.Image):
                            yield Drawing(done=list(done), expected=image, command=command)
                        else:
                            done.append(self._keep(image[0], {**settings, "prompts": [prompt], "seed": seed + number}))
                    if stop.is_set():
                        break
                yield Drawing(done=list(done), expected=None, command=command)
        finally:
            self._under_way.discard(stop)

    def _one(
        self, pipe: SfumatoPipeline, prompt: str, seed: int, call: dict, stop: threading.Event
    ) -> Iterator[Image.Image | tuple[Image.Image]]:
        """What is expected at each step, and last the image, in a tuple; nothing more once it is to stop."""
        recorder = Recorder.of(pipe)
        moments: queue.Queue = queue.Queue()

        def tell(pipe, step, t, tensors):
            moments.put(_to_pil(recorder.expected[-1]))
            pipe._interrupt = stop.is_set()
            return tensors

        def work():
            try:
                generator = torch.Generator().manual_seed(seed)
                image = recorder(prompt, generator=generator, callback_on_step_end=tell, **call).images[0]
                moments.put((image,))
            except BaseException as error:  # noqa: BLE001  (raised again where it is waited for)
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
        finally:  # also where nobody looks any more
            if not ended:
                stop.set()
            thread.join()

    def _keep(self, image: Image.Image, settings: dict) -> str:
        self._count += 1
        path = Path(self.places.name) / f"{self._count:05d}-seed-{settings['seed']}.png"
        write_image(image, path, settings)
        return str(path)

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
        """Why an image looks as it does; with the steps and the scale of the model's card.

        Raises:
            ValueError: an empty prompt, or a model without cross-attention.
        """
        with self._busy:
            generator = torch.Generator().manual_seed(seed)
            return explain(self.pipe, prompt, ablate=ablate, generator=generator, **self.advice)


def enlarge(image: Image.Image, side: int = 320) -> Image.Image:
    """An image by whole multiples, at least `side` pixels wide where it is smaller."""
    scale = max(1, side // image.width)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def read_settings(path: str | None) -> dict[str, Any]:
    """The settings that `sfumato sample` and the app write into a PNG, those that are sound.

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
