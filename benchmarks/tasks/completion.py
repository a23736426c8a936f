"""Parts of clips and sounds given, the rest drawn by a model of text to clip or sound; beside what needs no model.

    python -m benchmarks.tasks.completion clips=runs/clips sounds=runs/speech [out.json]

Clips: four frames of eight are given; the error of the rest, mean squared, pixels in [0, 1]. Sounds: a gap of 16 steps in the
middle; the log-spectral distance within it, in dB. Held-out captions; each step taken three times (RePaint).
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from sfumato.pipelines import SfumatoPipeline
from sfumato.training.config.load import load_config
from sfumato.training.data.array_set import to_unit
from sfumato.training.data.prepare import prepare

COUNT, STEPS, RESAMPLES = 36, 25, 3


def held_out(run: str) -> tuple[SfumatoPipeline, np.ndarray, list[str]]:
    """A run's model, and arrays and captions of held-out records."""
    pipe = SfumatoPipeline.from_pretrained(Path(run) / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    images = prepare(load_config(Path(run) / "config.yaml").data)
    chosen = images.select("held_out")
    chosen = [chosen[i * len(chosen) // COUNT] for i in range(COUNT)]
    return pipe, np.stack([to_unit(images.image(i)) for i in chosen]), [images[i]["captions"][0] for i in chosen]


def draw(pipe: SfumatoPipeline, arrays: np.ndarray, captions: list[str], mask: np.ndarray) -> np.ndarray:
    """The masked part of each array drawn anew."""
    call = {"num_inference_steps": STEPS, "num_resamples": RESAMPLES, "guidance_scale": 1.0, "output_type": "np"}
    drawn = [
        pipe(
            captions[i : i + 16],
            image=list(arrays[i : i + 16]),
            mask_image=mask,
            generator=torch.Generator().manual_seed(i),
            **call,
        )
        for i in range(0, len(captions), 16)
    ]
    return np.concatenate([each.images for each in drawn])


def clips(run: str) -> dict[str, float]:
    """Mean squared error of the second four frames."""
    pipe, arrays, captions = held_out(run)
    half = arrays.shape[-1] // 2
    mask = np.zeros(arrays.shape[1:], np.float32)
    mask[..., half:] = 1
    last, before = arrays[..., half - 3 : half], arrays[..., half - 6 : half - 3]
    line = np.concatenate([last + k * (last - before) for k in range(1, half // 3 + 1)], -1).clip(0, 1)
    drawn = draw(pipe, arrays, captions, mask)
    guesses = {"model": drawn[..., half:], "last frame": np.tile(last, half // 3), "line": line}
    guesses["model without words"] = draw(pipe, arrays, [""] * len(captions), mask)[..., half:]
    errors = {name: float(np.square(guess - arrays[..., half:]).mean()) for name, guess in guesses.items()}
    judged = [pipe.codec.judge(pipe.codec.decode(a), c) for a, c in zip(drawn, captions)]
    return {**errors, "motion right": float(np.mean([each["motion"] for each in judged]))}


def sounds(run: str) -> dict[str, float]:
    """Log-spectral distance in the gap."""
    pipe, arrays, captions = held_out(run)
    codec = pipe.codec
    width = codec.block[1]
    start, end = codec.steps // 4 // width * width, codec.steps // 2 // width * width
    mask = np.zeros(arrays.shape[1:3], np.float32)
    mask[:, start // width : end // width] = 1
    true = np.stack([codec.levels(array) for array in arrays])
    filled = np.stack([codec.levels(array) for array in draw(pipe, arrays, captions, mask)])
    share = (np.arange(end - start) + 1) / (end - start + 1)
    line = true[..., start - 1, None] * (1 - share) + true[..., end, None] * share
    repeated = true[..., start - (end - start) : start]
    guesses = {"model": filled[..., start:end], "silence": 0 * line, "repetition": repeated, "line": line}
    decibels = 20 * (codec.loud - codec.quiet)
    gap = true[..., start:end]
    return {name: float(np.mean([rms(decibels * (g - t)) for g, t in zip(guess, gap)])) for name, guess in guesses.items()}


def rms(values: np.ndarray) -> float:
    """Root mean square over bands, mean over steps."""
    return float(np.sqrt(np.square(values).mean(0)).mean())


def main() -> None:
    """See the module."""
    runs = dict(item.split("=", 1) for item in sys.argv[1:] if "=" in item)
    found = {kind: {"clips": clips, "sounds": sounds}[kind](run) for kind, run in runs.items()}
    text = json.dumps({"drawn": COUNT, "steps": STEPS, "resamples": RESAMPLES, **found}, indent=1)
    print(text)
    for out in (item for item in sys.argv[1:] if item.endswith(".json")):
        Path(out).write_text(text + "\n")


if __name__ == "__main__":
    main()
