"""Folders of clips, `.mp4` and similar, with their captions in metadata.csv, .tsv or .jsonl.

`data.name=videos:FOLDER` also reads animated `.gif`, `.webp` and `.png`, which are otherwise read as images of one frame.
Video files need the extra `video`. Each clip yields as many frames as `data.channels` holds, evenly spaced from the first to
the last.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
from PIL import Image

from sfumato.figures import open_image
from sfumato.pipelines.codecs.clips import VideoCodec
from sfumato.pipelines.images import to_8_bits
from sfumato.registries import SOURCES
from sfumato.training.config.schema import DataConfig
from sfumato.training.data.images import MAX_PIXELS, fit
from sfumato.training.data.records import Record, is_hidden, kind_of
from sfumato.training.data.sources import folder

ANIMATED = (".gif", ".webp", ".png", ".apng")
MAX_FRAMES = 100_000


def open_codec(config: DataConfig, files: list[Path]) -> VideoCodec:
    """Three channels for each frame.

    Raises:
        ValueError: the channels do not make up whole frames.
    """
    if config.channels % 3 or config.channels < 6:
        raise ValueError(f"data.channels={config.channels}: clips need three for each frame, such as 24 for eight frames")
    return VideoCodec(config.channels // 3, *config.size)


def open_source(config: DataConfig, files: list[Path]) -> Iterator[Record]:
    """A record for each clip.

    Raises:
        ValueError: there is no table, or the folder does not exist.
    """
    given, _, place = config.name.partition(":")
    if given == "videos":
        root = Path(place).expanduser()
        if not place or not root.is_dir():
            raise ValueError(f"data.name={config.name!r}: there is no folder {str(root)!r}; write videos:FOLDER")
        files = sorted(file for file in root.rglob("*") if file.is_file() and not is_hidden(file.relative_to(root)))
        config, files = replace(config, name=place), [file for file in files if kind_of(file.name) != "other"]
    count, films = config.channels // 3, SOURCES["videos"].claims
    fitted = partial(_fitted, size=config.size, resize=config.resize)
    readers = {ending: partial(read_film, count=count, fitted=fitted) for ending in films}
    if given == "videos":
        readers |= {ending: partial(read_animation, count=count, fitted=fitted) for ending in ANIMATED}
    return folder.described_objects(config, files, "clips", readers)


def _fitted(image: Image.Image, size: tuple[int, int], resize: str) -> np.ndarray:
    return fit(to_8_bits(image, 3, set()), size, 3, resize)


def chosen_frames(total: int, count: int) -> list[int]:
    """The indices of `count` out of `total` frames, evenly spaced from the first to the last.

    Raises:
        ValueError: there are fewer frames, or more than `MAX_FRAMES`.
    """
    if total < count:
        raise ValueError(f"{total} frames, fewer than {count}")
    if total > MAX_FRAMES:
        raise ValueError(f"more than {MAX_FRAMES:,} frames")
    return np.linspace(0, total - 1, count).round().astype(int).tolist()


def read_animation(path: Path, count: int, fitted) -> np.ndarray:
    """Frames of an animated image, `(count, H, W, 3)` uint8.

    Raises:
        ValueError: it cannot be used; the message says why.
    """
    try:
        with open_image(path) as image:
            _check_pixels(*image.size)
            frames = []
            for number in chosen_frames(getattr(image, "n_frames", 1), count):
                image.seek(number)
                frames.append(fitted(image.copy()))
    except (ValueError, ImportError):
        raise
    except Exception as error:  # Pillow raises almost anything on a damaged file
        raise ValueError("damaged clip") from error
    return np.stack(frames)


def read_film(path: Path, count: int, fitted) -> np.ndarray:
    """Frames of a video file, `(count, H, W, 3)` uint8.

    Raises:
        ValueError: it cannot be used; the message says why.
    """
    try:
        av = import_module("av")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("video files are read by PyAV: pip install 'sfumato[video]'") from error
    try:
        with av.open(str(path)) as film:
            if not film.streams.video:
                raise ValueError("no video in it")
            stream = film.streams.video[0]
            _check_pixels(stream.width, stream.height)
            total = sum(1 for packet in film.demux(stream) if packet.size)
            wanted = chosen_frames(total, count)
            film.seek(0)
            taken = _take(film.decode(stream), wanted)
            return np.stack([fitted(frame.to_image()) for frame in taken])
    except ValueError as error:
        # Some of PyAV's own errors are ValueErrors too.
        raise ValueError("damaged clip" if type(error).__module__.startswith("av") else str(error)) from error
    except Exception as error:  # PyAV raises almost anything on a damaged file
        raise ValueError("damaged clip") from error


def _take(frames: Iterable, wanted: list[int]) -> Iterator:
    """The frames whose indices are wanted, each as often as its index is listed.

    Raises:
        ValueError: the frames end too early.
    """
    left = list(wanted)
    for number, frame in enumerate(frames):
        while left and left[0] == number:
            left.pop(0)
            yield frame
        if not left:
            return
    raise ValueError("truncated: fewer frames than it claims")


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"more than {MAX_PIXELS // 1_000_000} megapixels")
