"""Inpainting: redraw a figure of a true image of `shapes` as another, by blending, RePaint, and a model trained for it.

    python -m benchmarks.tasks.inpainting [--model runs/two_shapes/pipeline] [--trained runs/two_shapes_inpainting/pipeline]
        [--figures 2] [--images 64] [--out benchmarks/results/inpainting_two.json]
    python -m benchmarks.tasks.inpainting --model runs/shapes/pipeline --figures 1 --out benchmarks/results/inpainting.json

With one figure the mask is a disc around it, and the caption asks for the same place, size and ground, and another colour and
shape; with two it is the quarter of one of them, and the caption asks for another colour and shape next to what is kept.
Obedience (`all`): share of results in which a program reads everything correctly. Seam: mean jump of a colour value (0 to 255)
across the mask's edge, where the true image has none. Distance: root mean square difference inside the mask to the nearest
of 64 true images of the new caption, pixels in [0, 1]. FD: Fréchet distance, in the features of an ImageNet network,
between the inside of the mask and the same part of true images that show there what the new caption asks for.
30 steps of the model's own sampler, guidance 1.5.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import torch

from sfumato.pipelines import SfumatoPipeline
from sfumato.training.data.sources import shapes
from sfumato.training.quality.distances import frechet_distance
from sfumato.training.quality.features import compute_features
from sfumato.training.quality.obedience import read_quarters, shapes_obedience


def main() -> None:
    """Run the benchmark; see above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/two_shapes/pipeline")
    parser.add_argument("--trained", help="a model of task=inpainting, for the same images")
    parser.add_argument("--figures", type=int, default=2)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--out", default="benchmarks/results/inpainting_two.json")
    options = parser.parse_args()
    pipes = {"": SfumatoPipeline.from_pretrained(options.model)}
    if options.trained:
        pipes["trained"] = SfumatoPipeline.from_pretrained(options.trained)
    size, rng = pipes[""].unet.config.sample_size, np.random.default_rng(0)
    scenes = shapes.scenes(held_out=True, count=options.images, num_figures=options.figures)
    truth = [shapes.draw(scene, size, rng) for scene in scenes]
    axis = (np.arange(size) + 0.5) / size
    masks, wanted = [], []
    for i, (scene, true) in enumerate(zip(scenes, truth)):
        old = scene.figures[0] if options.figures == 2 else (scene.colour, scene.shape)
        kept = scene.figures[1] if options.figures == 2 else old
        colours = [name for name in shapes.COLOURS if name not in (old[0], kept[0])]
        kinds = [name for name in shapes.SHAPES if name not in (old[1], kept[1])]
        new = (colours[i % len(colours)], kinds[i % len(kinds)])
        if options.figures == 2:
            at, mask = read_quarters(true)[0].index(old), np.zeros((size, size), bool)
            mask[at // 2 * size // 2 :, at % 2 * size // 2 :][: size // 2, : size // 2] = True
            wanted.append(dataclasses.replace(scene, figures=(new, kept)))
        else:
            x, y = shapes.PLACES[scene.place]
            mask = (axis[None] - x) ** 2 + (axis[:, None] - y) ** 2 < 0.38**2
            wanted.append(dataclasses.replace(scene, colour=new[0], shape=new[1]))
        masks.append(mask)

    def seam(image: np.ndarray, mask: np.ndarray) -> float:
        values, jumps = image.astype(float), []
        for axis in (0, 1):
            edge = np.diff(mask, axis=axis)
            jumps.append(np.abs(np.diff(values, axis=axis))[edge].mean())
        return float(np.mean(jumps))

    def distance(image: np.ndarray, mask: np.ndarray, scene, number: int) -> float:
        draws = np.random.default_rng(number)
        others = np.stack([shapes.draw(scene, size, draws) for _ in range(64)])
        return float(np.sqrt(np.square((others[:, mask] / 255.0) - image[mask] / 255.0).mean((1, 2)).min()))

    def inside(images: list[np.ndarray], of: list[np.ndarray]) -> np.ndarray:
        """Features of the box around each mask."""
        spans = [[slice(np.flatnonzero(m.any(k))[0], np.flatnonzero(m.any(k))[-1] + 1) for k in (1, 0)] for m in of]
        return np.concatenate([compute_features(image[None, rows, columns]) for image, (rows, columns) in zip(images, spans)])

    def right_there(scene, mask: np.ndarray, number: int, count: int = 4) -> list[np.ndarray]:
        """True images of a caption; with two figures, those whose first one is in the mask."""
        draws, found = np.random.default_rng(number), []
        while len(found) < count:
            original = shapes.draw(scene, size, draws)
            quarters = [mask[y : y + size // 2, x : x + size // 2].all() for y in (0, size // 2) for x in (0, size // 2)]
            if options.figures == 1 or read_quarters(original)[0][quarters.index(True)] == scene.figures[0]:
                found.append(original)
        return found

    pairs = [
        (original, mask) for i, (scene, mask) in enumerate(zip(wanted, masks)) for original in right_there(scene, mask, i)
    ]
    expected = inside(*map(list, zip(*pairs)))
    table = {}
    ways = {"blending": ("", 1), "RePaint, 5 times each step": ("", 5), "RePaint, 10 times each step": ("", 10)}
    for name, (which, resamples) in {**ways, **({"trained": ("trained", 1)} if options.trained else {})}.items():
        pipe, start = pipes[which], time.perf_counter()
        pipe.set_progress_bar_config(disable=True)
        images = pipe(
            [s.caption for s in wanted], image=truth, mask_image=masks, num_inference_steps=30, guidance_scale=1.5,
            num_resamples=resamples,
            generator=[torch.Generator().manual_seed(i) for i in range(len(wanted))], output_type="np",
        ).images  # fmt: skip
        images = [np.uint8(np.round(image * 255)) for image in images]
        kept = all((image == true)[~mask].all() for image, true, mask in zip(images, truth, masks))
        table[name] = {
            **shapes_obedience(images, wanted),
            "seam": float(np.mean([seam(i, m) for i, m in zip(images, masks)])),
            "distance": float(np.mean([distance(*given) for given in zip(images, masks, wanted, range(len(images)))])),
            "FD": frechet_distance(inside(images, masks), expected),
            "kept_exactly": kept,
            "seconds": time.perf_counter() - start,
        }
        print(name, table[name], flush=True)
    table["the true pictures"] = {"seam": float(np.mean([seam(i, m) for i, m in zip(truth, masks)]))}
    Path(options.out).write_text(
        json.dumps({"pictures": len(wanted), "figures": options.figures, "table": table}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
