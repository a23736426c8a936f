"""Start-up times of fresh processes: import, --help, and first image beyond importing torch and diffusers.

python -m benchmarks.speed.startup FOLDER [--rounds 7] [--out benchmarks/results/startup.json]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    """Run the benchmark; see above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", default="benchmarks/results/startup.json")
    options = parser.parse_args()

    IMAGE = (
        "from sfumato.pipelines import SfumatoPipeline as P;"
        f"P.from_pretrained({options.folder!r})('red heart', num_inference_steps=30, guidance_scale=3.0).images[0]"
    )
    CODE = {
        "python": "pass",
        "import sfumato": "import sfumato",
        "sfumato --help": "import sys; sys.argv = ['sfumato', '--help']; from sfumato.cli import main; main()",
        "import torch, diffusers": "import torch; "
        "from diffusers import DiffusionPipeline, UNet2DConditionModel, AutoencoderKL",
        "first picture": IMAGE,
    }
    seconds = {name: [] for name in CODE}
    for _ in range(options.rounds):
        for name, code in CODE.items():
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "-c", code], check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
            )
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    result = {
        "import_sfumato_ms": 1000 * (median["import sfumato"] - median["python"]),
        "help_ms": 1000 * median["sfumato --help"],
        "first_picture_beyond_imports_s": median["first picture"] - median["import torch, diffusers"],
        "median_s": median,
        "seconds": seconds,
    }
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps(result, indent=2) + "\n")
    print({name: round(value, 2) for name, value in result.items() if isinstance(value, float)})


if __name__ == "__main__":
    main()
