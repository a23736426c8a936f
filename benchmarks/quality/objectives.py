"""What the network predicts: x_0, v, or the velocity of flow matching; the same network, minutes and noise levels.

    accelerate launch training/train.py configs/two_shapes.yaml
    accelerate launch training/train.py configs/two_shapes.yaml output_dir=runs/two_shapes_v \\
        scheduler.prediction_type=v_prediction
    accelerate launch training/train.py configs/two_shapes_flow.yaml
    python -m benchmarks.quality.objectives [--images 128] [--out benchmarks/results/objectives.json]

Each has the loss weight that its config names: min-SNR with a floor of 1 on x_0 for x_0 and v, none for flow.
Share of held-out captions drawn fully correctly, by sampler and steps, guidance 1.5; and what each run saw in its minutes.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.batches import draw_in_batches
from sfumato.pipelines.choices import with_sampler
from sfumato.training.data.sources import shapes
from sfumato.training.quality.obedience import shapes_obedience


def main() -> None:
    """Run the benchmark; see above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--out", default="benchmarks/results/objectives.json")
    options = parser.parse_args()
    runs = {"x_0": "runs/two_shapes", "v": "runs/two_shapes_v", "flow": "runs/two_shapes_flow"}
    scenes = shapes.scenes(held_out=True, count=options.images, num_figures=2)
    captions = [scene.caption for scene in scenes]
    table = {}
    for name, folder in runs.items():
        last = json.loads(Path(folder, "metrics.jsonl").read_text().splitlines()[-1])
        table[name] = {"pictures seen": last["images_seen"], "minutes": round(last["seconds"] / 60, 1)}
        model = SfumatoPipeline.from_pretrained(f"{folder}/pipeline")
        for sampler in ("euler", "dpm++") if name == "flow" else ("ddpm", "dpm++"):
            pipe = with_sampler(model, sampler)
            for steps in (4, 8, 15, 30):
                images = draw_in_batches(pipe, captions, num_inference_steps=steps, guidance_scale=1.5)
                right = shapes_obedience([np.asarray(image) for image in images], scenes)["all"]
                table[name].setdefault(sampler, {})[steps] = right
                print(f"{name} {sampler} {steps} steps: {right:.1%} correct", flush=True)
    Path(options.out).write_text(json.dumps({"pictures": len(scenes), "table": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
