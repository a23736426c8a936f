"""Photographs of single objects: what minutes on one CPU core achieve, from random weights and from the packaged model.

    apt-get download tuxpaint-stamps-default; dpkg-deb -x tuxpaint-stamps-default_*.deb stamps
    python -m benchmarks.quality.photographs stamps [--counts 50 200] [--minutes 6] [--whole-minutes 20] [--out FILE.json]

Of the packages that we looked through, only the stamps of Tux Paint (GPL-2) hold photographs with captions: a few hundred
objects, cut out, on white. They are read where they were unpacked and go nowhere else.
FD and whether the nearest true image is its own, in the features of EfficientNet-Lite0, against the training images.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.quality.published import SHOWN, Set, trained
from sfumato.figures import grid
from sfumato.training.data.records import hash_fraction

DRAWN = ("cartoon", "symbols", "flags", "seasonal", "roadsigns")  # folders whose images are not photographs
BEGINNINGS = {
    "random weights": (),
    "the packaged model": ("init_from=openmoji", "unet={}", "text_encoder={}", "scheduler={}"),
}


def write_folder(stamps: Path, folder: Path, count: int | None) -> Path:
    """Write `count` of the photographs, chosen by a fixed hash, with the first line of their descriptions."""
    pairs = [
        (path, path.with_suffix(".txt").read_text(encoding="utf-8").splitlines()[0].strip().rstrip(".!"))
        for path in sorted(stamps.rglob("*.png"))
        if path.with_suffix(".txt").exists() and not any(word in str(path.relative_to(stamps)) for word in DRAWN)
    ]
    pairs = sorted(pairs, key=lambda pair: hash_fraction(pair[0].name))[:count]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows = []
    for k, (path, caption) in enumerate(pairs):
        shutil.copy(path, folder / f"{k:04d}.png")
        rows.append(json.dumps({"file_name": f"{k:04d}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def main() -> None:
    """Run the benchmark; see above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stamps", help="where the package was unpacked")
    parser.add_argument("--counts", type=int, nargs="*", default=[50, 200])
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--whole-minutes", type=float, default=20, help="on all photographs; 0 leaves this out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", default="runs/photographs")
    parser.add_argument("--out", default="benchmarks/results/photographs.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    out, folder = Path(options.out), Path(options.folder)
    jobs: list[tuple[int | None, str, float]] = [
        (count, beginning, options.minutes) for count in options.counts for beginning in BEGINNINGS
    ]
    if options.whole_minutes:
        jobs.append((None, "random weights", options.whole_minutes))
    titles, cells = [], []
    for count, beginning, minutes in jobs:
        place = folder / f"{count or 'all'}-{beginning.split()[-1]}-{options.seed}"
        data = Set(place, f"data.name={write_folder(Path(options.stamps), place / 'set', count)}", "data.resize=pad")
        row, drawn = trained(data, place / "run", minutes, options.seed, *BEGINNINGS[beginning])
        row = {"begins with": beginning, "photographs": len(data.captions), "seed": options.seed, **row}
        result = json.loads(out.read_text()) if out.exists() else {"rows": []}
        result["rows"].append(row)
        out.write_text(json.dumps(result, indent=1) + "\n")
        print(row, flush=True)
        shown = np.linspace(0, len(data.captions) - 1, SHOWN).astype(int)
        if beginning == "random weights":
            titles += [data.captions[i] for i in shown]
            cells += [Image.fromarray(data.images.image(int(data.numbers[i]))) for i in shown]
        titles += [f"{len(data.captions)}, {beginning}"] + [""] * (SHOWN - 1)
        cells += [Image.fromarray(drawn[i]) for i in shown]
        grid(cells, titles, columns=SHOWN, min_side=96).save(out.with_suffix(".png"))


if __name__ == "__main__":
    main()
