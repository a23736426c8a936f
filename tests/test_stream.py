"""Data that are read while training: each record once an epoch, in one order for any processes, resumed within a shard."""

import functools
import http.server
import io
import json
import shutil
import signal
import tarfile
import threading
from collections import Counter
from dataclasses import asdict, replace
from itertools import islice

import crashes
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file

from sfumato.training.config.load import load_config
from sfumato.training.data import stream
from sfumato.training.data.loader import SampleData
from sfumato.training.data.prepare import prepare
from sfumato.training.data.records import HELD_OUT_SHARE, hash_fraction
from sfumato.training.data.stream import LaneState, Stream
from sfumato.training.data.streams import STREAM_VERSION, streams_of
from sfumato.training.train import main


def png(number: int) -> bytes:
    """A picture of 8 pixels that says its number."""
    pixels = np.full((8, 8, 3), 255, np.uint8)
    pixels[:, :, 0], pixels[:, :, 1] = number % 256, number // 256
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write_shard(path, numbers, bad=()):
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            content = b"no picture" if number in bad else png(number)
            for ending, body in ((".png", content), (".txt", f"number {number}".encode())):
                member = tarfile.TarInfo(f"{number:05d}{ending}")
                member.size = len(body)
                archive.addfile(member, io.BytesIO(body))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """400 records in ten shards of different lengths."""
    folder = tmp_path_factory.mktemp("shards")
    edges = np.cumsum([0, 10, 70, 20, 60, 30, 50, 40, 40, 35, 45])
    for k, (first, last) in enumerate(zip(edges, edges[1:])):
        write_shard(folder / f"shard-{k:03d}.tar", range(first, last))
    return folder


@pytest.fixture
def config(tmp_path, shards):
    data = {"name": str(shards), "resolution": 8, "stream": True, "stream_buffer": 64, "stream_sample": 80}
    path = tiny.config_file(tmp_path, data=data, train={"batch_size": 8}, objective={"caption_dropout": 0.0})
    return load_config(path)


def open_stream(config, rank=0, world=1, batch=None, state=None, start=0, **data) -> Stream:
    config = replace(config, train=replace(config.train, batch_size=batch or config.train.batch_size))
    config = replace(config, data=replace(config.data, **data))
    nothing = SampleData(images=None, texts=None, streams=streams_of(STREAM_VERSION, config.seed))
    return Stream(nothing, config, rank=rank, num_processes=world, start=start, state=state or {})


def numbers_of(batch) -> list[int]:
    pixels = ((batch["pixel_values"][:, :, 0, 0] + 1) * 127.5).round().long()
    return (pixels[:, 0] + 256 * pixels[:, 1]).tolist()


def read(streams, count: int) -> tuple[list[int], list[float]]:
    """Numbers and noise levels of `count` batches, those of all processes in their order."""
    numbers, levels = [], []
    for batches in islice(zip(*map(iter, streams)), count):
        for batch in batches:
            numbers += numbers_of(batch)
            levels += batch["timestep_u"].tolist()
    return numbers, levels


def whole(streams) -> dict:
    """What a checkpoint keeps of several processes' streams."""
    states = [state for each in streams for state in each.state(list)["states"]]
    return {**streams[0].state(list), "states": states}


def training_numbers(shards) -> set[int]:
    names = {}
    for shard in stream.list_shards(tiny_data(shards)):
        names |= {record.name: int(record.captions[0].split()[1]) for record in stream.records_of(shard, tiny_data(shards))}
    return {number for name, number in names.items() if hash_fraction(name) >= HELD_OUT_SHARE}


def tiny_data(shards):
    from sfumato.training.config.schema import DataConfig

    return DataConfig(name=str(shards), stream=True)


