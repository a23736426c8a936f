"""A model that stays open and warm, for drawing while somebody types."""

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
    """Draws one picture a prompt by a model that is opened once. The same prompt and seed give the same picture.

    Args:
        model: an exported folder, a run folder, or a Hub id.
        runtime: see `runtimes.with_runtime`; `onnx` is the fastest on a CPU and is kept on disk between processes.
        num_inference_steps, guidance_scale: None: as the card says.

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
        """One picture; `call` as of the pipeline."""
        generator = torch.Generator().manual_seed(seed)
        return self.pipe(prompt, generator=generator, **{**self.settings, **call}).images[0]

    def follow(self, prompts: Iterable[str], seed: int = 0) -> Iterator[tuple[str, Image.Image]]:
        """Prompts as they come, such as a text while it is typed, and their pictures; whatever came while one was drawn is
        passed over but for the last. `prompts` is read in a thread of its own, since it may wait for keys.
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
