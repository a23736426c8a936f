"""The `melodies` data set: chords and melodies of three notes by six instruments, played in the same way as `notes`.

A fifth of the combinations of instrument and chord or melody are held out.
"""

import itertools
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from sfumato.pipelines.codecs.sounds import CHORDS, NOTE_SECONDS, NOTES, MelodyCodec
from sfumato.training.config.schema import DataConfig
from sfumato.training.data.records import Record
from sfumato.training.data.sources.notes import PROGRAMS, SETTINGS, TICKS, cut
from sfumato.training.data.sources.sounds import classifier

NATURALS = (60, 62, 64, 65, 67, 69, 71)  # C 4 to B 4
NUM_MELODIES = 60
LOUDNESS = (65, 85, 105)
COPIES = 2


def open_codec(config: DataConfig, files: list[Path]) -> MelodyCodec:
    """Like the codec of `notes`; the judge's references come from real training pieces."""
    codec, known = MelodyCodec(**SETTINGS), []
    for (instrument, piece), held_out in combinations():
        if not held_out:
            caption = caption_of(instrument, piece)
            known += [(instrument, codec.timbre(_play(instrument, piece, take, 0), caption)) for take in range(len(LOUDNESS))]
    return MelodyCodec(**SETTINGS, references={"instrument": classifier(known)})


def open_source(config: DataConfig, files: list[Path]) -> Iterator[Record]:
    """Each piece at every volume of `LOUDNESS`, `COPIES` times; held-out pieces only once."""
    for number, ((instrument, piece), held_out) in enumerate(combinations()):
        for take, copy in itertools.product(range(len(LOUDNESS)), range(COPIES)):
            if not held_out or (take, copy) == (1, 0):
                sound = _play(instrument, piece, take, copy)
                split = "held_out" if held_out else "train"
                caption = caption_of(instrument, piece)
                yield Record(f"{number}-{take}-{copy}", lambda sound=sound: sound, [caption], split)


@lru_cache(maxsize=1)
def pieces() -> tuple[tuple[int, ...], ...]:
    """MIDI numbers of all minor and major chords, with rising notes, and then of `NUM_MELODIES` melodies."""
    melodies = [each for each in itertools.product(NATURALS, repeat=3) if each[0] != each[1] != each[2]]
    melodies = [each for each in melodies if list(each) not in CHORDS]
    chosen = np.random.default_rng(0).permutation(len(melodies))[:NUM_MELODIES]
    return (*map(tuple, CHORDS), *(melodies[i] for i in chosen))


def combinations() -> list[tuple[tuple[str, tuple[int, ...]], bool]]:
    """Every combination of instrument and piece, and whether it is held out."""
    every = list(itertools.product(PROGRAMS, pieces()))
    held_out = set(np.random.default_rng(0).permutation(len(every))[: len(every) // 5].tolist())
    return [(each, i in held_out) for i, each in enumerate(every)]


def caption_of(instrument: str, piece: tuple[int, ...]) -> str:
    """A caption such as `a piano plays the chord C sharp minor` or `a violin plays C, E, D`."""
    article = "an" if instrument[0] in "aeiou" else "a"
    if list(piece) in CHORDS:
        kind = "minor" if piece[1] - piece[0] == 3 else "major"
        return f"{article} {instrument} plays the chord {NOTES[piece[0] % 12]} {kind}"
    return f"{article} {instrument} plays {', '.join(NOTES[pitch % 12] for pitch in piece)}"


def _play(instrument: str, piece: tuple[int, ...], take: int, copy: int) -> np.ndarray:
    """Just over a second of a piece."""
    scores = tuple((_score(each), loud) for each in pieces() for loud in LOUDNESS)
    number = pieces().index(piece) * len(LOUDNESS) + take
    return cut((instrument, scores), number, [number, copy])


def _score(piece: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    """Notes as `performance` takes them: those of a chord all at once, those of a melody one after another."""
    if list(piece) in CHORDS:
        return tuple((0, int(0.9 * TICKS), pitch) for pitch in piece)
    length = int(NOTE_SECONDS * TICKS)
    return tuple((k * length, length - TICKS // 50, pitch) for k, pitch in enumerate(piece))
