"""What a run shows and keeps: progress bar, `metrics.jsonl`, sample grids."""

import json
import math
from pathlib import Path

from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from sfumato.pipelines import SfumatoPipeline
from sfumato.training.config import Config, dump
from sfumato.training.data import PictureSet
from sfumato.training.evaluation import draw_pictures, grid


def preview_prompts(config: Config, pictures: PictureSet) -> list[str]:
    """The configured prompts, else captions of up to twelve held-out pictures, else of training pictures."""
    if config.validation.prompts:
        return list(config.validation.prompts)
    chosen = pictures.select("held_out") or pictures.select("train")
    return [pictures.records[i]["captions"][0] for i in chosen[:: max(1, len(chosen) // 12)][:12]]


def _lines(path: Path) -> list[str]:
    """The whole lines of a file of JSON lines; none where there is no file."""
    return path.read_text().split("\n")[:-1] if path.is_file() else []


class Log:
    """`metrics.jsonl`, the progress bar and the sample grids; silent on all processes but the first."""

    def __init__(self, config: Config, accelerator: Accelerator, pictures: PictureSet, pipe: SfumatoPipeline, step: int):
        self.config, self.accelerator, self.pipe = config, accelerator, pipe
        self.main, self.folder = accelerator.is_main_process, Path(config.output_dir)
        self.prompts = preview_prompts(config, pictures)
        self.bar = tqdm(
            total=1.0,
            disable=not self.main,
            bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )
        if not self.main:
            return
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(dump(config))
        path = self.folder / "metrics.jsonl"
        # Lines past the checkpoint belong to steps that are about to be done again; a torn last line goes too.
        kept = path.with_name("metrics.jsonl.new")
        kept.write_text("".join(line + "\n" for line in _lines(path) if json.loads(line)["step"] <= step))
        kept.replace(path)
        self.file = open(path, "a", buffering=1)
        self.smooth = None

    def write(self, entry: dict) -> None:
        """One step's figures: a line of JSON (null for what is not finite) and the progress bar."""
        if not self.main:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        self.file.write(json.dumps(finite) + "\n")
        if finite["loss"] is not None:
            self.smooth = entry["loss"] if self.smooth is None else 0.98 * self.smooth + 0.02 * entry["loss"]
        self.bar.update(entry["done"] - self.bar.n)
        rate = entry["images_seen"] / max(entry["seconds"], 1e-9)
        self.bar.set_postfix_str(
            f"step {entry['step']} loss {self.smooth or math.nan:.4f} {rate:.0f} pictures/s", refresh=False
        )

    def preview(self, step: int) -> tuple[list[str], list[Image.Image]]:
        """Draw the fixed prompts with the fixed seeds; returns prompts and pictures."""
        pictures = draw_pictures(self.pipe, self.prompts, self.config.validation, self.accelerator)
        if self.main:
            grid(pictures, self.prompts).save(self.folder / "samples" / f"step-{step:08d}.png")
        return self.prompts, pictures

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.main:
            self.bar.write(text)

    def close(self, text: str) -> None:
        """End the progress bar with a last word."""
        self.bar.close()
        if self.main:
            self.file.close()
            print(text)
