"""The random streams of samples: the published bits, the right distribution, independence, and the version of old runs."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from sfumato.training.data.streams import (
    STREAM_VERSION,
    PhiloxStreams,
    SeededStreams,
    Stream,
    noise_for,
    philox,
    streams_of,
)

KEYS = torch.arange(4000) + (3 << 32)


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, expected):
    """The known answers of Random123 for philox4x32-10."""
    words = philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(word) for word in words) == expected


def test_normal_numbers_are_normal():
    noise = PhiloxStreams(0).normal(KEYS, Stream.NOISE, (3, 5, 7)).double().numpy()
    assert noise.shape == (4000, 3, 5, 7) and np.isfinite(noise).all()
    values = noise.ravel()
    assert abs(values.mean()) < 0.006 and abs(values.std() - 1) < 0.004
    assert abs(stats.skew(values)) < 0.012 and abs(stats.kurtosis(values)) < 0.025
    assert stats.kstest(values[:: len(values) // 100_000], "norm").pvalue > 1e-3
    assert 4.2 < np.abs(values).max() < 6.8


def test_uniform_numbers_and_integers_are_even():
    streams = PhiloxStreams(1)
    u = streams.uniform(KEYS, Stream.LEVEL).double().numpy()
    assert 0 <= u.min() and u.max() < 1 and stats.kstest(u, "uniform").pvalue > 1e-3
    counts = np.bincount(streams.integers(KEYS, Stream.LOW_RES_LEVEL, 7).numpy(), minlength=7)
    assert len(counts) == 7 and stats.chisquare(counts).pvalue > 1e-3


def test_samples_streams_epochs_and_seeds_are_independent():
    """No two of them are correlated, at any lag, by more than chance."""
    keys = torch.arange(64)
    rows = {
        "noise": PhiloxStreams(0).normal(keys, Stream.NOISE, (1000,)),
        "other stream": PhiloxStreams(0).normal(keys, Stream.OFFSET, (1000,)),
        "other epoch": PhiloxStreams(0).normal(keys + (1 << 32), Stream.NOISE, (1000,)),
        "other seed": PhiloxStreams(1).normal(keys, Stream.NOISE, (1000,)),
        "seed beyond 32 bits": PhiloxStreams(1 << 40).normal(keys, Stream.NOISE, (1000,)),
    }
    for (name, a), (other, b) in itertools.combinations(rows.items(), 2):
        assert not torch.equal(a, b)
        correlation = (a * b).mean()
        assert abs(correlation) < 4 / 64_000**0.5, f"{name} and {other}: {correlation}"
    noise = rows["noise"]
    between = noise @ noise.T / 1000 - torch.eye(64) * noise.square().mean(1)
    assert between.abs().max() < 5 / 1000**0.5, "of different samples"


def test_what_a_sample_gets_depends_on_its_key_alone():
    """Not on the batch, its order, nor on how much of the noise is wanted in all."""
    streams, shape = PhiloxStreams(5), (3, 8, 8)
    whole = streams.normal(KEYS[:10], Stream.NOISE, shape)
    assert torch.equal(streams.normal(KEYS[3:4], Stream.NOISE, shape)[0], whole[3])
    assert torch.equal(streams.normal(KEYS[:10].flip(0), Stream.NOISE, shape).flip(0), whole)
    several = streams.normal(KEYS[:10], Stream.NOISE, (4, *shape))
    assert torch.equal(several[:, 0], whole), "the first candidate is the noise without candidates"
    choices = streams.choices(np.array([3, 3]), np.array([0, 7]), np.array([5, 2]), True)
    alone = streams.choices(np.array([3]), np.array([7]), np.array([2]), True)
    assert choices.key[1] == alone.key[0] == KEYS[7] and choices.caption[1] == alone.caption[0]
    assert choices.dropout[1] == alone.dropout[0] == float(streams.uniform(KEYS[7:8], Stream.DROPOUT))


def test_captions_are_chosen_evenly_and_never_past_the_last():
    index = np.arange(20_000)
    choices = PhiloxStreams(0).choices(np.zeros_like(index), index, np.full(len(index), 3), False)
    counts = np.bincount(choices.caption)
    assert len(counts) == 3 and stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_bits_are_the_same_on_a_gpu():
    streams, keys = PhiloxStreams(5), KEYS[:100]
    assert torch.equal(streams.words(keys.cuda(), Stream.NOISE, 50).cpu(), streams.words(keys, Stream.NOISE, 50))
    on_gpu = streams.normal(keys.cuda(), Stream.NOISE, (3, 8, 8)).cpu()
    torch.testing.assert_close(on_gpu, streams.normal(keys, Stream.NOISE, (3, 8, 8)), rtol=0, atol=1e-6)


def test_old_runs_keep_their_streams_and_new_ones_have_version_2():
    assert STREAM_VERSION == 2 and isinstance(streams_of(2, 0), PhiloxStreams)
    old, keys = streams_of(1, 0), torch.tensor([5, 6])
    assert isinstance(old, SeededStreams)
    expected = noise_for(keys, (3, 4, 4), torch.device("cpu"))
    assert torch.equal(old.normal(keys, Stream.NOISE, (3, 4, 4)), expected)
    with pytest.raises(ValueError, match="version 3 of the streams, which needs a later sfumato"):
        streams_of(3, 0)


def test_stream_numbers_never_change():
    assert {stream.name: stream.value for stream in Stream} == {
        "CAPTION": 0, "DROPOUT": 1, "FLIP": 2, "LEVEL": 3, "NOISE": 4, "OFFSET": 5, "MASK": 6, "ESTIMATE": 7,
        "LOW_RES_LEVEL": 8, "LOW_RES_NOISE": 9, "LAYERS": 10, "STEP_KIND": 11, "OWN_STEP": 12, "GUIDANCE": 13,
        "LARGE_GUIDANCE": 14,
        "EMPTY": 15,
    }  # fmt: skip
