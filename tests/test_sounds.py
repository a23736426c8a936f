"""Sounds: what a spectrogram keeps, what folders may hold, what judges hear, and gaps that a model fills."""

import shutil
import wave
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from stock_process import run_stock

from sfumato.cli import main as sfumato
from sfumato.pipelines import SfumatoPipeline
from sfumato.pipelines.codecs import open_codec
from sfumato.pipelines.codecs.clips import film
from sfumato.pipelines.codecs.sounds import MelodyCodec, NoteCodec, SoundCodec, SpeechCodec, chord_of
from sfumato.training.config.load import load_config
from sfumato.training.data.prepare import prepare
from sfumato.training.data.sources import melodies, notes, recordings, speech
from sfumato.training.train import main

RATE = 16000


def tone(frequency, seconds=0.8, loud=0.5, rate=RATE):
    time = np.arange(int(rate * seconds)) / rate
    return (loud * np.sin(2 * np.pi * frequency * time) * np.minimum(1, 20 * (seconds - time))).astype(np.float32)


def peak(sound):
    """The strongest frequency in Hz."""
    return np.abs(np.fft.rfft(sound)).argmax() * RATE / len(sound)


@pytest.mark.parametrize("settings", [{}, notes.SETTINGS, {"bands": 32, "steps": 48, "block": (4, 2)}])
def test_what_is_encoded_sounds_alike(settings):
    """A tone keeps its pitch within half a semitone of bands that fine; a second round changes the spectrogram little."""
    codec = SoundCodec(**settings)
    assert open_codec(codec.describe()).describe() == codec.describe()
    for frequency in (300.0, 440.0, 1000.0):
        array = codec.encode(tone(frequency))
        assert array.shape == codec.shape and 0 <= array.min() and array.max() <= 1
        again = codec.decode(np.round(array * 255) / 255)
        assert again.shape == (codec.length,) and np.abs(again).max() <= 1
        assert np.array_equal(again, codec.decode(np.round(array * 255) / 255)), "the same each time"
        if "lowest" in settings:
            assert abs(np.log2(peak(again) / frequency)) < 1 / 24
        assert np.abs(codec.encode(again) - array).mean() < 0.06


