"""Listen to a model of sounds: its sample captions, one after another, in one file.

    python -m benchmarks.quality.listen runs/speech [--seed 0] [--out benchmarks/results/speech.ogg]

The captions are those of the run's grids of samples: `validation.prompts`, or without them twelve held-out captions, chosen
by a seed.
"""

import argparse
from pathlib import Path

import numpy as np
import soundfile
import torch

from sfumato.pipelines import SfumatoPipeline
from sfumato.training.config.load import load_config
from sfumato.training.data.prepare import prepare
from sfumato.training.quality.drawing import sample_captions, sampling_pipeline

PAUSE = 0.4  # seconds between two sounds


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, help="its ending sets the format (default: NAME.ogg of the run, in benchmarks/results)"
    )
    options = parser.parse_args()
    config = load_config(options.run / "config.yaml")
    pipe = sampling_pipeline(SfumatoPipeline.from_pretrained(options.run / "pipeline"), config.validation)
    if getattr(pipe.codec, "rate", None) is None:
        parser.error(f"{options.run} is not a model of sounds")
    captions = config.validation.prompts or sample_captions(prepare(config.data))
    call = {name: getattr(config.validation, name) for name in ("num_inference_steps", "guidance_scale")}
    sounds = pipe(captions, generator=torch.Generator().manual_seed(options.seed), output_type="decoded", **call).images
    pause = np.zeros(int(PAUSE * pipe.codec.rate), np.float32)
    out = options.out or Path("benchmarks/results", f"{options.run.name}.ogg")
    soundfile.write(out, np.concatenate([part for sound in sounds for part in (sound, pause)]), pipe.codec.rate)
    print(f"wrote {out}:", "; ".join(captions))


if __name__ == "__main__":
    main()
