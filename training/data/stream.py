"""Records read from shards during training, for data that are too large for the disk. `data.stream: true`.

The shards of an epoch are dealt out to lanes, and the lanes to the processes and their workers. Each lane shuffles its own
records window by window, and each batch takes an equal share from every lane. What a run sees is therefore decided by the
seed and the number of lanes, on one process or many, and a few numbers per lane are enough to resume inside a shard.
"""

import re
import shutil
import tempfile
import time
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sfumato.registries import SOURCES
from sfumato.training.config.schema import Config, DataConfig
from sfumato.training.data.images import read_image
from sfumato.training.data.loader import SampleData, decide, image_tensors, leave_signals_to_the_trainer, level_and_key
from sfumato.training.data.records import HELD_OUT_SHARE, Record, Unusable, hash_fraction, splits_to_leave_out

MAX_LANES = 64
TRIES = 4  # to fetch a shard from another machine
SECONDS_BETWEEN = 2.0  # before the first retry; doubled each time


@dataclass(frozen=True)
class Shard:
    """A file of records.

    Attributes:
        address: a path or a URL.
        source: the name in `SOURCES` of the source that reads it.
    """

    address: str
    source: str

    @property
    def name(self) -> str:
        """The last part of the address; the names of its records begin with it."""
        return self.address.rstrip("/").rpartition("/")[2]


