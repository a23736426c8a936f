"""Parts of clips, sounds and molecules are given, and a model of text to clip, sound or molecule draws the rest.

    python -m benchmarks.tasks.completion clips=runs/clips sounds=runs/speech molecules=runs/molecules edits=runs/moving_emoji
        [out.json]

Clips: four frames of eight are given; mean squared error of the rest, pixels in [0, 1]. Sounds: a gap of 16 steps in the
middle; log-spectral distance within it, in dB. Both are compared with guesses that need no model. Molecules: the first five
atoms and the bonds between them are given; whether they are kept and whether the whole is a molecule. Each step is taken
three times (RePaint). Edits: held-out clips of moving emoji are redrawn with another emoji in the caption, which
may be a pair that was trained on.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.codecs.clips import track
from sfumato.training.config.load import load_config
from sfumato.training.data.array_set import to_unit
from sfumato.training.data.prepare import prepare

COUNT, STEPS, RESAMPLES = 36, 25, 3
FRAGMENT = 5  # atoms


def held_out(run: str) -> tuple[SfumatoPipeline, np.ndarray, list[str]]:
    """A run's model, and arrays and captions of held-out records."""
    pipe = SfumatoPipeline.from_pretrained(Path(run) / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    images = prepare(load_config(Path(run) / "config.yaml").data)
    chosen = images.select("held_out")
    chosen = [chosen[i * len(chosen) // COUNT] for i in range(COUNT)]
    return pipe, np.stack([to_unit(images.image(i)) for i in chosen]), [images[i]["captions"][0] for i in chosen]


def draw(pipe: SfumatoPipeline, arrays: np.ndarray, captions: list[str], mask: np.ndarray) -> np.ndarray:
    """Redraw the masked part of each array."""
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


def molecules(run: str) -> dict[str, float]:
    """Shares of valid molecules in one piece, of fragments kept, and of formulas and captions that are correct."""
    pipe, arrays, captions = held_out(run)
    codec = pipe.codec
    mask = np.ones(codec.side**2, np.float32)
    mask[:FRAGMENT] = 0  # each atom says what it is and which bonds it has to earlier ones
    mask = mask.reshape(codec.side, codec.side).repeat(codec.repeat, axis=0).repeat(codec.repeat, axis=1)
    things = [codec.decode(array) for array in draw(pipe, arrays, captions, mask)]
    judged = [codec.judge(thing, caption) for thing, caption in zip(things, captions)]
    kept = [fragment(thing) == fragment(codec.decode(array)) for thing, array in zip(things, arrays)]
    return {"fragment kept": float(np.mean(kept)), **shares(judged)}


def fragment(thing: dict) -> tuple:
    """The first atoms of a molecule and the bonds between them."""
    bonds = {(*sorted(bond[:2]), bond[2]) for bond in thing["bonds"] if max(bond[:2]) < FRAGMENT}
    return thing["elements"][:FRAGMENT], thing["charges"][:FRAGMENT], bonds


def edits(run: str) -> dict[str, dict[str, float]]:
    """Redraw held-out clips with another thing in the caption (SDEdit), by strength: whether thing, direction and speed are
    those of the new caption, and how far the thing is from where it was in each frame, in sides of the image.
    """
    pipe, arrays, captions = held_out(run)
    codec, names = pipe.codec, list(pipe.codec.pictures)
    wanted = []
    for number, caption in enumerate(captions):
        old = max((name for name in names if caption.split(" ", 1)[1].startswith(f"{name} ")), key=len)
        new = names[(names.index(old) + 1 + number % (len(names) - 1)) % len(names)]
        wanted.append(f"{'an' if new[0] in 'aeiou' else 'a'} {new}{caption.split(' ', 1)[1][len(old) :]}")
    before, rows = [track(codec.decode(array)) for array in arrays], {}
    for strength in (0.5, 0.7, 0.8, 0.9):
        call = {"num_inference_steps": STEPS, "guidance_scale": 1.5, "strength": strength, "output_type": "decoded"}
        drawn = [
            pipe(caption, image=[array], generator=torch.Generator().manual_seed(i), **call).images[0]
            for i, (caption, array) in enumerate(zip(wanted, arrays))
        ]
        judged = [codec.judge(thing, caption) for thing, caption in zip(drawn, wanted)]
        away = [np.linalg.norm(track(thing) - path, axis=1).mean() for thing, path in zip(drawn, before)]
        empty = float(np.mean(np.isnan(away)))
        rows[f"strength {strength}"] = {**shares(judged), "away": float(np.nanmean(away)), "with an empty frame": empty}
    return rows


def shares(judged: list[dict[str, bool]]) -> dict[str, float]:
    """For each thing that is judged, the share that is correct."""
    return {name: float(np.mean([each[name] for each in judged])) for name in judged[0]}


def rms(values: np.ndarray) -> float:
    """Root mean square over bands, mean over steps."""
    return float(np.sqrt(np.square(values).mean(0)).mean())


def main() -> None:
    """See the module."""
    runs = dict(item.split("=", 1) for item in sys.argv[1:] if "=" in item)
    measures = {"clips": clips, "sounds": sounds, "molecules": molecules, "edits": edits}
    found = {kind: measures[kind](run) for kind, run in runs.items()}
    text = json.dumps({"drawn": COUNT, "steps": STEPS, "resamples": RESAMPLES, **found}, indent=1)
    print(text)
    for out in (item for item in sys.argv[1:] if item.endswith(".json")):
        Path(out).write_text(text + "\n")


if __name__ == "__main__":
    main()
