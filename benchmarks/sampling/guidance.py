"""Guiders and scales: obedience to the caption against diversity, on `shapes` (two figures) and `openmoji`.

    C=runs/two_shapes/checkpoints; python -m benchmarks.sampling.guidance --model $C/step-00001000 --weak $C/step-00000500
    python -m benchmarks.sampling.guidance --model runs/demo/pipeline --data openmoji
        --out benchmarks/results/guidance_openmoji.json

Four images of each caption, with dpm++ in 15 steps, the same noise for every guider. Diversity: root mean square difference
between images of the same caption, pixels in [0, 1]. Obedience on shapes: share of held-out captions for which a program
reads everything off the image. On openmoji: share of images whose nearest training image (root mean square over pixels)
has their caption. Writes a chart beside the figures.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np

from benchmarks.common.chart import lines
from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.batches import draw_in_batches
from sfumato.pipelines.choices import with_guider, with_sampler
from sfumato.pipelines.locate import locate_pipeline
from sfumato.registries import GUIDERS
from sfumato.training.config.load import load_config
from sfumato.training.data import prepare as prepared
from sfumato.training.data.sources import shapes
from sfumato.training.quality.obedience import shapes_obedience

SECOND = {name: guider.second for name, guider in GUIDERS.items() if guider.second}


def main() -> None:
    """Run the benchmark; see above."""
    SCALES = (1.0, 1.5, 2.5, 4.0, 7.0)
    COPIES, STEPS = 4, 15

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--weak", help="an earlier checkpoint, for autoguidance")
    parser.add_argument("--data", default="shapes", choices=["shapes", "openmoji"])
    parser.add_argument("--config", default="configs/demo.yaml", help="for openmoji: the config that it was trained with")
    parser.add_argument("--captions", type=int, default=32)
    parser.add_argument("--out", default="benchmarks/results/guidance.json")
    options = parser.parse_args()

    def opened(source):
        return SfumatoPipeline.from_pretrained(locate_pipeline(source))

    def judge():
        """The captions, and a function from images `(N, H, W, 3)` and their captions' numbers to obedience."""
        if options.data == "shapes":
            scenes = shapes.scenes(held_out=True, count=options.captions, num_figures=2)

            def obeyed(images, numbers):
                return shapes_obedience([np.uint8(np.round(image * 255)) for image in images], [scenes[i] for i in numbers])[
                    "all"
                ]

            return [scene.caption for scene in scenes], obeyed
        data = prepared.prepare(load_config(options.config).data)
        known = data.select("train")
        table = np.stack([data.image(int(i)) for i in known]).reshape(len(known), -1) / 255
        titles = [data[int(i)]["captions"][0] for i in known]
        chosen = list(dict.fromkeys(titles))
        chosen = chosen[:: max(1, len(chosen) // options.captions)][: options.captions]

        def obeyed(images, numbers):
            nearest = [np.square(table - image.reshape(-1)).mean(-1).argmin() for image in images]
            return float(np.mean([titles[at] == chosen[i] for at, i in zip(nearest, numbers)]))

        return chosen, obeyed

    pipe = with_sampler(opened(options.model), "dpm++")
    captions, obeyed = judge()
    numbers = [i for i in range(len(captions)) for _ in range(COPIES)]
    pairs = list(itertools.combinations(range(COPIES), 2))
    guiders = {name: {} for name in ("cfg", "apg", "zero-star", "tangential", "magnitude-aware", *SECOND)}
    guiders |= {"cfg, rescale 0.7": {"guidance_rescale": 0.7}, "cfg, steps 20 to 80%": {"start": 0.2, "stop": 0.8}}
    if options.weak:
        guiders["autoguidance"] = {"weak": opened(options.weak)}
    table = {}
    for name, settings in guiders.items():
        table[name] = []
        for scale in SCALES:
            kind, given = name.split(",")[0], {**settings, "guidance_scale": scale}
            if kind in SECOND:  # in addition to plain guidance
                given |= {"guidance_scale": 1.5, f"{SECOND[kind]}_scale": scale - 1}
            chosen, prompts = with_guider(pipe, kind, **given), [captions[number] for number in numbers]
            call = {"num_inference_steps": STEPS, "output_type": "np"}
            images = np.stack(draw_in_batches(chosen, prompts, batch_size=64, **call))
            grouped = images.reshape(len(captions), COPIES, -1)
            spread = np.mean([np.sqrt(np.square(grouped[:, a] - grouped[:, b]).mean(-1)) for a, b in pairs])
            row = {
                "scale": scale,
                "obedience": obeyed(images, numbers),
                "diversity": float(spread),
                "passes": chosen.num_passes,
            }
            table[name].append(row)
            print(name, {k: round(v, 3) for k, v in row.items()}, flush=True)
    out = Path(options.out)
    content = {
        "model": options.model,
        "weak": options.weak,
        "captions": len(captions),
        "pictures": len(numbers),
        "steps": STEPS,
    }
    out.write_text(json.dumps({**content, "table": table}, indent=1) + "\n")
    lines(
        {name: [(row["diversity"], row["obedience"]) for row in rows] for name, rows in table.items()},
        "diversity: difference between images of one caption",
        "obedience: images that show their caption",
        out.with_suffix(".png"),
        notes={name: [f"{row['scale']:g}" for row in rows] for name, rows in table.items()},
    )


if __name__ == "__main__":
    main()
