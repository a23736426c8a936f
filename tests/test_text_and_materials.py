"""Text as bits, compositions on the periodic table, and two modalities at once."""

import numpy as np
import pytest

from sfumato.pipelines.codecs import open_codec
from sfumato.pipelines.codecs.clips import COLOURS, SHAPES, mask_of
from sfumato.pipelines.codecs.compositions import PLACES, CompositionCodec, group_of, parse
from sfumato.pipelines.codecs.sounds import RADIUS, SpokenPictureCodec
from sfumato.pipelines.codecs.texts import NameCodec, TextCodec, known_names
from sfumato.training.data.sources import compositions, names


@pytest.mark.parametrize("text", ["a", "Zoë", "sixteen letters!", "\xff"])
def test_bits_are_those_of_the_characters(text):
    codec = TextCodec()
    array = codec.encode(text)
    assert array.shape == codec.shape == (8, 16, 1) and set(np.unique(array)) <= {0, 1}
    assert "".join(str(int(bit)) for bit in array[:, 0, 0]) == f"{ord(text[0]):08b}"
    noisy = array + 0.1 * np.random.default_rng(0).standard_normal(array.shape)
    assert codec.decode(noisy) == text and open_codec(codec.describe()).decode(array) == text


@pytest.mark.parametrize(
    ("text", "reason"), [("", "no text"), (None, "no text"), ("x" * 17, "17 characters"), ("Łódź", "'Ł'"), ("a\0b", "no text")]
)
def test_texts_that_have_no_place_are_told(text, reason):
    with pytest.raises(ValueError, match=reason):
        TextCodec().encode(text)


def test_names_are_exact_near_or_neither(tmp_path):
    pytest.importorskip("faker")
    codec, caption = NameCodec(), "an Italian surname"
    name = next(each for each in known_names("an Italian", "surname") if len(each) > 6)
    judged = [codec.judge(text, caption) for text in (name, name[:-1], name + "x", name[0] + "q" + name[2:], "Qqqqqq", "")]
    assert [each["exact"] for each in judged] == [True, False, False, False, False, False]
    assert [each["near"] for each in judged] == [True, True, True, True, False, False]
    with pytest.raises(ValueError, match="not a caption of this kind"):
        codec.judge(name, "a Martian surname")
    codec.write(name, tmp_path / "name.txt")
    assert (tmp_path / "name.txt").read_text(encoding="utf-8") == name + "\n" and codec.picture(name).min() < 100
    records = list(names.open_source(None, []))
    assert len(records) > 10_000 and {record.split for record in records} == {"train", "held_out"}
    assert all(codec.decode(codec.encode(record.image())) == record.image() for record in records[::50])


def test_the_periodic_table_is_whole():
    assert len(PLACES) == 118 and len(set(PLACES.values())) == 118
    places = {"H": (0, 0), "He": (0, 31), "C": (1, 27), "Fe": (3, 21), "La": (5, 2), "Lu": (5, 16), "Og": (6, 31)}
    assert {symbol: PLACES[symbol] for symbol in places} == places
    groups = {"H": None, "Na": "alkali metal", "Ca": "alkaline earth", "Fe": "transition metal", "Gd": "lanthanide"}
    assert {symbol: group_of(symbol) for symbol in groups} == groups and group_of("U") == "actinide" and group_of("O") is None


@pytest.mark.parametrize(
    ("formula", "caption"),
    [
        ("BaTiO3", "ternary oxide, alkaline earth, transition metal"),
        ("NaCl", "binary chloride, alkali metal"),
        ("Nd2Fe14B", "ternary intermetallic, lanthanide, transition metal"),
        ("Li7La3Zr2O12", "quaternary oxide, alkali metal, lanthanide, transition metal"),
    ],
)
def test_compositions_come_back_and_are_named(formula, caption, tmp_path):
    codec = CompositionCodec()
    thing = codec.decode(codec.encode(parse(formula)) + 0.1 * np.random.default_rng(0).standard_normal(codec.shape))
    assert thing == parse(formula) and codec.caption(thing) == caption
    assert parse(codec.formula(thing)) == thing and open_codec(codec.describe()).shape == (8, 32, 5)
    codec.write(thing, tmp_path / "a.txt")
    codec.write(thing, tmp_path / "a.png")
    assert parse((tmp_path / "a.txt").read_text().strip()) == thing and codec.picture(thing).shape == (32, 128, 3)


def test_compositions_that_have_no_place_are_told():
    codec = CompositionCodec()
    for thing, reason in (({}, "no atoms"), ({"Xx": 1}, "no element"), ({"O": 32}, "32 atoms of O"), ({"O": 0}, "0 atoms")):
        with pytest.raises(ValueError, match=reason):
            codec.encode(thing)
    for formula in ("", "oxide", "Fe(OH)2", "Xx2"):
        with pytest.raises(ValueError):
            parse(formula)


def test_compositions_are_judged_by_smact():
    pytest.importorskip("smact")
    codec = CompositionCodec()
    good = codec.judge(parse("NaCl"), "binary chloride, alkali metal")
    bad = codec.judge(parse("NaCl3"), "binary oxide, alkali metal")
    assert good == {"valid": True, "all": True} and bad == {"valid": False, "all": False}
    assert not any(codec.judge({}, "binary oxide").values())


def test_formulas_lie_where_they_are_looked_for(monkeypatch):
    if compositions.find_spec("matminer") is None:
        with pytest.raises(ModuleNotFoundError, match="no-deps matminer"):
            compositions.formulas()
        return
    records = list(compositions.open_source(None, []))
    assert len(records) > 20_000 and {record.split for record in records} == {"train", "held_out"}


def test_a_picture_and_its_words_are_one_array(tmp_path):
    """What is seen is judged by templates; a tone is no word. Silence and other sizes are told."""
    codec = SpokenPictureCodec()
    time = np.arange(12000) / codec.rate
    sound = (0.5 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
    for colour in COLOURS:
        for shape in SHAPES:
            mask = mask_of(shape, 0.45, 0.52, 32, radius=RADIUS)[..., None]
            picture = np.round(mask * np.array(COLOURS[colour]) + (1 - mask) * 255).astype(np.uint8)
            array = codec.encode({"picture": picture, "sound": sound})
            again = codec.decode(np.round(array * 255) / 255, rounds=1)
            assert array.shape == codec.shape == (32, 32, 7) and np.array_equal(again["picture"], picture)
            judged = codec.judge(again, f"a {colour} {shape}")
            assert judged == {"picture": True, "sound": False, "all": False}
    assert codec.picture(again).shape == (128, 256, 3) and open_codec(codec.describe()).describe() == codec.describe()
    codec.write(again, tmp_path / "a.wav")
    codec.write(again, tmp_path / "a.png")
    assert (tmp_path / "a.wav").stat().st_size > 30_000 and (tmp_path / "a.png").is_file()
    for thing in ({"picture": picture[:8], "sound": sound}, {"picture": picture, "sound": 0 * sound}):
        with pytest.raises(ValueError):
            codec.encode(thing)
