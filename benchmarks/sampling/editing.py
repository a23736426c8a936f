"""Editing true images of `shapes` with two figures: SDEdit against DDIM inversion, by strength.

    python -m benchmarks.sampling.editing [--model runs/two_shapes/pipeline] [--images 32]
        [--out benchmarks/results/editing.json]

The new caption gives one figure another colour. Right: share of results that show the new caption. In place: share in which,
moreover, both figures are in the quarters they were in. Unchanged: root mean square difference from the image in the other
three quarters, pixels in [0, 1]. 50 steps of DDIM, guidance 1.5. Also draws a grid of six.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sfumato.figures import grid
from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.choices import with_sampler
from sfumato.pipelines.edit import edit
from sfumato.training.data.sources import shapes
from sfumato.training.quality.obedience import read_quarters


def main() -> None:
    """Run the benchmark; see above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="runs/two_shapes/pipeline")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--out", default="benchmarks/results/editing.json")
    options = parser.parse_args()
    pipe = with_sampler(SfumatoPipeline.from_pretrained(options.model), "ddim")
    pipe.set_progress_bar_config(disable=True)
    size, rng = pipe.unet.config.sample_size, np.random.default_rng(0)
    scenes = shapes.scenes(held_out=True, count=options.images, num_figures=2)
    truth = [shapes.draw(scene, size, rng) for scene in scenes]
    wanted = []
    for i, scene in enumerate(scenes):
        (colour, shape), other = scene.figures
        free = [name for name in shapes.COLOURS if name not in (colour, other[0])]
        wanted.append(dataclasses.replace(scene, figures=((free[i % len(free)], shape), other)))

    def judge(images):
        right = in_place = 0
        changes = []
        for image, true, old, new in zip(images, truth, scenes, wanted):
            (before, _), (after, ground) = read_quarters(true), read_quarters(image)
            shown = sorted(f for f in after if f) == sorted(new.figures) and ground == new.ground
            right += shown
            expected = [new.figures[0] if figure == old.figures[0] else figure for figure in before]
            in_place += shown and after == expected
            half, at = size // 2, before.index(old.figures[0])
            rest = np.ones((size, size), bool)
            rest[at // 2 * half :, at % 2 * half :][:half, :half] = False
            changes.append(np.square(image[rest] / 255 - true[rest] / 255).mean() ** 0.5)
        return {"right": right / len(images), "in place": in_place / len(images), "unchanged": float(np.mean(changes))}

    def sdedit(original, source, prompt, number, **call):
        return pipe(prompt, image=original, generator=torch.Generator().manual_seed(number), **call)

    def inversion(original, source, prompt, number, **call):
        return edit(pipe, original, source, prompt, **call)

    table, shown = {}, {}
    for name, method in (("SDEdit", sdedit), ("inversion", inversion)):
        for strength in (0.3, 0.4, 0.5, 0.6, 0.8):
            images = [
                np.asarray(
                    method(
                        original, old.caption, new.caption, i, strength=strength, num_inference_steps=50, guidance_scale=1.5
                    ).images[0]
                )
                for i, (original, old, new) in enumerate(zip(truth, scenes, wanted))
            ]
            table.setdefault(name, {})[strength] = judge(images)
            shown[name, strength] = images
            print(name, strength, table[name][strength], flush=True)
    Path(options.out).write_text(json.dumps({"pictures": len(truth), "table": table}, indent=1) + "\n")
    best = {name: max(rows, key=lambda s: rows[s]["in place"]) for name, rows in table.items()}
    originals, captions = [], []
    for images, words in (
        (truth, [scene.caption for scene in scenes]),
        *((shown[name, best[name]], [f"{name} {best[name]}: {scene.caption}" for scene in wanted]) for name in table),
    ):
        originals += [Image.fromarray(image) for image in images[:6]]
        captions += words[:6]
    grid(originals, captions).save(Path(options.out).with_suffix(".png"))


if __name__ == "__main__":
    main()
