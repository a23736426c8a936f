"""A model of molecules by the standard metrics of the field: valid and in one piece without correction, unique, new, FCD.

    python -m benchmarks.quality.molecules runs/molecules [--count 10000] [--scale 2] [--guided 0 0.7] [--split held_out]
        [--out FILE.json]

Captions are those of evenly chosen molecules of the set, so that what is drawn should be distributed like the data. The run's
settings are used unless others are given; `--guided` gives the part of the steps that is guided. New molecules are
those not trained on. FCD (Preuer et al. 2018) needs fcd_torch; it compares with the molecules whose captions were drawn.
"""

import argparse
import json
from collections import defaultdict
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.codecs.molecules import MoleculeCodec
from sfumato.training.config.load import load_config
from sfumato.training.data.array_set import ArraySet, to_unit
from sfumato.training.data.prepare import prepare
from sfumato.training.quality.drawing import sampling_pipeline


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--count", type=int, default=1000, help="number of molecules to draw (default: %(default)s)")
    parser.add_argument("--scale", type=float, help="guidance scale")
    parser.add_argument("--guided", type=float, nargs=2, help="the part of the steps that is guided, such as 0 0.7")
    parser.add_argument("--split", choices=["train", "held_out"], default="train", help="whose captions are drawn")
    parser.add_argument("--out", type=Path, help="the figures; the molecules go into a .smi beside them")
    options = parser.parse_args()
    config = load_config(options.run / "config.yaml")
    images, v = prepare(config.data), config.validation
    if options.scale is not None:
        v = replace(v, guidance_scale=options.scale)
    if options.guided is not None:
        v = replace(v, guidance_interval=options.guided)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    numbers = images.select(options.split).tolist()
    chosen = [numbers[i * len(numbers) // options.count] for i in range(options.count)]
    captions = [images[i]["captions"][0] for i in chosen]
    pipe = sampling_pipeline(SfumatoPipeline.from_pretrained(options.run / "pipeline"), v)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": v.num_inference_steps, "guidance_scale": v.guidance_scale, "output_type": "decoded"}
    drawn = []
    for i in range(0, options.count, 128):
        drawn += pipe(captions[i : i + 128], generator=torch.Generator().manual_seed(i), **call).images
    codec = pipe.codec
    judged = [codec.judge(thing, caption) for thing, caption in zip(drawn, captions)]
    scores = {name: float(np.mean([each[name] for each in judged])) for name in judged[0]}
    of_caption = defaultdict(list)
    for caption, each in zip(captions, judged):
        of_caption[caption].append(each["all"])
    scores["all, each caption once"] = float(np.mean([np.mean(right) for right in of_caption.values()]))
    whole = [thing for thing, each in zip(drawn, judged) if each["valid, one piece"]]
    smiles = [codec.smiles(thing) for thing in whole]
    if smiles:
        known = _trained(images, codec, {codec.caption(thing) for thing in whole})
        scores |= {"unique": len(set(smiles)) / len(smiles), "new": float(np.mean([text not in known for text in smiles]))}
    if len(smiles) > 1 and find_spec("fcd_torch") is not None:
        from fcd_torch import FCD

        true = [codec.smiles(codec.decode(to_unit(images.image(i)))) for i in chosen]
        scores["FCD"] = float(FCD(device="cpu", n_jobs=1)(ref=true, gen=smiles))
    facts = {"drawn": options.count, "captions": options.split, "guidance scale": v.guidance_scale}
    facts["guidance from, to"] = v.guidance_interval
    text = json.dumps({**facts, **{name: round(value, 4) for name, value in scores.items()}}, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
        lines = [codec.smiles(thing) or "invalid" for thing in drawn]
        options.out.with_suffix(".smi").write_text("\n".join(lines) + "\n")  # for moses_metrics.py


def _trained(images: ArraySet, codec: MoleculeCodec, captions: set[str]) -> set[str | None]:
    """The SMILES of the training molecules whose caption is one of these; decoding all of them would take minutes."""
    alike = [i for i in images.select("train").tolist() if images[i]["captions"][0] in captions]
    return {codec.smiles(codec.decode(to_unit(images.image(i)))) for i in alike}


if __name__ == "__main__":
    main()
