"""Sounds as spectrograms, with blocks of cells in the channels; the waveform is recovered by Griffin-Lim.

Decoding and writing `.wav` need only numpy. Judging spoken words needs pocketsphinx, notes need librosa (extra `audio`).
"""

import re
import wave
from functools import cached_property

import numpy as np

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PACES = ("slowly", "", "quickly")
NOTES = ("C", "C sharp", "D", "D sharp", "E", "F", "F sharp", "G", "G sharp", "A", "A sharp", "B")


class SoundCodec:
    """A sound is `(N,)` float32 samples in [-1, 1], `rate` per second; longer ones are cut, shorter ones end in silence.

    Args:
        rate: samples per second.
        bands, steps: pitch bands and time steps of the spectrogram; a step is `hop` samples long.
        window: samples in the window of one step.
        block: how many bands and steps become the channels of one array position.
        lowest: None for bands evenly spaced in mel; a frequency in Hz for even spacing in octaves from there, which
            separates notes.
        references: what the judge compares with, from real sounds: a kind of word -> word -> numbers.
    """

    kind, version, stored = "sounds", 1, "uint8"
    endings = (".wav", ".npy")
    quiet, loud = -0.5, 2.0  # ends of the scale, as log10 of a band's amplitude

    def __init__(self, rate=16000, bands=64, steps=64, hop=256, window=1024, block=(2, 2), lowest=None, references=None):
        self.rate = int(rate)
        self.bands = int(bands)
        self.steps = int(steps)
        self.hop = int(hop)
        self.window = int(window)
        self.block = tuple(int(side) for side in block)
        self.lowest = lowest
        self.references = references or {}
        if min(self.rate, self.bands, self.steps, self.hop, self.window, *self.block) < 1 or self.window < self.hop:
            raise ValueError("sizes must be 1 or more, and the window must not be shorter than a step")
        if len(self.block) != 2 or self.bands % self.block[0] or self.steps % self.block[1]:
            raise ValueError(f"blocks of {self.block} do not divide {self.bands} bands and {self.steps} steps")
        self.shape = (self.bands // self.block[0], self.steps // self.block[1], self.block[0] * self.block[1])
        self.length = self.steps * self.hop

    def describe(self):
        """See `pipelines.codecs`."""
        names = ("rate", "bands", "steps", "hop", "window", "lowest", "references")
        settings = {**{name: getattr(self, name) for name in names}, "block": list(self.block)}
        return {
            "kind": self.kind, "version": self.version, "settings": settings, "shape": list(self.shape),
            "axes": ["pitch, low to high", "time", "cell of a block, pitch first"],
            "units": f"0 to 1 for log10 of a band's amplitude from {self.quiet} to {self.loud}",
        }  # fmt: skip

    def encode(self, thing):
        """Samples to the blocks of a spectrogram.

        Raises:
            ValueError: not one channel of finite numbers, or only silence.
        """
        sound = np.asarray(thing)
        if sound.ndim != 1 or sound.dtype.kind != "f" or not np.isfinite(sound).all():
            raise ValueError("a sound must be one channel of finite samples in [-1, 1]")
        if not len(sound) or np.abs(sound).max() < 1e-4:
            raise ValueError("silence")
        whole = np.zeros(self.length)
        whole[: min(len(sound), self.length)] = sound[: self.length]
        levels = np.log10(np.maximum(self._bands @ np.abs(self._spectrum(whole)), 1e-9))
        cells = ((levels - self.quiet) / (self.loud - self.quiet)).clip(0, 1)
        cells = cells.reshape(self.shape[0], self.block[0], self.shape[1], self.block[1])
        return cells.transpose(0, 2, 1, 3).reshape(self.shape).astype(np.float32)

    def levels(self, array):
        """The spectrogram of an array, `(bands, steps)` in [0, 1], low pitches first."""
        cells = np.asarray(array, np.float64).reshape(*self.shape[:2], *self.block).transpose(0, 2, 1, 3)
        return cells.reshape(self.bands, self.steps).clip(0, 1)

    def decode(self, array, rounds: int = 32):
        """Blocks to samples: amplitudes interpolated between band centres, phases by Griffin and Lim (1984) with the momentum
        of Perraudin et al. (2013). Deterministic.
        """
        levels = self.levels(array)
        bands = np.where(levels > 0, 10 ** (self.quiet + levels * (self.loud - self.quiet)), 0)
        amplitudes = np.maximum(self._inverse @ bands, 0)
        phases = np.exp(2j * np.pi * np.random.default_rng(0).random(amplitudes.shape))
        last = np.zeros_like(phases)
        for _ in range(rounds):
            found = self._spectrum(self._wave(amplitudes * phases))
            ahead = found + 0.99 * (found - last)
            phases, last = ahead / np.maximum(np.abs(ahead), 1e-12), found
        return self._wave(amplitudes * phases).clip(-1, 1).astype(np.float32)

    def is_silent(self, thing):
        """Whether no part of a sound is above the quiet end of the scale."""
        thing = np.asarray(thing, np.float32)
        return not len(thing) or np.abs(thing).max() < 1e-4 or not self.encode(thing).any()

    def judge(self, thing, caption):
        """Always empty: what a caption of an arbitrary sound asks for is unknown."""
        return {}

    def picture(self, thing):
        """The spectrogram at twice its size, low pitches at the bottom."""
        if self.is_silent(thing):
            return self._coloured(np.zeros((self.bands, self.steps)))
        return self._coloured(self.levels(self.encode(np.asarray(thing, np.float32))))

    def glance(self, array):
        """The picture of an array, without computing the sound."""
        return self._coloured(self.levels(array))

    def _coloured(self, levels):
        shown = np.repeat(np.repeat(levels[::-1], 2, 0), 2, 1)[..., None]
        black, orange, white = (np.array(colour) for colour in ((10, 5, 30), (230, 90, 40), (255, 250, 220)))
        low = black + (orange - black) * np.minimum(shown * 2, 1)
        return np.round(low + (white - orange) * np.maximum(shown * 2 - 1, 0)).astype(np.uint8)

    def write(self, thing, path):
        """`.wav`, 16 bits; `.npy`, the samples."""
        path, samples = str(path), np.asarray(thing, np.float32)
        if path.endswith(".npy"):
            return np.save(path, samples)
        with wave.open(path, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(self.rate)
            file.writeframes(np.round(samples.clip(-1, 1) * 32767).astype("<i2").tobytes())

    def features(self, thing, pitch=None):
        """The inputs of the judge's classifier over the audible part: the mean level of each band; for a note of MIDI number
        `pitch`, the levels of its first eight harmonics in each quarter of the time, and the audible share.
        """
        levels = self.levels(self.encode(np.asarray(thing, np.float32)))
        loudness = levels.mean(0)
        heard = np.flatnonzero(loudness > 0.15 * loudness.max())
        levels = levels[:, heard[0] : heard[-1] + 1]
        if pitch is None:
            timbre = levels.mean(1)
            return timbre - timbre.mean()
        lowest = self.lowest or 60
        frequencies = 440 * 2 ** ((pitch - 69) / 12) * np.arange(1, 9)
        places = np.log(frequencies / lowest) / np.log(self.rate / 2 / lowest) * (self.bands + 1) - 1
        near = np.round(places).astype(int).clip(1, self.bands - 2)[:, None] + np.arange(-1, 2)
        quarters = [part[near].max(1).mean(1) for part in np.array_split(levels, 4, axis=1) if part.size]
        quarters += [quarters[-1]] * (4 - len(quarters))
        return np.concatenate([*quarters, [len(heard) / len(loudness)]])

    def seconds(self, thing):
        """Duration of the audible part in seconds."""
        loudness = self.levels(self.encode(np.asarray(thing, np.float32))).mean(0)
        heard = np.flatnonzero(loudness > 0.1 * loudness.max())
        return (heard[-1] - heard[0] + 1) * self.hop / self.rate

    def classify(self, kind, features):
        """The word that a linear classifier chooses among the references of a kind."""
        known = self.references[kind]
        scores = np.append(features, 1) @ np.array(known["weights"])
        return known["words"][int(scores.argmax())]

    @cached_property
    def _bands(self):
        """Triangular filters evenly spaced in mel or octaves, `(bands, window / 2 + 1)`; none is narrower than a bin."""
        top, bins = self.rate / 2, np.linspace(0, self.rate / 2, self.window // 2 + 1)
        if self.lowest is None:
            mel = np.linspace(2595 * np.log10(1 + 60 / 700), 2595 * np.log10(1 + top / 700), self.bands + 2)
            edges = 700 * (10 ** (mel / 2595) - 1)
        else:
            edges = np.geomspace(self.lowest, top, self.bands + 2)
        widths = np.maximum(np.diff(edges), bins[1])
        rise = (bins - edges[1:-1, None]) / widths[:-1, None] + 1
        fall = (edges[1:-1, None] - bins) / widths[1:, None] + 1
        return np.minimum(rise, fall).clip(0) * 1024 / self.window

    @cached_property
    def _inverse(self):
        """Interpolates between band centres, `(window / 2 + 1, bands)`: a pseudo-inverse would amplify small errors."""
        return (self._bands / np.maximum(self._bands.sum(0), 1e-9) / self._bands.sum(1, keepdims=True)).T

    @cached_property
    def _taper(self):
        return np.hanning(self.window + 1)[:-1]

    def _starts(self):
        return self.hop * np.arange(self.steps)[:, None] + np.arange(self.window)

    def _spectrum(self, samples):
        """Short-time Fourier transform, `(window / 2 + 1, steps)`, each step centred in its window."""
        half = (self.window - self.hop) // 2
        padded = np.pad(samples, (half, self.window - half))
        return np.fft.rfft(padded[self._starts()] * self._taper, axis=-1).T

    def _wave(self, spectrum):
        """The samples whose transform is closest to a spectrum."""
        pieces = np.fft.irfft(spectrum.T, n=self.window, axis=-1) * self._taper
        total, weight = np.zeros(self.length + self.window), np.zeros(self.length + self.window)
        np.add.at(total, self._starts(), pieces)
        np.add.at(weight, self._starts(), np.broadcast_to(self._taper**2, pieces.shape))
        half = (self.window - self.hop) // 2
        return (total / np.maximum(weight, 1e-3))[half : half + self.length]


class SpeechCodec(SoundCodec):
    """A digit that somebody says, as in `a Scottish woman says seven quickly`."""

    kind = "speech"

    def judge(self, thing, caption):
        """The word by pocketsphinx with a grammar of ten, the voice by timbre, the pace by the word's length; `all` three."""
        voice, word, pace = _asked(r"an? \w+ (man|woman) says (\w+) ?(\w*)", caption)
        if self.is_silent(thing):
            return dict.fromkeys(("word", "voice", "pace", "all"), False)
        lengths = self.references["pace"]
        length = np.log(self.seconds(thing))
        heard = min(PACES, key=lambda each: abs(length - lengths[f"{word} {each}".strip()]))
        right = {"word": _hear(thing, self.rate) == word, "voice": self.classify("voice", self.features(thing)) == voice}
        right["pace"] = heard == pace
        return {**right, "all": all(right.values())}


class NoteCodec(SoundCodec):
    """A note that an instrument plays, as in `a piano plays C sharp 4`."""

    kind = "notes"

    def judge(self, thing, caption):
        """The pitch by librosa's pYIN, within half a semitone; the instrument by its timbre over time; `all`: both."""
        instrument, name, octave = _asked(r"an? (\w+) plays (.+) (\d)", caption)
        if self.is_silent(thing):
            return dict.fromkeys(("pitch", "instrument", "all"), False)
        wanted = 12 * (int(octave) + 1) + NOTES.index(name)
        found = _pitch(thing, self.rate)
        right = {
            "pitch": found is not None and abs(found - wanted) < 0.5,
            "instrument": self.classify("instrument", self.features(thing, wanted)) == instrument,
        }
        return {**right, "all": all(right.values())}


class MelodyCodec(NoteCodec):
    """Three notes or a chord in the octave from C 4, as in `a piano plays C, E, G` or `a flute plays the chord D minor`."""

    kind = "melodies"

    def judge(self, thing, caption):
        """Notes one after another by pYIN, a chord by its spectrum; the instrument by its timbre over time; `all`: both."""
        instrument, is_chord, pitches = self._wanted(caption)
        if self.is_silent(thing):
            return dict.fromkeys(("pitch", "instrument", "all"), False)
        found = self._chord(thing) if is_chord else self._melody(thing)
        heard = self.classify("instrument", self.timbre(thing, caption))
        right = {"pitch": found == pitches, "instrument": heard == instrument}
        return {**right, "all": all(right.values())}

    def timbre(self, thing, caption):
        """The features by which `judge` tells instruments apart: those of a whole chord, or of the first note of a melody."""
        _, is_chord, pitches = self._wanted(caption)
        part = thing if is_chord else thing[: self._begin(thing) + int(NOTE_SECONDS * self.rate)]
        return self.features(part, pitches[0])

    @staticmethod
    def _wanted(caption):
        """The instrument, whether it is a chord, and the MIDI numbers."""
        instrument, asked = _asked(r"an? (\w+) plays (.+)", caption)
        if asked.startswith("the chord "):
            return instrument, True, chord_of(asked.removeprefix("the chord "))
        return instrument, False, [60 + NOTES.index(name) for name in asked.split(", ")]

    def _begin(self, thing):
        """The first audible sample."""
        loudness = self.levels(self.encode(np.asarray(thing, np.float32))).mean(0)
        return int(np.flatnonzero(loudness > 0.15 * loudness.max())[0]) * self.hop

    def _melody(self, thing):
        """Three MIDI numbers; None for a note without pitch."""
        begin, third = self._begin(thing), int(NOTE_SECONDS * self.rate)
        parts = [thing[begin + k * third + third // 6 : begin + (k + 1) * third] for k in range(3)]
        found = [_pitch(part, self.rate) if len(part) > third // 2 else None for part in parts]
        return [None if pitch is None else round(pitch) for pitch in found]

    def _chord(self, thing):
        """The MIDI numbers of the triad whose harmonics match the spectrum best."""
        bands = 10 ** (self.quiet + self.levels(self.encode(np.asarray(thing, np.float32))) * (self.loud - self.quiet))
        heard = np.sqrt(bands.mean(1))
        heard = (heard - heard.mean()) / heard.std()
        return max(CHORDS, key=lambda pitches: float(heard @ self._template(pitches)))

    def _template(self, pitches):
        edges = np.geomspace(self.lowest or 60, self.rate / 2, self.bands + 2)[1:-1]
        expected = np.zeros(self.bands)
        for pitch in pitches:
            for harmonic in range(1, 7):
                octaves = np.log2(edges / (440 * 2 ** ((pitch - 69) / 12) * harmonic))
                expected += np.exp(-((octaves * 24) ** 2) / 2) / harmonic
        expected = np.sqrt(expected)
        return (expected - expected.mean()) / expected.std()


class RecordingCodec(SoundCodec):
    """A recording of a number below a hundred, as in `a recorded woman says forty seven`."""

    kind = "recordings"

    def judge(self, thing, caption):
        """The words by pocketsphinx with a grammar of all hundred."""
        (wanted,) = _asked(r"a recorded woman says (.+)", caption)
        right = not self.is_silent(thing) and _hear(thing, self.rate, SPOKEN_NUMBERS) == wanted
        return {"word": right, "all": right}


TEENS = ("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
SPOKEN_NUMBERS = (*WORDS, *TEENS, *(f"{ten} {one}".strip() for ten in TENS for one in ("", *WORDS[1:])))

NOTE_SECONDS = 0.3  # of each note of a melody
CHORDS = [[root, root + third, root + 7] for root in range(60, 72) for third in (3, 4)]  # minor and major, as MIDI numbers


def chord_of(name):
    """The MIDI numbers of a triad such as `C sharp minor`."""
    note, kind = name.rsplit(" ", 1)
    root = 60 + NOTES.index(note)
    return [root, root + {"minor": 3, "major": 4}[kind], root + 7]


class SpokenPictureCodec(SoundCodec):
    """A picture together with spoken words about it: `{"picture": (side, side, 3) uint8, "sound": (N,) float32}`.

    The channels of the picture come first, then those of the sound.
    """

    kind = "spoken_pictures"
    endings = (".wav", ".png")

    def __init__(self, **settings):
        super().__init__(**settings)
        self.shape = (*self.shape[:2], self.shape[2] + 3)

    def encode(self, thing):
        """Both, side by side in the channels."""
        picture = np.asarray(thing["picture"])
        if picture.shape != (*self.shape[:2], 3) or picture.dtype != np.uint8:
            raise ValueError(f"a picture must be {self.shape[0]} x {self.shape[1]} x 3 bytes, got {picture.shape}")
        return np.concatenate([picture.astype(np.float32) / 255, self._sound.encode(thing["sound"])], -1)

    def decode(self, array, rounds: int = 32):
        """Both."""
        array = np.asarray(array, np.float32).reshape(self.shape)
        picture = np.round(array[..., :3].clip(0, 1) * 255).astype(np.uint8)
        return {"picture": picture, "sound": self._sound.decode(array[..., 3:], rounds)}

    def judge(self, thing, caption):
        """Judge the picture by templates and the words by pocketsphinx; `all`: both are what the caption asks for."""
        from sfumato.pipelines.codecs.clips import COLOURS, SHAPES, look, track

        wanted = _asked(r"an? (\w+) (\w+)", caption)
        seen = look(thing["picture"], track(thing["picture"][None])[0], RADIUS) == wanted
        sound, heard = thing["sound"], None
        if not self._sound.is_silent(sound):
            heard = _hear(sound, self.rate, tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES))
        said = heard == " ".join(wanted)
        return {"picture": seen, "sound": said, "all": seen and said}

    def picture(self, thing):
        """The picture and the spectrogram of the sound, side by side."""
        return self._beside(thing["picture"], self._sound.picture(thing["sound"]))

    def glance(self, array):
        """The same for an array, without computing the sound."""
        array = np.asarray(array, np.float32).reshape(self.shape)
        return self._beside(np.round(array[..., :3].clip(0, 1) * 255).astype(np.uint8), self._sound.glance(array[..., 3:]))

    @staticmethod
    def _beside(picture, spectrogram):
        return np.concatenate([np.kron(picture, np.ones((4, 4, 1), np.uint8)), spectrogram], 1)

    def write(self, thing, path):
        """`.wav`, the sound; `.png`, the picture."""
        if str(path).endswith(".png"):
            from PIL import Image

            return Image.fromarray(thing["picture"]).save(path)
        return self._sound.write(thing["sound"], path)

    @cached_property
    def _sound(self):
        names = ("rate", "bands", "steps", "hop", "window", "block", "lowest")
        return SoundCodec(**{name: getattr(self, name) for name in names})


RADIUS = 0.3  # of the drawn shape, as a fraction of the picture's side


def _asked(pattern, caption):
    """The words of a caption that a judge checks."""
    found = re.fullmatch(pattern, caption)
    if found is None:
        raise ValueError(f"not a caption of this kind: {caption}")
    return found.groups()


def _hear(samples, rate, words=WORDS):
    """The one of `words` that pocketsphinx recognises; the sound is normalised and gets a little noise, which helps it."""
    try:
        import pocketsphinx
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("judging speech needs pocketsphinx: pip install 'sfumato[audio]'") from error
    import tempfile

    if words not in _decoders:
        with tempfile.NamedTemporaryFile("w", suffix=".gram") as file:
            file.write("#JSGF V1.0;\ngrammar words;\npublic <word> = " + " | ".join(words) + ";\n")
            file.flush()
            _decoders[words] = pocketsphinx.Decoder(jsgf=file.name, samprate=rate, loglevel="FATAL")
    level = np.pad(0.3 * samples / np.abs(samples).max(), rate // 5)
    level = level + 0.001 * np.random.default_rng(0).standard_normal(len(level))
    decoder = _decoders[words]
    decoder.start_utt()
    decoder.process_raw(np.round(level.clip(-1, 1) * 32767).astype("<i2").tobytes(), full_utt=True)
    decoder.end_utt()
    found = decoder.hyp()
    return found.hypstr if found else None


_decoders: dict = {}  # words -> their decoder, built once, since that takes half a second


def _pitch(samples, rate):
    """The median pitch as a MIDI number; None if there is no pitch."""
    try:
        import librosa
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("judging notes needs librosa: pip install 'sfumato[audio]'") from error
    pitches, voiced, _ = librosa.pyin(samples, fmin=110, fmax=1400, sr=rate)
    heard = pitches[voiced & np.isfinite(pitches)]
    return None if not len(heard) else float(69 + 12 * np.log2(np.median(heard) / 440))