def test_each_record_is_read_once_an_epoch_and_held_out_ones_never(config, shards):
    """In the first epoch of each lane, in the second, and in another order."""
    expected = training_numbers(shards)
    assert 300 < len(expected) < 400
    one = open_stream(config)
    lanes = {n: stream.Lane(one.shards, config, n, one.num_lanes, LaneState()) for n in one.numbers}
    epochs = {0: [], 1: []}
    for lane in lanes.values():
        while (taken := lane.take())[0] < 2:
            epochs[taken[0]].append(int(taken[1].captions[0].split()[1]))
    for numbers in epochs.values():
        assert len(numbers) == len(expected) and set(numbers) == expected
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_processes_reads_the_same_in_the_same_order(config, world):
    expected = read([open_stream(config)], 60)
    found = read([open_stream(config, rank, world, batch=8 // world) for rank in range(world)], 60)
    assert found == expected


@pytest.mark.parametrize("batches", [1, 7, 33, 61])
def test_it_goes_on_in_the_middle_of_a_shard(config, batches):
    first = open_stream(config)
    iterator = iter(first)
    for _ in range(batches):
        next(iterator)
    state = first.state(list)
    expected = [numbers_of(next(iterator)) for _ in range(20)]
    again = iter(open_stream(config, state=state, start=8 * batches))
    assert [numbers_of(next(again)) for _ in range(20)] == expected


def test_another_number_of_processes_reads_what_is_left(config, shards):
    """Two processes begin; four of the same batch go on, then one: every record of the epoch once, none twice."""
    expected, seen = training_numbers(shards), []
    state, images = {}, 0
    lanes = None
    for world, count in ((2, 5), (4, 4), (1, 100)):
        streams = [open_stream(config, rank, world, state=state, start=images) for rank in range(world)]
        lanes = lanes or streams[0].num_lanes
        assert streams[0].num_lanes == lanes
        for batches in islice(zip(*map(iter, streams)), count):
            for batch in batches:
                epochs = (batch["sample_key"] >> 32).tolist()
                seen += [number for number, epoch in zip(numbers_of(batch), epochs) if epoch == 0]
        state, images = whole(streams), images + 8 * world * count
    assert len(seen) == len(set(seen)) and set(seen) == expected


def test_more_lanes_than_shards_share_them(config, tmp_path):
    write_shard(tmp_path / "one.tar", range(64))
    expected = read([open_stream(config, name=str(tmp_path / "one.tar"))], 7)[0]
    four = [open_stream(config, rank, 4, batch=2, name=str(tmp_path / "one.tar")) for rank in range(4)]
    assert four[0].num_lanes == 4
    seen = Counter()
    for batches in islice(zip(*map(iter, four)), 8):
        for batch in batches:
            seen.update(n for n, e in zip(numbers_of(batch), (batch["sample_key"] >> 32).tolist()) if e == 0)
    assert set(seen.values()) == {1} and set(seen) >= set(expected) - {None}


def test_workers_change_nothing(config):
    expected = read([open_stream(config)], 12)
    with_workers = replace(config, train=replace(config.train, num_workers=2))
    assert read([open_stream(with_workers)], 12) == expected


def test_processes_that_do_not_go_with_the_lanes_are_told(config):
    state = open_stream(config, batch=8).state(list)
    with pytest.raises(ValueError, match="in 8 lanes"):
        open_stream(config, 0, 3, state=state)
    with pytest.raises(ValueError, match="in 8 lanes"):
        open_stream(config, 0, 1, batch=12, state=state)
    with pytest.raises(ValueError, match="data.stream_buffer was 64"):
        open_stream(config, state=state, stream_buffer=128)


def test_other_shards_are_told(config, shards, tmp_path):
    state = open_stream(config).state(list)
    write_shard(tmp_path / "other.tar", range(64))
    with pytest.raises(ValueError, match="no longer those"):
        open_stream(config, name=str(tmp_path), state={**state, "states": [asdict(LaneState())] * 8})


def test_bad_records_are_passed_over_counted_and_named(config, tmp_path):
    for k in range(8):
        write_shard(tmp_path / f"{k}.tar", range(40 * k, 40 * k + 40), bad={40 * k + 3})
    broken = (tmp_path / "7.tar").read_bytes()
    (tmp_path / "7.tar").write_bytes(broken[: len(broken) // 2 + 100])
    bad = open_stream(config, name=str(tmp_path))
    numbers, _ = read([bad], 60)
    assert not {n % 40 for n in numbers} & {3}
    said = "\n".join(bad.new_messages())
    assert "not an image" in said and "damaged archive" in said and "7.tar" in said
    assert not bad.new_messages()


def test_too_many_bad_records_end_the_run(config, tmp_path, monkeypatch):
    write_shard(tmp_path / "bad.tar", range(1500), bad=range(0, 1500, 10))
    with pytest.raises(ValueError, match="cannot be used.*data.max_bad_share"):
        read([open_stream(config, batch=1, name=str(tmp_path))], 1500)


def test_a_set_without_any_is_told(config, tmp_path):
    write_shard(tmp_path / "bad.tar", range(20), bad=range(20))
    with pytest.raises(ValueError, match="cannot be used"):
        read([open_stream(config, name=str(tmp_path))], 1)


class Quiet(http.server.SimpleHTTPRequestHandler):
    failures = 0
    cuts = 0

    def do_GET(self):
        if Quiet.failures:
            Quiet.failures -= 1
            self.send_error(503)
        elif Quiet.cuts:
            Quiet.cuts -= 1
            self.send_response(200)
            self.send_header("Content-Length", "10240")
            self.end_headers()
            self.wfile.write(b"cut off")
        else:
            super().do_GET()

    def log_message(self, *arguments):
        """Nothing."""


@pytest.fixture
def address(shards):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(shards)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/shard-{{000..009}}.tar"
    server.shutdown()


def test_a_web_server_gives_the_same_and_nothing_stays(config, address, monkeypatch, tmp_path):
    expected = read([open_stream(config)], 30)
    monkeypatch.setattr(stream, "SECONDS_BETWEEN", 0.01)
    Quiet.failures, Quiet.cuts = 1, 2
    remote = open_stream(config, name=address)
    assert read([remote], 30) == expected and Quiet.failures == Quiet.cuts == 0
    del remote
    left = [path for path in (tmp_path / "cache" / "stream").rglob("*.tar")]
    assert len(left) <= 10


def test_parquet_is_read_as_well(config, tmp_path):
    import datasets

    for k in range(8):
        rows = {
            "image": [{"bytes": png(40 * k + i), "path": None} for i in range(40)],
            "text": [f"number {i}" for i in range(40)],
        }
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / f"part-{k}.parquet"))
    numbers, _ = read([open_stream(config, name=str(tmp_path))], 30)
    assert len(set(numbers)) == len(numbers) == 240


def test_a_run_learns_from_a_stream_and_goes_on_bit_for_bit(tmp_path, shards):
    """With its captions from the stream's beginning, and its held-out images by the same names."""
    data = {"name": str(shards), "resolution": 8, "stream": True, "stream_buffer": 64, "stream_sample": 200}
    unet = {"block_out_channels": [8, 16]}

    def weights(folder, *overrides):
        folder.mkdir(exist_ok=True)
        path = tiny.config_file(folder, data=data, unet=unet, train={"max_steps": 8}, checkpoint={"every_steps": 3, "keep": 9})
        assert main([str(path), *overrides]) == 0
        return load_file(folder / "run" / "checkpoints" / "step-00000008" / "state.safetensors")

    expected = weights(tmp_path / "whole")
    images = prepare(load_config(tmp_path / "whole" / "tiny.yaml").data)
    assert 150 < len(images) < 210 and len(images.select("held_out"))
    for step in (6, 8):
        shutil.rmtree(tmp_path / "whole" / "run" / "checkpoints" / f"step-{step:08d}")
    found = weights(tmp_path / "whole", "checkpoint.resume=auto")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def train_and_note(path, seen, world: int, *overrides, moments=None) -> list[int]:
    """Exit codes of a run on so many processes, which write the numbers of every batch into a file of the folder `seen`."""
    seen.mkdir()

    def note(rank):
        real = Stream.__iter__

        def noted(self):
            for batch in real(self):
                with open(seen / str(rank), "a") as file:
                    file.write(" ".join(map(str, numbers_of(batch))) + "\n")
                yield batch

        Stream.__iter__ = noted

    return crashes.train(path, *overrides, world=world, moments=moments, before=note)


def noted_batches(seen, world: int) -> list[list[int]]:
    """The numbers of every batch of all processes, in their order."""
    parts = [[list(map(int, line.split())) for line in (seen / str(rank)).read_text().splitlines()] for rank in range(world)]
    return [sum(rows, []) for rows in zip(*parts)]


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("first", "then"),
    [(1, 1), pytest.param(2, 2, marks=slow), pytest.param(4, 4, marks=slow), pytest.param(4, 1, marks=slow)],
)
def test_a_killed_run_sees_each_record_as_if_it_had_not_been(tmp_path, shards, first, then):
    """Killed while it saves in the middle of shards, and taken up again on as many processes or on others."""

    def config_for(name, world):
        data = {"name": str(shards), "resolution": 8, "stream": True, "stream_buffer": 64, "stream_sample": 200}
        (tmp_path / name).mkdir(exist_ok=True)
        return tiny.config_file(
            tmp_path / name,
            data=data,
            unet={"block_out_channels": [8, 16]},
            train={"max_steps": 12, "batch_size": 8 // world},
            checkpoint={"every_steps": 5},
        )

    seen = {name: tmp_path / f"seen-{name}" for name in ("whole", "killed", "resumed")}
    assert train_and_note(config_for("whole", first), seen["whole"], first) == [0] * first
    expected = noted_batches(seen["whole"], first)
    codes = train_and_note(config_for("killed", first), seen["killed"], first, moments=(2, 4, False))
    assert codes[0] == -signal.SIGKILL
    again = config_for("killed", then)
    assert train_and_note(again, seen["resumed"], then, "checkpoint.resume=auto") == [0] * then
    found = noted_batches(seen["killed"], first)[:5] + noted_batches(seen["resumed"], then)
    assert found == expected and len(found) == 12
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()]
        for name in ("killed", "whole")
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    if first == then <= 2:  # of more than two processes, gradients are added up in another order after a resume
        assert crashes.result(tmp_path / "killed" / "run") == crashes.result(tmp_path / "whole" / "run")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["data.name=shapes"], "draws its own"),
        (["data.cache_latents=true"], "keeps nothing"),
        (["data.max_records=5"], "has no end"),
        (["data.stream=false", "data.name=https://example.org/x.tar"], "data.stream=true"),
    ],
)
def test_what_cannot_be_is_told(tmp_path, shards, capsys, changes, said):
    path = tiny.config_file(tmp_path, data={"name": str(shards), "resolution": 8, "stream": True})
    assert main([str(path), *changes]) == 2
    assert said in capsys.readouterr().err
