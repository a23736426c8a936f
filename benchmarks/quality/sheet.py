"""Forty-eight prompts next to the true images, half of them held out, chosen by a seed and not by hand.

    python -m benchmarks.quality.sheet [--model openmoji_128] [--config openmoji_128] [--seed 0] [--out FILE.png]

A row of true images, then the row of what the model draws from their captions; every third one from its Chinese caption, if
there is one. The held-out ones are a third each single images, combinations of profession, skin tone and gender, and pairs of
colour and thing.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from sfumato.figures import grid, to_pil
from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.card import recommended_settings
from sfumato.pipelines.locate import locate_pipeline
from sfumato.training.config.load import load_config
from sfumato.training.data.prepare import prepare
from sfumato.training.data.sources.openmoji import chinese_caption, is_combination
from sfumato.training.quality.evaluation import Evaluation, Plan

SPLITS = {"train": 24, "held_out": 8, "held_out_combination": 8, "held_out_pair": 8}
COLUMNS = 8


def main() -> None:
    """Draw the sheet; see above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="openmoji_128")
    parser.add_argument("--config", default="openmoji_128")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="benchmarks/results/openmoji_128_sheet.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(options.config)
    images = prepare(config.data)
    folder = locate_pipeline(options.model)
    pipe = SfumatoPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    evaluation = Evaluation(pipe, config, images, Accelerator(cpu=True), Plan())
    rng = np.random.default_rng(options.seed)
    chosen = []
    for split, count in SPLITS.items():
        numbers = images.select("train") if split == "train" else evaluation.unseen(split)
        if split == "held_out_combination":
            numbers = [i for i in numbers if is_combination(evaluation.caption(i))]
        chosen += [int(i) for i in rng.choice(numbers, count, replace=False)]
    captions = []
    for place, i in enumerate(chosen):
        own = images[i]["captions"]
        captions.append((place % 3 == 2 and chinese_caption(own)) or own[0])
    advice = recommended_settings(folder)
    generators = [torch.Generator().manual_seed(options.seed + k) for k in range(len(chosen))]
    drawn = pipe(captions, generator=generators, **advice).images
    cells, titles = [], []
    for start in range(0, len(chosen), COLUMNS):
        row = range(start, start + COLUMNS)
        cells += [to_pil(images.image(chosen[k])) for k in row] + [drawn[k] for k in row]
        titles += [captions[k] for k in row] + ["trained" if k < SPLITS["train"] else "held out" for k in row]
    grid(cells, titles, columns=COLUMNS, min_side=drawn[0].width).save(Path(options.out))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