def test_blocks_are_cells_of_the_spectrogram():
    one, block = SoundCodec(block=(1, 1)), SoundCodec(block=(4, 2))
    sound = tone(700.0)
    assert np.array_equal(one.levels(one.encode(sound)), block.levels(block.encode(sound)))
    assert one.levels(one.encode(sound)).mean(1).argmax() == pytest.approx(15, abs=1), "even in mel, low first"
    early = block.encode(np.pad(tone(700.0, 0.2), (0, 8000)))
    assert early[:, : early.shape[1] // 4].sum() > 10 * early[:, -early.shape[1] // 2 :].sum(), "time goes to the right"


@pytest.mark.parametrize(
    ("thing", "reason"),
    [
        (np.zeros(8000, np.float32), "silence"),
        (np.zeros(0, np.float32), "silence"),
        (np.full(8000, np.nan, np.float32), "finite"),
        (np.zeros((2, 8000), np.float32), "one channel"),
        (np.zeros(8000, np.int16), "one channel"),
    ],
)
def test_what_is_no_sound_is_told(thing, reason):
    with pytest.raises(ValueError, match=reason):
        SoundCodec().encode(thing)
    assert SoundCodec().picture(np.zeros(8000, np.float32)).shape == (128, 128, 3)


@pytest.fixture
def sounds(tmp_path):
    """A folder of high and low tones with odd files among them."""
    import soundfile

    folder = tmp_path / "sounds"
    folder.mkdir()
    lines = ["file_name,text"]
    for i in range(24):
        name, rate = f"{i}.{'flac' if i % 3 else 'wav'}", (RATE, 44100, 8000)[i % 3]
        sound = tone(300 + 20 * i if i % 2 else 2000 + 40 * i, rate=rate)
        soundfile.write(folder / name, np.stack([sound] * (1 + i % 2), -1), rate)
        lines.append(f"{name},a {'low' if i % 2 else 'high'} tone")
    soundfile.write(folder / "silent.wav", np.zeros(8000), RATE)
    soundfile.write(folder / "empty.wav", np.zeros(0), RATE)
    soundfile.write(folder / "nan.wav", np.full(8000, np.nan, np.float32), RATE, subtype="FLOAT")
    soundfile.write(folder / "fast.wav", tone(300), 700_000)
    (folder / "torn.flac").write_bytes((folder / "1.flac").read_bytes()[:20])
    (folder / "text.wav").write_text("RIFF, not really")
    odd = ("silent.wav", "empty.wav", "nan.wav", "fast.wav", "torn.flac", "text.wav", "gone.wav")
    (folder / "metadata.csv").write_text("\n".join([*lines, *(f"{name},an odd one" for name in odd)]) + "\n")
    return folder


def config_of(tmp_path, sounds, **more):
    data = {"name": str(sounds), "resolution": 32, "channels": 4, "max_bad_share": 0.9}
    return str(tiny.config_file(tmp_path, data=data, validation={"prompts": ["a low tone"]}, **more))


def test_a_folder_of_sounds_is_found_used_or_named(tmp_path, sounds):
    with pytest.warns(UserWarning, match="skipped 7 of 31"):
        images = prepare(load_config(config_of(tmp_path, sounds)).data)
    assert len(images) == 24 and images.picture(0).shape == (128, 128, 3)
    reasons = {name: reason for reason, names in images.skipped.items() for name in names}
    assert reasons == {
        "silent.wav": "silence",
        "empty.wav": "no sound in it",
        "nan.wav": "samples that are not finite",
        "fast.wav": "a sampling rate of 700000 Hz",
        "torn.flac": "damaged sound",
        "text.wav": "damaged sound",
        "gone.wav": "missing",
    }
    codec = open_codec(images.codec)
    by_name = {images[i]["id"]: i for i in range(len(images))}
    for name, frequency in (("0.wav", 2000), ("1.flac", 320)):
        heard = codec.decode(images.image(by_name[name]) / 255.0)
        assert abs(np.log2(peak(heard) / frequency)) < 0.1, "whatever its rate and channels"
    with pytest.raises(ValueError, match=r"data.channels=3: sounds need one of 1, 4, 16"):
        prepare(load_config(config_of(tmp_path, sounds), ["data.channels=3"]).data)
    (sounds / "metadata.csv").unlink()
    with pytest.raises(ValueError, match="sounds but no captions"):
        prepare(load_config(config_of(tmp_path, sounds)).data)


@pytest.mark.filterwarnings("ignore:skipped")
def test_a_model_of_sounds_is_trained_heard_and_opened_by_stock_classes(tmp_path, sounds):
    assert main([config_of(tmp_path, sounds), "validation.prompts=[a low tone]"]) == 0
    folder = tmp_path / "run" / "pipeline"
    out = tmp_path / "drawn.wav"
    assert sfumato(["sample", "a low tone", "--model", str(folder), "--steps", "2", "--out", str(out)]) == 0
    with wave.open(str(out)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (RATE, 1, 64 * 256)
    code = """
        import sys, numpy as np, torch
        from diffusers import DiffusionPipeline
        sys.path.insert(0, sys.argv[1])
        from codec import open_codec
        pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
        seed = torch.Generator().manual_seed(0)
        array = pipe("a low tone", output_type="np", num_inference_steps=2, generator=seed).images[0]
        np.savez(sys.argv[2], array=array, sound=open_codec().decode(array))
    """
    run_stock(code, folder, tmp_path / "stock.npz")
    pipe = SfumatoPipeline.from_pretrained(folder)
    call = {"num_inference_steps": 2, "guidance_scale": 7.5}
    ours = pipe("a low tone", output_type="np", generator=torch.Generator().manual_seed(0), **call).images[0]
    stock = np.load(tmp_path / "stock.npz")
    assert np.abs(ours - stock["array"]).max() < 1e-5
    assert np.abs(pipe.codec.decode(stock["array"]) - stock["sound"]).max() < 1e-5
    # A gap in time: what is around it stays.
    array = pipe.codec.encode(tone(440))
    gap = np.zeros(array.shape[:2], np.float32)
    gap[:, 8:16] = 1
    filled = pipe("a low tone", image=array, mask_image=gap, num_inference_steps=2, output_type="np").images[0]
    kept = gap == 0
    assert np.abs(filled[kept] - array[kept]).max() < 1e-5 < np.abs(filled[~kept] - array[~kept]).max()


def test_frames_of_a_clip_are_given_and_the_rest_is_drawn(tmp_path):
    """A mask with as many channels as the array: prediction is inpainting over frames."""
    assert main([str(tiny.config_file(tmp_path, validation={"num_judged": 2}, data={
        "name": "clips", "resolution": 32, "channels": 24, "max_records": 32}))]) == 0  # fmt: skip
    pipe = SfumatoPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    clip = film(("red", "circle", "right", "slowly"), 8, 32, np.random.default_rng(0))
    mask = np.zeros((32, 32, 24), np.float32)
    mask[..., 12:] = 1
    call = {"image": pipe.codec.encode(clip), "mask_image": mask, "num_inference_steps": 2, "num_resamples": 2}
    drawn = pipe("a red circle moves right slowly", output_type="decoded", **call).images[0]
    assert np.array_equal(drawn[:4], clip[:4]) and not np.array_equal(drawn[4:], clip[4:])
    with pytest.raises(ValueError, match="mask_image"):
        pipe("a red circle", **{**call, "mask_image": mask[..., :12]})


def judged_share(source, codec, name, count):
    """The share of true held-out clips, through eight bits, of which the judge finds `name` right."""
    records = [record for record in source.open_source(None, []) if record.split == "held_out"]
    records = [records[i * len(records) // count] for i in range(count)]
    arrays = [np.round(codec.encode(record.image()) * 255) / 255 for record in records]
    return np.mean([codec.judge(codec.decode(array), record.captions[0])[name] for array, record in zip(arrays, records)])


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")
@pytest.mark.parametrize("accent", speech.ACCENTS.values())
def test_every_accent_has_men_and_women(accent):
    """espeak-ng takes the name of a voice that it does not know for the accent's own man, without a warning."""
    names = [name for names in speech.VOICES.values() for name in names]
    said = {speech.with_espeak("nine", f"{accent}+{name}", 160, 50).tobytes() for name in names}
    assert len(said) == len(names)


@pytest.mark.skipif(shutil.which("flite") is None, reason="needs flite")
def test_every_recorded_voice_is_there():
    """flite, too, takes a voice of its own for one that it does not know."""
    names = [name for names in speech.RECORDED.values() for name in names] + ["nobody"]
    assert len({speech._said("flite", "-voice", name, "-t", "nine", "-o").tobytes() for name in names}) == len(names)


@pytest.mark.skipif(shutil.which("espeak-ng") is None or shutil.which("flite") is None, reason="needs espeak-ng and flite")
@pytest.mark.slow
def test_speech_is_heard_through_the_codec():
    codec = speech.open_codec(None, [])
    assert isinstance(codec, SpeechCodec)
    assert judged_share(speech, codec, "word", 30) > 0.7 and judged_share(speech, codec, "voice", 30) > 0.9
    silent = codec.judge(np.zeros(codec.length, np.float32), "a Scottish woman says seven quickly")
    assert not any(silent.values())
    with pytest.raises(ValueError, match="not a caption of this kind"):
        codec.judge(tone(440), "a low tone")


@pytest.mark.skipif(shutil.which("fluidsynth") is None, reason="needs fluidsynth and a soundfont")
@pytest.mark.slow
def test_notes_are_heard_through_the_codec():
    codec = notes.open_codec(None, [])
    assert isinstance(codec, NoteCodec)
    assert judged_share(notes, codec, "pitch", 24) > 0.7 and judged_share(notes, codec, "instrument", 24) > 0.7


@pytest.mark.skipif(shutil.which("fluidsynth") is None, reason="needs fluidsynth and a soundfont")
@pytest.mark.slow
def test_chords_and_melodies_are_heard_through_the_codec():
    codec = melodies.open_codec(None, [])
    assert judged_share(melodies, codec, "pitch", 36) > 0.7 and judged_share(melodies, codec, "instrument", 36) > 0.9
    silent = codec.judge(np.zeros(codec.length, np.float32), "a piano plays the chord D minor")
    assert not any(silent.values())


@pytest.mark.skipif(not any(Path(folder).is_dir() for folder in recordings.FOLDERS), reason="needs Asterisk's recordings")
@pytest.mark.slow
def test_recorded_numbers_are_heard_through_the_codec():
    assert judged_share(recordings, recordings.open_codec(None, []), "word", 28) > 0.5


def test_each_note_and_instrument_keeps_most_of_its_combinations():
    """Held out at random, E 5 was left with two instruments of six."""
    held_out = [each for each, held in notes.combinations() if held]
    assert sorted(pitch for _, pitch in held_out) == list(notes.PITCHES)
    assert Counter(instrument for instrument, _ in held_out) == dict.fromkeys(notes.PROGRAMS, 4)


def test_chords_are_told_apart_by_their_harmonics():
    """Tones alone: minor from major, and from the chord a semitone above."""
    codec = MelodyCodec(**notes.SETTINGS, references={"instrument": {"words": ["flute"], "weights": [[0.0]] * 34}})
    played = sum(tone(440 * 2 ** ((pitch - 69) / 12), loud=0.15) for pitch in chord_of("D minor"))
    names = ("D minor", "D major", "D sharp minor", "F major")
    heard = [codec.judge(played, f"a flute plays the chord {name}")["pitch"] for name in names]
    assert heard == [True, False, False, False]
    named = {melodies.caption_of("organ", piece) for piece in melodies.pieces()}
    assert len(named) == len(melodies.pieces()) == 84 and "an organ plays the chord C sharp minor" in named
    held_out = [each for each, held in melodies.combinations() if held]
    assert len(held_out) == 100


@pytest.mark.slow  # librosa compiles its search for pitches first, for 20 seconds
def test_the_judge_of_notes_reads_pitch_and_not_another():
    """On tones, whose pitch is known without any program that plays."""
    codec = NoteCodec(**notes.SETTINGS, references={"instrument": {"words": ["flute"], "weights": [[0.0]] * 34}})
    heard = [codec.judge(tone(440.0), f"a flute plays {name}")["pitch"] for name in ("A 4", "A sharp 4", "A 5")]
    assert heard == [True, False, False]
