"""The `notes` data set: notes of two octaves by six instruments, played by fluidsynth from a General MIDI soundfont.

Needs the program and a soundfont (Debian: `apt install --no-install-recommends fluidsynth timgm6mb-soundfont`). Each note is
held out for one of the instruments.
"""

import itertools
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from sfumato.pipelines.codecs.sounds import NOTES, NoteCodec
from sfumato.training.config.schema import DataConfig
from sfumato.training.data.records import Record
from sfumato.training.data.sources.sounds import classifier, read_sound

PROGRAMS = {"piano": 0, "organ": 19, "guitar": 24, "violin": 40, "trumpet": 56, "flute": 73}  # program numbers of General MIDI
TICKS = 1000  # per second
PITCHES = range(60, 84)  # C 4 to B 5
LOUDNESS = (50, 65, 80, 95, 110, 125)  # MIDI velocities, one for each take
COPIES = 3  # of each take, each with a different start
FONTS = ("/usr/share/sounds/sf2/TimGM6mb.sf2", "/usr/share/sounds/sf2/default-GM.sf2", "/usr/share/sounds/sf2/FluidR3_GM.sf2")
SETTINGS = {"bands": 128, "steps": 32, "hop": 512, "window": 2048, "block": (8, 2), "lowest": 200.0}


def open_codec(config: DataConfig, files: list[Path]) -> NoteCodec:
    """One second at 16 kHz in 128 bands, 24 per octave; the judge's references come from real training notes."""
    codec, known = NoteCodec(**SETTINGS), []
    for (instrument, pitch), held_out in combinations():
        if not held_out:
            known += [(instrument, codec.features(_play(instrument, pitch, take, 0), pitch)) for take in range(len(LOUDNESS))]
    return NoteCodec(**SETTINGS, references={"instrument": classifier(known)})


def open_source(config: DataConfig, files: list[Path]) -> Iterator[Record]:
    """Each note at every volume of `LOUDNESS`, `COPIES` times; held-out notes only once."""
    for number, ((instrument, pitch), held_out) in enumerate(combinations()):
        for take, copy in itertools.product(range(len(LOUDNESS)), range(COPIES)):
            if not held_out or (take, copy) == (3, 0):
                sound = _play(instrument, pitch, take, copy)
                split = "held_out" if held_out else "train"
                caption = caption_of(instrument, pitch)
                yield Record(f"{number}-{take}-{copy}", lambda sound=sound: sound, [caption], split)


def combinations() -> list[tuple[tuple[str, int], bool]]:
    """Each instrument with each MIDI number, and whether the pair is held out: one instrument per number, evenly spread.

    A random choice may leave a note with too few instruments to learn it from.
    """
    left_out = np.random.default_rng(0).permutation(len(PITCHES)) % len(PROGRAMS)
    return [
        ((instrument, pitch), bool(left_out[note] == number))
        for number, instrument in enumerate(PROGRAMS)
        for note, pitch in enumerate(PITCHES)
    ]


def caption_of(instrument: str, pitch: int) -> str:
    """A caption such as `a piano plays C sharp 4`."""
    article = "an" if instrument[0] in "aeiou" else "a"
    return f"{article} {instrument} plays {NOTES[pitch % 12]} {pitch // 12 - 1}"


def _play(instrument: str, pitch: int, take: int, copy: int) -> np.ndarray:
    """A note of 0.9 seconds that begins within a tenth of a second, normalised in volume."""
    pieces = tuple((((0, 900, each),), loud) for each in PITCHES for loud in LOUDNESS)
    return cut((instrument, pieces), (pitch - PITCHES[0]) * len(LOUDNESS) + take, [pitch, take, copy])


def cut(played: tuple[str, tuple], number: int, seed: list[int]) -> np.ndarray:
    """Just over a second of one of the pieces of `performance`, beginning within a tenth of a second, normalised in volume."""
    rate = NoteCodec().rate
    sound = performance(*played)[2 * rate * number :][: rate + rate // 20]
    late = int(np.random.default_rng(seed).integers(0, rate // 10))
    return np.pad(0.7 * sound / max(np.abs(sound).max(), 1e-6), (late, 0)).astype(np.float32)


@lru_cache(maxsize=len(PROGRAMS))
def performance(instrument: str, pieces: tuple) -> np.ndarray:
    """Play pieces, two seconds each. A piece is its notes, as (start, length, MIDI number) in ticks, and a velocity."""
    font = next((path for path in FONTS if Path(path).is_file()), None)
    if shutil.which("fluidsynth") is None or font is None:
        packages = "fluidsynth timgm6mb-soundfont"
        raise ModuleNotFoundError(f"notes are played by fluidsynth: apt install --no-install-recommends {packages}")
    with tempfile.TemporaryDirectory() as folder:
        score, out = Path(folder, "score.mid"), Path(folder, "played.wav")
        score.write_bytes(_midi(PROGRAMS[instrument], pieces))
        plain = ["-ni", "-q", "-g", "0.6", "-R", "0", "-C", "0", "-r", "32000"]  # no reverberation, no chorus
        command = ["fluidsynth", *plain, "-F", str(out), font, str(score)]
        subprocess.run(command, check=True, capture_output=True, timeout=600)
        return read_sound(out, NoteCodec().rate)


def _midi(program: int, pieces: tuple) -> bytes:
    """A Standard MIDI file with one piece every two seconds."""
    events, now = struct.pack(">BBB", 0, 0xC0, program), 0
    moments = []
    for number, (notes, loud) in enumerate(pieces):
        for start, length, pitch in notes:
            at = 2 * TICKS * number + start
            moments += [(at, 1, bytes((0x90, pitch, loud))), (at + length, 0, bytes((0x80, pitch, 0)))]
    for at, _, event in sorted(moments):
        events += _ticks(at - now) + event
        now = at
    tempo = bytes((0, 0xFF, 0x51, 3)) + (1_000_000).to_bytes(3, "big")
    track = tempo + events + _ticks(2 * TICKS * len(pieces) - now) + bytes((0xFF, 0x2F, 0))
    return b"MThd" + struct.pack(">IHHH", 6, 0, 1, TICKS) + b"MTrk" + struct.pack(">I", len(track)) + track


def _ticks(number: int) -> bytes:
    """A duration as a MIDI variable-length number, seven bits per byte."""
    parts = [number & 0x7F]
    while number := number >> 7:
        parts.append(number & 0x7F | 0x80)
    return bytes(reversed(parts))
