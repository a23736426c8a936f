"""Compositions that a model draws for held-out captions, by smact's rules, compared with true ones and with chance.

    python -m benchmarks.quality.compositions --model runs/compositions [--count 300] [--out FILE.json]

Chance: each true held-out composition with its elements replaced by others, drawn as often as they occur in the data.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.batches import draw_in_batches
from sfumato.pipelines.card import recommended_settings
from sfumato.pipelines.codecs import open_codec
from sfumato.pipelines.locate import locate_pipeline
from sfumato.training.config.load import load_config
from sfumato.training.data.prepare import prepare
from sfumato.training.quality.drawing import sample_indices


def main() -> None:
    """Run the benchmark; see above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="runs/compositions")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--out", default="benchmarks/results/compositions.json")
    options = parser.parse_args()
    images = prepare(load_config("compositions").data)
    codec, rng = open_codec(images.codec), np.random.default_rng(0)

    def read(i):
        return codec.decode(images.image(int(i)) / 255)

    elements = [symbol for i in images.select("train")[::10] for symbol in read(i)]
    numbers = sample_indices(images, options.count)
    true = [read(i) for i in numbers]
    chance = []
    for thing in true:
        others: dict[str, int] = {}
        while len(others) < len(thing):
            others.setdefault(str(rng.choice(elements)), list(thing.values())[len(others)])
        chance.append(others)
    folder = locate_pipeline(options.model)
    pipe, advice = SfumatoPipeline.from_pretrained(folder), recommended_settings(folder)
    captions = [images[i]["captions"][0] for i in numbers]
    drawn = draw_in_batches(pipe, captions, batch_size=64, output_type="decoded", **advice)
    table = {
        name: {key: float(np.mean([codec.judge(thing, text)[key] for thing, text in zip(things, captions)])) for key in keys}
        for name, things, keys in (
            ("drawn", drawn, ("valid", "all")),
            ("true", true, ("valid", "all")),
            ("chance", chance, ("valid",)),
        )
    }
    known = {tuple(sorted(read(i).items())) for i in images.select("train")}
    table["drawn"]["in the training data"] = float(np.mean([tuple(sorted(thing.items())) in known for thing in drawn]))
    print(json.dumps(table, indent=1))
    Path(options.out).write_text(json.dumps({"count": len(captions), **table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
