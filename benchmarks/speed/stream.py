"""Reading a stream of shards: how fast compared with bare Pillow, and how much memory over many records.

    python -m benchmarks.speed.stream [records, 200000] [out.json]

Speed: photograph-like JPEGs of 256 pixels to 64, in processor seconds of one core; ours goes from .tar to batches, captions to
tokens included; Pillow opens, decodes and resizes the same bytes from memory. Memory: images of 8 pixels from a web server
that makes each shard on request and stores none; each caption names the shard and the position in it.
"""

import http.server
import io
import json
import re
import sys
import tarfile
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from sfumato.training.config.load import default_config
from sfumato.training.data.loader import SampleData
from sfumato.training.data.stream import Stream
from sfumato.training.data.streams import STREAM_VERSION, streams_of
from sfumato.training.models.text import train_tokenizer

RECORDS_A_SHARD = 1000
ROUNDS = 5


def write_shard(file, contents: list[tuple[str, bytes, str]]) -> None:
    """A tar of images with captions."""
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, image, caption in contents:
            for ending, body in ((".jpg", image), (".txt", caption.encode())):
                member = tarfile.TarInfo(name + ending)
                member.size = len(body)
                archive.addfile(member, io.BytesIO(body))


def jpeg(seed: int, side: int) -> bytes:
    """Smooth noise, which compresses as photographs do."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (max(side // 8, 1), max(side // 8, 1), 3), np.uint8))
    pixels = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC), np.int16)
    file = io.BytesIO()
    Image.fromarray(np.uint8((pixels + rng.normal(0, 6, pixels.shape)).clip(0, 255))).save(file, "jpeg", quality=90)
    return file.getvalue()


def open_stream(name: str, resolution: int, batch_size: int, cache: str) -> Stream:
    """The stream of a run with a tokenizer."""
    config = default_config()
    data = replace(config.data, name=name, resolution=resolution, stream=True, cache_dir=cache)
    config = replace(config, data=data, train=replace(config.train, batch_size=batch_size))
    captions = ["a picture of a number of things", "number 12 of many"]
    tokenizer = train_tokenizer(captions, 300, 32)
    data = SampleData(images=None, texts=None, streams=streams_of(STREAM_VERSION, 0), tokenizer=tokenizer)  # pyright: ignore
    return Stream(data, config, rank=0, num_processes=1, start=0, state={})


def speed(folder: Path) -> dict[str, float]:
    """Records per second of processor time: ours and Pillow's by turns, the median of rounds."""
    images = [jpeg(seed, 256) for seed in range(64)]
    for shard in range(8):
        contents = [(f"{shard}-{i:04d}", images[i % 64], f"number {i} of many") for i in range(RECORDS_A_SHARD)]
        with open(folder / f"shard-{shard}.tar", "wb") as file:
            write_shard(file, contents)
    batches = iter(open_stream(str(folder), 64, 64, str(folder / "cache")))
    next(batches)
    ours, bare = [], []
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(12):
            next(batches)
        ours.append(12 * 64 / (time.process_time() - start))
        start = time.process_time()
        for i in range(12 * 64):
            image = Image.open(io.BytesIO(images[i % 64]))
            np.asarray(image.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS))
        bare.append(12 * 64 / (time.process_time() - start))
    return {"records a second and core": float(np.median(ours)), "Pillow alone": float(np.median(bare))}


class Shards(http.server.BaseHTTPRequestHandler):
    """Makes shards on request, all from one pattern, with the number of the shard put into the captions."""

    number = b"@@@@@"

    @staticmethod
    def pattern() -> bytes:
        """The bytes of a shard except for its number."""
        images, file = [jpeg(seed, 8) for seed in range(64)], io.BytesIO()
        write_shard(file, [(f"{i:04d}", images[i % 64], f"number {i} of shard @@@@@") for i in range(RECORDS_A_SHARD)])
        return file.getvalue()

    def do_GET(self) -> None:
        """Send the shard whose number is in the path."""
        number = re.findall(r"\d+", self.path)[0]
        body = self.server.pattern.replace(self.number, number.encode())  # pyright: ignore
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments) -> None:
        """Log nothing."""


def resident() -> float:
    """Megabytes of this process."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3  # pyright: ignore


def memory(cache: str, records: int) -> dict[str, float]:
    """Megabytes of the process after certain numbers of records, and the rate."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Shards)
    server.pattern = Shards.pattern()  # pyright: ignore
    threading.Thread(target=server.serve_forever, daemon=True).start()
    last = max(records * 21 // 20 // RECORDS_A_SHARD, 64) - 1  # one pass; some records are held out
    batches = iter(open_stream(f"http://127.0.0.1:{server.server_port}/shard-{{00000..{last:05d}}}.tar", 8, 256, cache))
    seen = 0
    sizes = {}
    start = time.process_time()
    marks = [round(10_000 * (records / 10_000) ** (k / 4)) for k in range(5)] if records > 10_000 else [records]
    for mark in marks:
        while seen < mark:
            next(batches)
            seen += 256
        sizes[f"{seen:,}"] = resident()
        rate = round(seen / (time.process_time() - start))
        print(f"{seen:,} records: {sizes[f'{seen:,}']:.0f} MB, {rate:,} per second on one core", flush=True)
    server.shutdown()
    return {**sizes, "records a second of one core, server and all": rate}


def main() -> None:
    """See the module."""
    records = int(next((item for item in sys.argv[1:] if item.isdigit()), 200_000))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "shards").mkdir()
        result = {"speed": speed(Path(folder) / "shards"), "megabytes after so many records": memory(folder, records)}
    text = json.dumps(result, indent=1)
    print(text)
    for out in (item for item in sys.argv[1:] if item.endswith(".json")):
        Path(out).write_text(text + "\n")


if __name__ == "__main__":
    main()
