"""Records/s of each source, images/s of the prepared set, memory against record count, and how long a step waits for data.

    python -m benchmarks.speed.data_throughput [--counts 10000 100000 1000000] [--out benchmarks/results/data_throughput.json]

Memory is the anonymous memory of a child process (RssAnon: what the process itself holds; memory-mapped files, which the
system may drop at any time, do not count) after preparing a parquet file of that many 8-pixel images and reading 200 batches.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image


def main() -> None:
    """Run the benchmark; see above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--records", type=int, default=2000, help="records per source to measure its speed")
    parser.add_argument("--config", default="configs/demo.yaml", help="the config whose step is compared with its loader")
    parser.add_argument("--out", default="benchmarks/results/data_throughput.json")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp())

    MEMORY = """
import json, re, sys, time
from sfumato.training.config.load import default_config
from sfumato.training.config.schema import DataConfig
from sfumato.training.data.cached import cached_texts
from sfumato.training.data.loader import SampleData, batches
from sfumato.training.data.prepare import prepare
from sfumato.training.data.streams import STREAM_VERSION, streams_of
from sfumato.training.models.text import train_tokenizer
config = default_config(data=DataConfig(name=sys.argv[1], resolution=8, cache_dir=sys.argv[2]))
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
before = anonymous()
start = time.perf_counter()
images = prepare(config.data)
seconds, prepared = time.perf_counter() - start, anonymous()
tokenizer = train_tokenizer(images.training_captions(), 1000, 16)
texts = cached_texts(images, tokenizer, None, sys.argv[2])
stream = batches(SampleData(images=images, texts=texts, streams=streams_of(STREAM_VERSION, 0)), config)
for _ in range(200):
    next(stream)
print(json.dumps({"records": len(images), "prepare_seconds": seconds, "before_mb": before, "prepared_mb": prepared,
                  "reading_mb": anonymous()}))
"""

    def image(side: int, rng, kind: str = "png") -> bytes:
        """A smooth image, as photographs are."""
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        body = io.BytesIO()
        small.resize((side, side), Image.Resampling.BICUBIC).save(body, kind)
        return body.getvalue()

    def write_parquet(path: Path, count: int, side: int) -> Path:
        import datasets

        rng = np.random.default_rng(0)
        few = [image(side, rng) for _ in range(min(count, 256))]

        def rows():
            for i in range(count):
                yield {"image": {"bytes": few[i % len(few)], "path": None}, "text": f"picture number {i}"}

        features = datasets.Features(image=datasets.Image(decode=False), text=datasets.Value("string"))
        made = datasets.Dataset.from_generator(rows, features=features, cache_dir=str(root / "hf"))
        made.to_parquet(path)
        return path

    result = {"memory": [], "sources_records_per_second": {}}
    for count in options.counts:
        path = write_parquet(root / f"{count}.parquet", count, 8)
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(path), str(root / "cache")], capture_output=True, text=True, check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        result["memory"].append(json.loads(done.stdout.splitlines()[-1]))
        print(result["memory"][-1], flush=True)

    from sfumato.training import loop  # noqa: E402
    from sfumato.training.config import schema  # noqa: E402
    from sfumato.training.config.load import load_config  # noqa: E402
    from sfumato.training.data.loader import batches  # noqa: E402
    from sfumato.training.data.prepare import prepare  # noqa: E402

    rng = np.random.default_rng(0)
    bodies = [image(256, rng, "jpeg") for _ in range(64)]
    folder = root / "folder"
    folder.mkdir()
    with open(folder / "metadata.jsonl", "w") as rows:
        for i in range(options.records):
            (folder / f"{i}.jpg").write_bytes(bodies[i % 64])
            rows.write(json.dumps({"file_name": f"{i}.jpg", "text": f"picture number {i}"}) + "\n")
    with tarfile.open(root / "set.tar", "w") as archive:
        for i in range(options.records):
            for name, body in ((f"{i}.jpg", bodies[i % 64]), (f"{i}.txt", b"a picture")):
                info = tarfile.TarInfo(name)
                info.size = len(body)
                archive.addfile(info, io.BytesIO(body))
    write_parquet(root / "set.parquet", options.records, 256)
    for name, source in {
        "folder of 256-pixel jpeg": folder,
        "WebDataset tar of 256-pixel jpeg": root / "set.tar",
        "parquet of 256-pixel png": root / "set.parquet",
        "shapes, drawn": "shapes",
    }.items():
        config = schema.DataConfig(
            name=str(source), resolution=64, num_pictures=options.records, cache_dir=str(root / "cache2")
        )
        start = time.perf_counter()
        images = prepare(config)
        result["sources_records_per_second"][name] = len(images) / (time.perf_counter() - start)

    config = load_config(options.config, [f"output_dir={root / 'run'}", f"data.cache_dir={root / 'cache'}",
        "train.max_steps=40",
                                           "train.max_minutes=null", "checkpoint.every_steps=null", "train.trackers=[]",
                                           "validation.every_steps=null"])  # fmt: skip
    run = loop.prepare(config)
    stream = batches(run.task.data, config)
    next(stream)
    times = []
    for _ in range(200):
        start = time.perf_counter()
        next(stream)
        times.append(time.perf_counter() - start)
    loop.finish = lambda run, log: log.close("")
    loop.save = lambda run, last: None
    start = time.perf_counter()
    loop.train(run)
    step = (time.perf_counter() - start) / 40
    batch = float(np.median(times))
    result["prepared_pictures_per_second"] = config.train.batch_size / batch
    result["batch_ms"], result["step_ms"] = 1000 * batch, 1000 * step
    result["share_of_a_step_waiting_for_data"] = batch / step
    Path(options.out).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "memory"}, indent=2))


if __name__ == "__main__":
    main()
