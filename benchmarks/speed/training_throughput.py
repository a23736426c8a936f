"""Images/s of the whole trainer against the bare network, interleaved, in one process with the same settings.

    python -m benchmarks.speed.training_throughput [--config configs/shapes.yaml] [--rounds 12] [--steps 10]
        [--out benchmarks/results/training_throughput.json]

Bare: forward pass, backward pass and optimizer step of the same UNet and text encoder on random tensors in memory. Whole: what
`loop.train` does in a step, with data, noise, EMA, clipping, checks, metrics and progress bar. Both sides take turns,
`--steps` steps each; the medians over the rounds are compared. The first `--warmup` steps, in which the learning rate
rises and most gradients are clipped, are not counted.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from sfumato.training import loop
from sfumato.training.config.load import load_config
from sfumato.training.engine.optimizers import build_optimizer
from sfumato.training.models.build import build_pipeline
from sfumato.training.models.denoiser import Denoiser
from sfumato.training.models.parameters import trained_parameters


def main() -> None:
    """Run the benchmark; see above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/shapes.yaml")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--out", default="benchmarks/results/training_throughput.json")
    options = parser.parse_args()

    folder = tempfile.mkdtemp()
    total = options.warmup + (options.rounds + 1) * options.steps
    config = load_config(
        options.config,
        [
            f"output_dir={folder}",
            f"train.max_steps={total}",
            "train.max_minutes=null",
            "checkpoint.every_steps=null",
            "validation.every_steps=null",
            "train.trackers=[]",
        ],
    )
    run = loop.prepare(config)
    captions = run.task.images.training_captions()

    bare_pipe = build_pipeline(config, captions)
    bare = Denoiser(bare_pipe.unet, bare_pipe.text_encoder)
    optimizer = build_optimizer(config.optim, trained_parameters(bare))
    size, batch = config.data.resolution, config.train.batch_size
    x, target = torch.randn(2, batch, config.data.channels, size, size)
    t = torch.randint(0, 1000, (batch,))
    ids = torch.randint(0, 100, (batch, config.text_encoder.max_length))

    def bare_steps():
        start = time.perf_counter()
        for _ in range(options.steps):
            (bare(x, t, ids) - target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - start

    rounds = {"bare": [], "trainer": []}
    write, mark = loop.Log.write, [None]

    def interleave(log, entry):
        """After each `--steps` steps of the trainer, run as many bare ones; the trainer's clock is stopped meanwhile."""
        write(log, entry)
        if entry["step"] >= options.warmup and entry["step"] % options.steps == 0:
            now = time.perf_counter()
            if entry["step"] > options.warmup:
                rounds["trainer"].append(now - mark[0])
                rounds["bare"].append(bare_steps())
            else:
                bare_steps()
            mark[0] = time.perf_counter()

    loop.Log.write = interleave
    loop.finish = lambda run, log: log.close("")
    loop.save = lambda run, last: None
    mark[0] = time.perf_counter()
    assert loop.train(run) == 0

    images = options.steps * batch
    rate = {side: images / statistics.median(seconds) for side, seconds in rounds.items()}
    ratios = [whole / alone - 1 for whole, alone in zip(rounds["trainer"], rounds["bare"])]
    result = {
        "config": options.config,
        "batch_size": batch,
        "threads": torch.get_num_threads(),
        "warmup_steps": options.warmup,
        "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
        "images_per_second": rate,
        "overhead_median_of_pairs": statistics.median(ratios),
        "seconds_per_round": rounds,
        "steps_per_round": options.steps,
    }
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"images/s: bare {rate['bare']:.1f}, trainer {rate['trainer']:.1f}; median overhead {statistics.median(ratios):+.1%}"
    )


if __name__ == "__main__":
    main()
