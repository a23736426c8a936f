"""A model that stays loaded and warm, for drawing while somebody types."""

from collections.abc import Iterable, Iterator
from queue import Queue
from threading import Thread
from typing import Any

import torch
from PIL import Image

from sfumato.pipelines.card import recommended_settings
from sfumato.pipelines.locate import DEFAULT, locate_pipeline
from sfumato.pipelines.pipeline_sfumato import SfumatoPipeline
from sfumato.pipelines.runtimes import with_runtime


class Drawer:
    """Draws one image per prompt with a model that is loaded once. The same prompt and seed give the same image.

    Args:
        model: an exported folder, a run folder, or a Hub id.
        runtime: see `runtimes.with_runtime`; `onnx` is the fastest on a CPU, and its engine is kept on disk.
        num_inference_steps, guidance_scale: if None, the values that the model card recommends.

    Raises:
        ValueError: no such model or runtime.
    """

    def __init__(
        self,
        model: str = DEFAULT,
        *,
        runtime: str = "onnx",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ):
        folder = locate_pipeline(model)
        advice = recommended_settings(folder)
        given = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        self.settings = {name: advice[name] if value is None else value for name, value in given.items()}
        self.pipe = with_runtime(SfumatoPipeline.from_pretrained(folder), runtime)
        self.pipe.set_progress_bar_config(disable=True)
        self.draw("")  # builds the engine

    def draw(self, prompt: str, seed: int = 0, **call: Any) -> Image.Image:
        """Draw one image; `call` holds further arguments of the pipeline's call."""
        generator = torch.Generator().manual_seed(seed)
        return self.pipe(prompt, generator=generator, **{**self.settings, **call}).images[0]

    def follow(self, prompts: Iterable[str], seed: int = 0) -> Iterator[tuple[str, Image.Image]]:
        """Yield prompts as they arrive, such as a text while it is typed, with their images. Of the prompts that arrive while
        an image is drawn, only the last is used. `prompts` is read in its own thread, since it may wait for key presses.
        """
        waiting: Queue = Queue()
        end = object()

        def read() -> None:
            try:
                for prompt in prompts:
                    waiting.put(prompt)
            finally:
                waiting.put(end)

        Thread(target=read, daemon=True).start()
        arrived: Any = waiting.get()
        while arrived is not end:
            newest = arrived
            while not waiting.empty() and (arrived := waiting.get()) is not end:
                newest = arrived
            yield newest, self.draw(newest, seed)
            if arrived is not end:
                arrived = waiting.get()