def expand(address: str) -> list[str]:
    """The addresses that a pattern with a range, such as `shard-{000..127}.tar`, stands for; or the address itself."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", address)
    if found is None:
        return [address]
    first, last = found.groups()
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [each for number in numbers for each in expand(address[: found.start()] + number + address[found.end() :])]


def list_shards(config: DataConfig) -> list[Shard]:
    """The shards of `data.name`: a local folder or file, a URL, which may contain `{000..127}` or `*`, or a Hub id.

    Raises:
        ValueError: there are none, or they cannot be listed; the message says why.
    """
    name = config.name
    try:
        if "://" in name:
            addresses = [each for pattern in expand(name) for each in _glob(pattern)]
        elif (path := Path(name).expanduser()).exists():
            files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
            addresses = [str(file) for file in files if not file.name.startswith(".")]
        else:
            revision = f"@{config.revision}" if config.revision else ""
            addresses = _glob(f"hf://datasets/{name}{revision}/**")
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"data.name={name!r} cannot be listed: {error}") from error
    shards = [Shard(address, source) for address in addresses if (source := _source_of(address)) is not None]
    left = splits_to_leave_out([shard.address for shard in shards], config.split)
    shards = [shard for shard in shards if shard.address not in left]
    if not shards:
        raise ValueError(f"data.name={name!r}: found no .tar or .parquet to read as a stream")
    if len({shard.name for shard in shards}) < len(shards):
        raise ValueError(f"data.name={name!r}: two shards have the same name, but names must tell their records apart")
    return shards


def _glob(pattern: str) -> list[str]:
    if "*" not in pattern:
        return [pattern]
    system, path = fsspec.core.url_to_fs(pattern)
    return [str(system.unstrip_protocol(found)) for found in sorted(system.glob(path))]


def _source_of(address: str) -> str | None:
    streamed = ("webdataset", "parquet")
    return next((name for name in streamed if address.lower().endswith(SOURCES[name].claims)), None)


@contextmanager
def local_copy(address: str, folder: Path) -> Iterator[Path]:
    """A shard as a local file; a remote one is downloaded and deleted afterwards.

    Raises:
        OSError: it could not be fetched in `TRIES` attempts.
    """
    if "://" not in address:
        yield Path(address)
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="shard-", dir=folder) as place:
        path = Path(place) / address.rpartition("/")[2]
        for attempt in range(TRIES):
            try:
                with _open(address) as source, open(path, "wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
                    size = getattr(source, "headers", {}).get("Content-Length")
                    if size is not None and target.tell() != int(size):
                        raise OSError(f"received {target.tell():,} of {int(size):,} bytes")
                break
            except OSError:
                if attempt == TRIES - 1:
                    raise
                time.sleep(SECONDS_BETWEEN * 2**attempt)
        yield path


def _open(address: str) -> Any:
    """A remote file, to be read once. (fsspec's own reader for HTTP would need a further package.)"""
    if address.startswith(("http://", "https://")):
        return urllib.request.urlopen(address, timeout=60)
    return fsspec.open(address, "rb")


def records_of(shard: Shard, config: DataConfig) -> Iterator[Record]:
    """The records of a shard in order, read by the source for such files; their names begin with the shard's name."""
    try:
        with local_copy(shard.address, Path(config.cache_dir).expanduser() / "stream") as path:
            for record in SOURCES.load(shard.source)(config, [path]):
                own = record.name.startswith(shard.name)
                yield record if own else replace(record, name=f"{shard.name}/{record.name}")
    except OSError as error:
        yield Record(shard.name, fault=f"shard that could not be fetched ({type(error).__name__}: {error})")


def sample_of(config: DataConfig) -> Iterator[Record]:
    """The first records of some evenly spaced shards: the part of a streamed data set that is prepared before training."""
    shards = list_shards(config)
    chosen = shards[:: max(1, len(shards) // 8)][:8]
    share = -(-config.stream_sample // len(chosen))
    for shard in chosen:
        for number, record in enumerate(records_of(shard, config)):
            if number == share:
                break
            yield record


@dataclass
class LaneState:
    """The position of a lane.

    Attributes:
        epoch: how many times it has been through its shards.
        shard, record: where the window begins: index among its shards of this epoch, and of the record in that shard.
        window: how many windows of this epoch came before.
        place: how many records of the window, in its shuffled order, have been taken.
        seen, bad: records that were used, and records that could not be, since the run began.
    """

    epoch: int = 0
    shard: int = 0
    record: int = 0
    window: int = 0
    place: int = 0
    seen: int = 0
    bad: int = 0


class Lane:
    """An endless reader of a share of the shards, in a different order each epoch.

    Args:
        number, count: the index of this lane, and how many there are.
        state: where to continue.
    """

    def __init__(self, shards: list[Shard], config: Config, number: int, count: int, state: LaneState):
        self.shards = shards
        self.config = config
        self.number = number
        self.count = count
        self.state = replace(state)
        self.reasons: Counter[str] = Counter()
        self._size = max(1, config.data.stream_buffer // count)
        self._window: list[Record] = []
        self._next: tuple[int, int] | None = None  # where the next window begins
        self._open: tuple[int, int, Iterator[Record]] | None = None  # shard, record and the records from there on

    def own_shards(self) -> list[Shard]:
        """Its shards in this epoch. If there are fewer shards than lanes, several lanes share one; see `_is_own`."""
        order = np.random.default_rng((self.config.seed, self.state.epoch)).permutation(len(self.shards))
        if len(self.shards) >= self.count:
            order = order[self.number :: self.count]
        else:
            order = order[self.number % len(self.shards) :][:1]
        return [self.shards[i] for i in order]

    def _is_own(self, record: int) -> bool:
        """Whether a record of a shard belongs to this lane, as several lanes may share one shard."""
        alike = len(range(self.number % len(self.shards), self.count, len(self.shards)))
        return record % alike == self.number // len(self.shards) if len(self.shards) < self.count else True

    def take(self) -> tuple[int, Record, np.ndarray]:
        """The epoch, the next usable record, and its image `(H, W, C)`.

        Raises:
            ValueError: there is no usable record in a whole epoch, or too many cannot be used.
        """
        empty = 0
        data = self.config.data
        while True:
            if self.state.place >= len(self._window):
                empty = 0 if self._window else empty + 1
                if empty > 3:
                    raise ValueError(f"lane {self.number} of {data.name} has no usable record: {dict(self.reasons)}")
                self._fill(again=not self._window and self._next is None)
                continue
            record = self._window[self.state.place]
            self.state.place += 1
            try:
                if record.fault:
                    raise Unusable(record.fault)
                assert isinstance(record.image, (bytes, Path))
                image = read_image(record.image, data.size, data.channels, data.resize)
            except Unusable as error:
                self._note_bad(record, error.reason)
                continue
            self.state.seen += 1
            return self.state.epoch, record, image

    def _note_bad(self, record: Record, reason: str) -> None:
        self.state.bad += 1
        self.reasons[f"{reason} ({record.name})" if not self.reasons else reason] += 1
        total, data = self.state.seen + self.state.bad, self.config.data
        if total >= 1000 and self.state.bad > data.max_bad_share * total:
            raise ValueError(
                f"{self.state.bad} of the first {total} records of lane {self.number} of {data.name} cannot be used: "
                f"{dict(self.reasons)}. Repair or remove them, or raise data.max_bad_share (now {data.max_bad_share})"
            )

    def _fill(self, again: bool) -> None:
        """Read the next window, or with `again` the one that the state points to, and shuffle it."""
        s = self.state
        if not again:
            assert self._next is not None
            s.shard, s.record = self._next
            s.window, s.place = s.window + 1, 0
            if s.shard >= len(self.own_shards()):
                s.epoch += 1
                s.shard = s.record = s.window = 0
                self._open = None
        window: list[Record] = []
        shards = self.own_shards()
        shard, record = s.shard, s.record
        while len(window) < self._size and shard < len(shards):
            if self._open is None or self._open[:2] != (shard, record):
                stream = records_of(shards[shard], self.config.data)
                for _ in range(record):  # read and skipped, not decoded
                    next(stream, None)
            else:
                stream = self._open[2]
            for found in stream:
                record += 1
                held_out = found.split == "held_out" or hash_fraction(found.name) < HELD_OUT_SHARE
                if self._is_own(record - 1) and found.left_out is None and (found.fault or not held_out):
                    window.append(found)
                    if len(window) == self._size:
                        break
            else:
                shard, record = shard + 1, 0
                stream = iter(())
            self._open = (shard, record, stream) if record else None
        self._next = (shard, record)
        order = np.random.default_rng((self.config.seed, s.epoch, self.number, s.window)).permutation(len(window))
        self._window = [window[i] for i in order]


def count_lanes(config: Config, num_shards: int, num_processes: int) -> int:
    """How many lanes a new run has: the largest number that divides the batch of all processes evenly, up to `MAX_LANES`
    and, if possible, no more than there are shards.
    """
    block = config.train.batch_size * num_processes
    fitting = [count for count in range(num_processes, block + 1, num_processes) if block % count == 0]
    most = max(num_processes, min(MAX_LANES, num_shards))
    return max(count for count in fitting if count <= most)


def collate_stream(
    rows: list[tuple[int, Record, np.ndarray]], positions: list[int], data: SampleData, config: Config
) -> dict[str, torch.Tensor]:
    """A batch of the given epochs, records and images, at the given positions of the run; see `loader.batches`."""
    epochs, records, images = zip(*rows)
    names = [zlib.crc32(record.name.encode("utf-8", "replace")) for record in records]
    counts = np.array([len(record.captions) for record in records])
    samples = decide(config, data.streams, list(epochs), names, counts, positions)
    captions = ["" if sample.caption < 0 else record.captions[sample.caption] for sample, record in zip(samples, records)]
    if data.tokenizer is None:
        text = torch.zeros(len(rows), 1, dtype=torch.int64)
    else:
        text = data.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return {"text": text, **level_and_key(samples), **image_tensors(list(images), samples, data)}


class _Parts(IterableDataset):
    """Each worker's part of each batch: what its lanes yield, and their states afterwards."""

    def __init__(self, stream: "Stream"):
        self.stream = stream

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, count = (info.id, info.num_workers) if info is not None else (0, 1)
        yield from self.stream.parts(worker, count)


class Stream:
    """Endless batches of one process, read from a stream.

    Yields the same tensors as `batches`; each sample's key is made of its epoch and the CRC-32 of its name.

    Args:
        data: what turns samples into tensors, with a `tokenizer`.
        state: the state of all processes from a checkpoint; `{}` for a new run.
        start: number of images seen so far by all processes together.

    Raises:
        ValueError: the shards, `data.stream_buffer` or the number of processes do not fit the run that is resumed.
    """

    def __init__(self, data: SampleData, config: Config, *, rank: int, num_processes: int, start: int, state: dict[str, Any]):
        self.data = data
        self.config = config
        self.start = start
        self.num_processes = num_processes
        self.shards = list_shards(config.data)
        names = zlib.crc32("\n".join(shard.name for shard in self.shards).encode())
        if state and state["shards"] != names:
            raise ValueError(f"the shards of {config.data.name} are no longer those that the run began with")
        if state and state["buffer"] != config.data.stream_buffer:
            raise ValueError(
                f"data.stream_buffer was {state['buffer']} when the run began; it decides the order of the records, so keep it"
            )
        self.names = names
        self.num_lanes = state["lanes"] if state else count_lanes(config, len(self.shards), num_processes)
        batch = config.train.batch_size
        if self.num_lanes % num_processes or batch * num_processes % self.num_lanes:
            raise ValueError(
                f"the run reads its data in {self.num_lanes} lanes; continue with a number of processes that divides it and "
                f"whose product with train.batch_size is a multiple of it (now {num_processes} x {batch})"
            )
        every = [LaneState(**lane) for lane in state["states"]] if state else [LaneState() for _ in range(self.num_lanes)]
        own = self.num_lanes // num_processes
        self.numbers = list(range(rank * own, (rank + 1) * own))
        self.states = {number: every[number] for number in self.numbers}
        self.skipped: Counter[str] = Counter()

    def parts(self, worker: int, count: int) -> Iterator[dict[str, Any]]:
        """A worker's part of each batch."""
        own = np.array_split(self.numbers, count)[worker].tolist()
        lanes = [Lane(self.shards, self.config, number, self.num_lanes, self.states[number]) for number in own]
        batch_size = self.config.train.batch_size
        each = batch_size // len(self.numbers)
        block = batch_size * self.num_processes
        first = self.start
        while own:
            rows, positions = [], []
            for lane in lanes:
                for k in range(each):
                    rows.append(lane.take())
                    positions.append(first + lane.number * each + k)
            part = collate_stream(rows, positions, self.data, self.config)
            states = {lane.number: asdict(lane.state) for lane in lanes}
            yield {"batch": part, "states": states, "skipped": sum((lane.reasons for lane in lanes), Counter())}
            for lane in lanes:
                lane.reasons.clear()
            first += block

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        workers = min(self.config.train.num_workers, len(self.numbers))
        loader = iter(
            DataLoader(
                _Parts(self),
                batch_size=None,
                num_workers=workers,
                multiprocessing_context="fork" if workers else None,
                worker_init_fn=leave_signals_to_the_trainer,
                pin_memory=torch.cuda.is_available(),
            )
        )
        while True:
            parts = [next(loader) for _ in range(max(workers, 1))]
            for part in parts:
                self.states |= {number: LaneState(**state) for number, state in part["states"].items()}
                self.skipped += part["skipped"]
            yield {name: torch.cat([part["batch"][name] for part in parts]) for name in parts[0]["batch"]}

    def new_messages(self) -> list[str]:
        """Messages about the records that could not be used since the last call, one per reason."""
        lines = [f"skipped {count}: {reason}" for reason, count in self.skipped.items()]
        self.skipped.clear()
        return lines

    def state(self, gather: Callable[[list[Any]], list[Any]]) -> dict[str, Any]:
        """The states of the lanes of all processes, as of the last batch that was yielded.

        Args:
            gather: joins the lists of all processes, in their order, into one, such as `accelerate.utils.gather_object`.
        """
        states = gather([asdict(self.states[number]) for number in self.numbers])
        return {"lanes": self.num_lanes, "shards": self.names, "buffer": self.config.data.stream_buffer, "states": states}
