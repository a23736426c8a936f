"""A model of molecules by the field's measures: valid and in one piece without correction, unique, new, FCD.

    python -m benchmarks.quality.molecules runs/molecules [count] [scale=2.5] [out.json]

Captions are those of molecules of QM9, evenly chosen, so that what is drawn should be distributed as the data are. `scale`: of
guidance; the run's own without it. FCD (Preuer et al. 2018) needs fcd_torch; it compares with as many molecules of QM9 as were
drawn.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from sfumato.pipelines import SfumatoPipeline
from sfumato.training.config.load import load_config
from sfumato.training.data.array_set import to_unit
from sfumato.training.data.prepare import prepare


def main() -> None:
    """See the module."""
    run, count = sys.argv[1], int(next((item for item in sys.argv[2:] if item.isdigit()), 1000))
    pipe = SfumatoPipeline.from_pretrained(Path(run) / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    config = load_config(Path(run) / "config.yaml")
    images, codec, v = prepare(config.data), pipe.codec, config.validation
    train = images.select("train")
    chosen = [train[i * len(train) // count] for i in range(count)]
    scale = next((float(item[6:]) for item in sys.argv[2:] if item.startswith("scale=")), v.guidance_scale)
    captions, drawn = [images[i]["captions"][0] for i in chosen], []
    for i in range(0, count, 128):
        call = {"num_inference_steps": v.num_inference_steps, "guidance_scale": scale, "output_type": "np"}
        arrays = pipe(captions[i : i + 128], generator=torch.Generator().manual_seed(i), **call).images
        drawn += [codec.decode(array) for array in arrays]
    judged = [codec.judge(thing, caption) for thing, caption in zip(drawn, captions)]
    scores = {name: float(np.mean([each[name] for each in judged])) for name in judged[0]}
    smiles = [text for text in (codec.smiles(thing) for thing in drawn) if text is not None and "." not in text]
    known = {codec.smiles(codec.decode(to_unit(images.image(i)))) for i in train}
    scores |= {"unique": len(set(smiles)) / len(smiles), "not in QM9": float(np.mean([text not in known for text in smiles]))}
    if find_spec("fcd_torch") is not None:
        from fcd_torch import FCD

        true = [codec.smiles(codec.decode(to_unit(images.image(i)))) for i in chosen]
        scores["FCD"] = float(FCD(device="cpu", n_jobs=1)(ref=true, gen=smiles))
    text = json.dumps({"drawn": count, "guidance scale": scale, **scores}, indent=1)
    print(text)
    for out in (item for item in sys.argv[2:] if item.endswith(".json")):
        Path(out).write_text(text + "\n")
        lines = [codec.smiles(thing) or "invalid" for thing in drawn]
        Path(out).with_suffix(".smi").write_text("\n".join(lines) + "\n")  # what moses_metrics.py reads


if __name__ == "__main__":
    main()
