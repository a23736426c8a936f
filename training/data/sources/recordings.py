"""The `recordings` data set: real recordings of a woman saying the numbers below a hundred; `forty seven` is joined from two.

They are Asterisk's prompts, spoken by Allison Smith, 8 kHz, CC BY-SA 3.0 (Debian: `apt install
asterisk-core-sounds-en-wav`). A fifth of the numbers that are joined from two words are held out.
"""

from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from sfumato.pipelines.codecs.sounds import SPOKEN_NUMBERS, RecordingCodec
from sfumato.training.config.schema import DataConfig
from sfumato.training.data.records import Record
from sfumato.training.data.sources.sounds import read_sound
from sfumato.training.data.sources.speech import trimmed

FOLDERS = ("/usr/share/asterisk/sounds/en_US_f_Allison", "/usr/share/asterisk/sounds/en")
SETTINGS = {"bands": 64, "steps": 128, "block": (2, 4)}  # two seconds
TAKES, HELD_OUT_TAKES = 48, 4


def open_codec(config: DataConfig, files: list[Path]) -> RecordingCodec:
    """Two seconds at 16 kHz, 64 x 128 cells."""
    return RecordingCodec(**SETTINGS)


def open_source(config: DataConfig, files: list[Path]) -> Iterator[Record]:
    """`TAKES` clips of each number, with random volume, pause between the words and start."""
    joined = [number for number in range(100) if number > 20 and number % 10]
    held_out = {joined[i] for i in np.random.default_rng(0).permutation(len(joined))[: len(joined) // 5]}
    for take in range(TAKES):
        for number in range(100):
            if number not in held_out or take < HELD_OUT_TAKES:
                split = "held_out" if number in held_out else "train"
                yield Record(f"{number}-{take}", partial(_say, number, take), [caption_of(number)], split)


def caption_of(number: int) -> str:
    """A caption such as `a recorded woman says forty seven`."""
    return f"a recorded woman says {SPOKEN_NUMBERS[number]}"


def _say(number: int, take: int) -> np.ndarray:
    rng = np.random.default_rng([number, take])
    parts = [number] if number <= 20 or number % 10 == 0 else [number // 10 * 10, number % 10]
    pieces = [np.zeros(int(rng.integers(0, 1600)), np.float32)]
    for part in parts:
        pieces += [recording(part), np.zeros(int(rng.integers(0, 800)), np.float32)]
    return np.concatenate(pieces) * np.float32(rng.uniform(0.7, 1))


@lru_cache(maxsize=128)
def recording(number: int) -> np.ndarray:
    """One recorded word, without the silence around it.

    Raises:
        ModuleNotFoundError: the recordings are not installed.
    """
    folder = next((Path(name) for name in FOLDERS if Path(name, "digits").is_dir()), None)
    if folder is None:
        raise ModuleNotFoundError("the recordings come with Asterisk: apt install asterisk-core-sounds-en-wav")
    return trimmed(read_sound(folder / "digits" / f"{number}.wav", RecordingCodec().rate))
