"""The `speech` data set: digits spoken by espeak-ng and flite, with captions that give voice, accent and pace.

Needs both programs (Debian: `apt install espeak-ng flite`). A fifth of the combinations of word, voice and accent are held
out.
"""

import itertools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from sfumato.pipelines.codecs.sounds import PACES, WORDS, SpeechCodec
from sfumato.training.config.schema import DataConfig
from sfumato.training.data.records import Record
from sfumato.training.data.sources.sounds import classifier, read_sound

VOICES = {"man": ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8"), "woman": ("f1", "f2", "f3", "f4", "f5")}
# `en` is British; for `en-gb`, espeak-ng has only one voice, a man's.
ACCENTS = {"an American": "en-us", "a British": "en", "a Scottish": "en-gb-scotland"}
RECORDED = {("man", "an American"): ("rms", "kal16"), ("woman", "an American"): ("slt",), ("man", "a Scottish"): ("awb",)}
HEIGHT = {"man": (20, 45), "woman": (65, 95)}  # range of espeak-ng's pitch, which goes from 0 to 99
SPEED = {"slowly": 100, "": 160, "quickly": 250}  # words per minute
TAKES = 24  # clips of each caption
HELD_OUT_TAKES = 2


def open_codec(config: DataConfig, files: list[Path]) -> SpeechCodec:
    """One second at 16 kHz, 64 x 64 cells; the judge's references come from real training clips."""
    codec, known = SpeechCodec(), []
    for (word, voice, accent, pace), held_out in combinations():
        if not held_out:
            known += [(voice, f"{word} {pace}".strip(), _say(word, voice, accent, pace, take)) for take in range(4)]
    lengths: dict[str, list[float]] = {}
    for _, said, sound in known:
        lengths.setdefault(said, []).append(float(np.log(codec.seconds(sound))))
    pace = {said: round(float(np.mean(numbers)), 4) for said, numbers in lengths.items()}
    heard = [(v, codec.features(each)) for v, _, sound in known for each in (sound, codec.decode(codec.encode(sound)))]
    return SpeechCodec(references={"voice": classifier(heard), "pace": pace})


def open_source(config: DataConfig, files: list[Path]) -> Iterator[Record]:
    """`TAKES` clips of each caption, in several voices at several pitches."""
    for take in range(TAKES):
        for number, (words, held_out) in enumerate(combinations()):
            if not held_out or take < HELD_OUT_TAKES:
                split = "held_out" if held_out else "train"
                yield Record(f"{number}-{take}", partial(_say, *words, take), [caption_of(*words)], split)


def combinations() -> list[tuple[tuple[str, str, str, str], bool]]:
    """Every combination of word, voice, accent and pace, and whether it is held out."""
    speakers = list(itertools.product(WORDS, VOICES, ACCENTS))
    held_out = set(np.random.default_rng(0).permutation(len(speakers))[: len(speakers) // 5].tolist())
    return [((*speaker, pace), i in held_out) for i, speaker in enumerate(speakers) for pace in PACES]


def caption_of(word: str, voice: str, accent: str, pace: str) -> str:
    """A caption such as `a Scottish woman says seven quickly`."""
    return f"{accent} {voice} says {word} {pace}".strip()


def _say(word: str, voice: str, accent: str, pace: str, take: int) -> np.ndarray:
    """A clip without silence around it, normalised in volume, that begins within a tenth of a second."""
    rng = np.random.default_rng([WORDS.index(word), list(VOICES).index(voice), list(ACCENTS).index(accent), take])
    recorded = RECORDED.get((voice, accent), ())
    if recorded and rng.random() < 0.25:
        stretch = SPEED[""] / SPEED[pace] * rng.uniform(0.95, 1.05)
        options = ["-voice", str(rng.choice(recorded)), "--setf", f"duration_stretch={stretch:.2f}"]
        sound = _said("flite", *options, "-t", word, "-o")
    else:
        speed, pitch = SPEED[pace] * rng.uniform(0.95, 1.05), rng.integers(*HEIGHT[voice])
        sound = with_espeak(word, f"{ACCENTS[accent]}+{rng.choice(VOICES[voice])}", round(speed), int(pitch))
    return np.pad(trimmed(sound), (int(rng.integers(0, 1600)), 0))


def with_espeak(text: str, voice: str, speed: int, pitch: int) -> np.ndarray:
    """A text spoken by espeak-ng; `speed` is in words per minute, `pitch` from 0 to 99."""
    return _said("espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), text, "-w")


def trimmed(sound: np.ndarray) -> np.ndarray:
    """A sound normalised in volume, without the silence around it."""
    power = np.convolve(sound**2, np.ones(160) / 160, "same")
    heard = np.flatnonzero(power > 1e-3 * power.max())
    sound = sound[max(0, heard[0] - 320) : heard[-1] + 320]
    return (0.7 * sound / np.abs(sound).max()).astype(np.float32)


def _said(*command: str) -> np.ndarray:
    """The samples of the file that a command writes; the file name is passed as the last argument."""
    if shutil.which(command[0]) is None:
        raise ModuleNotFoundError(f"speech is made by the programs espeak-ng and flite: apt install {command[0]}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "said.wav")
        subprocess.run([*command, str(file)], check=True, capture_output=True, timeout=60)
        return read_sound(file, SpeechCodec().rate)
