"""Folders of `.wav`, `.flac` and `.ogg` files with their captions in metadata.csv, .tsv or .jsonl.

Needs the extra `audio`. Sounds are mixed down to one channel and resampled to 16 kHz.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from math import gcd
from pathlib import Path

import numpy as np

from sfumato.pipelines.codecs.sounds import SoundCodec
from sfumato.training.config.schema import DataConfig
from sfumato.training.data.records import Record
from sfumato.training.data.sources import folder

ENDINGS = (".wav", ".flac", ".ogg")
BLOCKS = {side * side: (side, side) for side in (1, 2, 4, 8)}


def open_codec(config: DataConfig, files: list[Path]) -> SoundCodec:
    """A codec with as many bands and steps as the config's size and channels hold.

    Raises:
        ValueError: the number of channels is not one of `BLOCKS`.
    """
    if config.channels not in BLOCKS:
        raise ValueError(f"data.channels={config.channels}: sounds need one of {', '.join(map(str, BLOCKS))}, such as 4")
    block, (height, width) = BLOCKS[config.channels], config.size
    return SoundCodec(bands=height * block[0], steps=width * block[1], block=block)


def open_source(config: DataConfig, files: list[Path]) -> Iterator[Record]:
    """A record for each sound.

    Raises:
        ValueError: there is no table.
    """
    read = partial(read_sound, rate=SoundCodec().rate)
    return folder.described_objects(config, files, "sounds", {ending: read for ending in ENDINGS})


def read_sound(path: Path, rate: int) -> np.ndarray:
    """The samples of a file, one channel at `rate`, `(N,)` float32.

    Raises:
        ValueError: it cannot be used; the message says why.
    """
    try:
        import soundfile
        from scipy.signal import resample_poly
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("sounds are read by soundfile and scipy: pip install 'sfumato[audio]'") from error
    try:
        with soundfile.SoundFile(path) as file:
            own = file.samplerate
            sound = file.read(min(len(file), 600 * own), dtype="float32", always_2d=True).mean(1)
    except (RuntimeError, OSError, TypeError) as error:  # libsndfile's own errors are RuntimeErrors
        raise ValueError("damaged sound") from error
    if not 1000 <= own <= 400_000:
        raise ValueError(f"a sampling rate of {own} Hz")
    if not np.isfinite(sound).all():
        raise ValueError("samples that are not finite")
    if len(sound) < 64:
        raise ValueError("no sound in it")
    common = gcd(own, rate)
    return resample_poly(sound, rate // common, own // common).astype(np.float32).clip(-1, 1)


def classifier(known: Iterable[tuple[str, np.ndarray]], ridge: float = 1.0) -> dict:
    """The linear classifier of features that a codec's judge uses: ridge regression with one output column for each word."""
    labels, rows = zip(*known)
    words = sorted(set(labels))
    features = np.stack(rows)
    middle, spread = features.mean(0), features.std(0) + 1e-3
    scaled = (features - middle) / spread
    wanted = np.array([[label == word for word in words] for label in labels], float)
    weights = np.linalg.solve(scaled.T @ scaled + ridge * np.eye(scaled.shape[1]), scaled.T @ (wanted - wanted.mean(0)))
    weights = weights / spread[:, None]
    return {"words": words, "weights": np.round(np.vstack([weights, wanted.mean(0) - middle @ weights]), 4).tolist()}
