"""Where `explain` says that a word was read, against where the thing is: held-out captions with two figures.

    python -m benchmarks.sampling.heatmaps [--model runs/two_shapes/pipeline] [--captions 64]
        [--out benchmarks/results/heatmaps.json]

Only images that show both figures of their caption, each in its own quarter, are counted. A word lands on the right object
if its heat is greater on the quarter with its figure than on the quarter with the other. Chance is 50%. Also draws a figure.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.card import recommended_settings
from sfumato.pipelines.explain import explain
from sfumato.training.data.sources import shapes
from sfumato.training.quality.obedience import read_quarters


def main() -> None:
    """Run the benchmark; see above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="runs/two_shapes/pipeline")
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--out", default="benchmarks/results/heatmaps.json")
    options = parser.parse_args()

    pipe = SfumatoPipeline.from_pretrained(options.model)
    pipe.set_progress_bar_config(disable=True)
    call, landed, hottest, right = (
        recommended_settings(options.model),
        {"colour": [], "shape": []},
        {"colour": [], "shape": []},
        0,
    )
    scenes = shapes.scenes(held_out=True, count=options.captions, num_figures=2)
    for number, scene in enumerate(scenes):
        shown = explain(pipe, scene.caption, generator=torch.Generator().manual_seed(number), **call)
        quarters, ground = read_quarters(np.asarray(shown.image))
        if sorted(figure for figure in quarters if figure) != sorted(scene.figures):
            continue
        right += 1
        half = shown.image.height // 2
        for figure, other in (scene.figures, scene.figures[::-1]):
            for kind, word in zip(("colour", "shape"), figure):
                heat = shown.heat[shown.words.index(word)].reshape(2, half, 2, half).mean((1, 3)).ravel()
                own = quarters.index(figure)
                landed[kind].append(bool(heat[own] > heat[quarters.index(other)]))
                hottest[kind].append(bool(heat.argmax() == own))
        if right == 1:
            shown.figure().save(Path(options.out).with_suffix(".png"))
    result = {
        "model": Path(options.model).parent.name,
        "captions": len(scenes),
        "with both figures": right,
        "words on the right object": {kind: float(np.mean(hits)) for kind, hits in landed.items()},
        "words on the right object, all": float(np.mean([hit for hits in landed.values() for hit in hits])),
        "words with the right quarter hottest of four": {kind: float(np.mean(hits)) for kind, hits in hottest.items()},
    }
    print(json.dumps(result, indent=1))
    Path(options.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
