"""Emoji at 64 pixels: a cascade of 32 and then 64 against one model of 64 pixels, each trained for the same minutes.

    accelerate launch training/train.py configs/demo.yaml                # 12 minutes
    accelerate launch training/train.py configs/openmoji_upscaler.yaml   # 12 minutes
    sfumato export runs/demo runs/cascade --upscaler runs/openmoji_upscaler
    accelerate launch training/train.py configs/openmoji_direct.yaml     # 24 minutes
    python -m benchmarks.tasks.cascade [--out benchmarks/results/cascade.json]

The first model of the cascade trains in float32, which costs it images; the second one trains on all emoji, not only
on those of the captions.

FD: Fréchet distance between the features of drawn and true images, for the captions that the text-to-image models were trained
on. LD: mean distance of the features to those of the caption's own image. Held out: LD of captions never seen.
Also draws twelve prompts with each, the cascade on top.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from sfumato.figures import grid
from sfumato.pipelines import Cascade, SfumatoPipeline
from sfumato.pipelines.batches import draw_in_batches
from sfumato.pipelines.card import recommended_settings
from sfumato.training.config.load import load_config
from sfumato.training.data.prepare import prepare
from sfumato.training.quality.distances import frechet_distance
from sfumato.training.quality.features import compute_features


def main() -> None:
    """Run the benchmark; see above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cascade", default="runs/cascade")
    parser.add_argument("--direct", default="runs/openmoji_direct/pipeline")
    parser.add_argument("--out", default="benchmarks/results/cascade.json")
    options = parser.parse_args()
    config = load_config("configs/openmoji_direct.yaml")
    images = prepare(config.data)
    numbers = np.concatenate([images.select(split) for split in ("train", "held_out", "held_out_combination")])
    trained = np.isin(numbers, images.select("train"))
    captions = [images[int(i)]["captions"][0] for i in numbers]
    true = np.stack([images.image(int(i)) for i in numbers])
    cascade, direct = Cascade.from_pretrained(options.cascade), SfumatoPipeline.from_pretrained(options.direct)
    seen, table, sheets = compute_features(true), {}, []
    for name, pipe, folder in (("cascade", cascade, options.cascade), ("direct", direct, options.direct)):
        advice, began = recommended_settings(folder), time.time()
        drawn = draw_in_batches(pipe, captions, batch_size=16, **advice)
        seconds = time.time() - began
        made = compute_features(np.stack([np.asarray(image) for image in drawn]))
        apart = np.linalg.norm(made - seen, axis=1)
        table[name] = {
            "FD": frechet_distance(seen[trained], made[trained]),
            "LD": float(apart[trained].mean()),
            "LD held out": float(apart[~trained].mean()),
            "seconds to draw": round(seconds),
        }
        print(name, table[name], flush=True)
        sheets += draw_in_batches(pipe, list(config.validation.prompts), batch_size=16, **advice)
    table["pictures"] = {"trained": int(trained.sum()), "held out": int((~trained).sum())}
    Path(options.out).write_text(json.dumps(table, indent=1) + "\n")
    grid(sheets, list(config.validation.prompts) * 2).save(Path(options.out).with_suffix(".png"))


if __name__ == "__main__":
    main()
