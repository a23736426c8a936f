"""From sources to batches: what is read, what is refused, and that a sample is a function of its position."""

import io
import json
import struct
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from sfumato.registries import SOURCES, Source
from sfumato.training.config import schema
from sfumato.training.config.load import load_config
from sfumato.training.data import cached, prepare, streams
from sfumato.training.data.records import Record
from sfumato.training.data.sources import openmoji
from sfumato.training.data.sources.keywords import read_keywords
from sfumato.training.models.text import train_tokenizer


def folder_config(tmp_path, folder, **more):
    return schema.DataConfig(name=str(folder), resolution=16, cache_dir=str(tmp_path / "cache"), **more)


def image(path, colour="red", size=(20, 30), mode="RGB", **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **save)
    return path


def claims(width, height):
    """A PNG of a few bytes that claims to be huge."""
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))  # noqa: E731
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def captions(prepared):
    return {record["id"]: record["captions"][0] for record in prepared}


def test_metadata_csv_jsonl_text_files_and_class_folders(tmp_path):
    for name, write in {
        "csv": lambda f: (f / "metadata.csv").write_text('file_name,text\na.png,red thing\nb/c.png,"blue, thing"\n'),
        "jsonl": lambda f: (f / "metadata.jsonl").write_text(
            '{"file_name": "a.png", "text": "red thing"}\n\n{"file_name": "b/c.png", "text": "blue, thing"}\n'
        ),
        "txt": lambda f: [(f / "a.txt").write_text("red thing\n"), (f / "b/c.txt").write_text("blue, thing")],
    }.items():
        image(tmp_path / name / "a.png")
        image(tmp_path / name / "b" / "c.png", "blue")
        write(tmp_path / name)
        prepared = prepare.prepare(folder_config(tmp_path, tmp_path / name))
        assert captions(prepared) == {"a.png": "red thing", "b/c.png": "blue, thing"}
        assert len(prepared) == 2 and prepared.image(1).shape == (16, 16, 3)
        assert tuple(prepared.image(0)[8, 8]) == (255, 0, 0)
    image(tmp_path / "classes" / "sea_lion" / "1.jpg")
    assert captions(prepare.prepare(folder_config(tmp_path, tmp_path / "classes"))) == {"sea_lion/1.jpg": "sea lion"}


def test_odd_but_sound_images_come_out_right(tmp_path):
    folder = tmp_path / "odd"
    image(folder / "alpha.png", (255, 0, 0, 0), mode="RGBA")
    image(folder / "palette.png", 3, mode="P")
    image(folder / "cmyk.jpg", (0, 0, 0, 0), mode="CMYK")
    image(folder / "grey.png", 128, mode="L")
    Image.fromarray(np.full((20, 20), 32768, np.uint16)).save(folder / "deep.png")
    turned = Image.new("RGB", (40, 20), "red")
    turned.paste("blue", (20, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(folder / "turned.png", exif=exif)
    for path in list(folder.iterdir()):
        path.with_suffix(".txt").write_text(path.stem)
    prepared = prepare.prepare(folder_config(tmp_path, folder, max_bad_share=0.0))
    middle = {record["id"].split(".")[0]: prepared.image(i)[8, 8] for i, record in enumerate(prepared)}
    np.testing.assert_array_equal(middle["alpha"], [255] * 3)  # clear means white, not black
    np.testing.assert_array_equal(middle["grey"], [128] * 3)
    np.testing.assert_array_equal(middle["deep"], [128] * 3)  # 16 bits are scaled, not clipped
    np.testing.assert_allclose(middle["cmyk"], [255] * 3, atol=2)
    upright = prepared.image([record["id"] for record in prepared].index("turned.png"))
    assert upright[2, 8, 0] > 200 and upright[13, 8, 2] > 200  # red above blue


def test_bad_images_are_skipped_counted_and_named(tmp_path):
    folder = tmp_path / "bad"
    for i in range(20):
        image(folder / f"good{i}.png")
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(whole, "jpeg")
    (folder / "cut.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "bomb.png").write_bytes(claims(50_000, 50_000))
    (folder / "large.png").write_bytes(claims(8_000, 5_000))
    image(tmp_path / "secret.png")
    rows = [{"file_name": p.name, "text": "x"} for p in sorted(folder.glob("*.*"))]
    rows += [{"file_name": "../secret.png", "text": "x"}, {"file_name": "gone.png", "text": "x"}]
    rows += [{"file_name": "good0.png", "text": "  "}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="8 of 28 images.*data.max_bad_share"):
        prepare.prepare(folder_config(tmp_path, folder))
    with pytest.warns(UserWarning, match="skipped 8 of 28"):
        prepared = prepare.prepare(folder_config(tmp_path, folder, max_bad_share=0.5))
    assert {reason: sorted(names) for reason, names in prepared.skipped.items()} == {
        "damaged image": ["cut.jpg"],
        "not an image": ["empty.png", "text.png"],
        "more than 32 megapixels": ["bomb.png", "large.png"],
        "outside the folder": ["../secret.png"],
        "missing": ["gone.png"],
        "no caption": ["good0.png"],
    }
    assert len(prepared) == 20


def test_all_names_are_listed_where_a_message_has_room_for_some(tmp_path):
    folder = tmp_path / "many"
    rows = [{"file_name": image(folder / "good.png").name, "text": "x"}]
    rows += [{"file_name": f"gone{i}.png", "text": "x"} for i in range(5)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"gone0.png, .*gone2.png, \.\.\.\); all of them are listed in .*skipped.txt"):
        prepare.prepare(folder_config(tmp_path, folder))
    (listed,) = tmp_path.rglob("*-skipped.txt")
    assert listed.read_text().splitlines() == [f"gone{i}.png\tmissing" for i in range(5)]
    rows += [{"file_name": "gone\n5.png", "text": "x"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="6 missing"):
        prepare.prepare(folder_config(tmp_path, folder))
    assert any("gone\\n5.png\tmissing\n" in path.read_text() for path in tmp_path.rglob("*-skipped.txt"))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda f: None, "neither openmoji nor shapes nor .*nor a folder"),
        (lambda f: f.mkdir(), "no usable image"),
        (lambda f: image(f / "a.png"), "no captions"),
        (lambda f: [image(f / "a.png"), (f / "metadata.csv").write_text("name,text\na,b\n")], "no column file_name"),
    ],
)
def test_unusable_sources_say_what_to_do(tmp_path, make, message):
    make(tmp_path / "source")
    with pytest.raises(ValueError, match=message):
        prepare.prepare(folder_config(tmp_path, tmp_path / "source"))


def test_a_changed_folder_is_prepared_anew_an_unchanged_one_is_not(tmp_path):
    image(tmp_path / "f" / "cat" / "1.png")
    first = prepare.prepare(folder_config(tmp_path, tmp_path / "f"))
    stored = sorted((tmp_path / "cache").iterdir())
    prepare.prepare(folder_config(tmp_path, tmp_path / "f"))
    assert sorted((tmp_path / "cache").iterdir()) == stored
    image(tmp_path / "f" / "cat" / "2.png")
    assert len(prepare.prepare(folder_config(tmp_path, tmp_path / "f"))) == len(first) + 1


def toy_source(config, files):
    """Grey images, of which some cannot be made."""
    values = [int(word) for word in Path(config.name.partition(":")[2]).read_text().split()]
    for value in values:
        yield Record(str(value), partial(grey, value, config.resolution), [f"grey {value}"], "train")


def grey(value, size):
    if value > 255:
        raise ValueError("too bright")
    return np.full((size, size, 3), value, np.uint8)


def test_a_source_of_a_name_and_a_file_skips_what_it_cannot_make_and_sees_a_changed_file(tmp_path):
    file = tmp_path / "values.txt"
    file.write_text("1 2 300")
    config = schema.DataConfig(name=f"toy:{file}", resolution=16, cache_dir=str(tmp_path / "cache"), max_bad_share=0.5)
    SOURCES.add("toy", Source(target=f"{__name__}:toy_source", named=True, generated=True))
    try:
        with pytest.warns(UserWarning, match="too bright"):
            first = prepare.prepare(config)
        assert len(first) == 2 and first.skipped == {"too bright": ["300"]}
        file.write_text("1 2 3 4")
        assert len(prepare.prepare(config)) == 4
    finally:
        SOURCES.remove("toy")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    return load_config(tiny.config_file(folder)), prepare.prepare(load_config(tiny.config_file(folder)).data)


def test_shapes_split(shapes):
    _, prepared = shapes
    assert len(prepared.select("train")) == 64 and len(prepared.select("held_out")) == 256
    held_out = {prepared[int(i)]["captions"][0] for i in prepared.select("held_out")}
    assert not held_out & set(prepared.training_captions())


def test_each_epoch_shows_each_image_once_in_its_own_order(shapes):
    config, prepared = shapes
    stream = tiny.samples(prepared, seed=3, caption_dropout=0.0)
    epochs = [[stream[e * 64 + i][0] for i in range(64)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(prepared.select("train"))
    assert epochs[0] != epochs[1]


def test_a_sample_is_a_function_of_its_position_alone(shapes):
    _, prepared = shapes
    forward = tiny.samples(prepared, seed=3, caption_dropout=0.5)
    backward = tiny.samples(prepared, seed=3, caption_dropout=0.5)
    seen = {i: forward[i] for i in range(150)}
    for i in reversed(range(150)):
        assert backward[i] == seen[i]
    other = tiny.samples(prepared, seed=4, caption_dropout=0.5)
    assert [other[i][4] for i in range(9)] != [seen[i][4] for i in range(9)]


def test_captions_are_dropped_anew_for_every_sample(shapes):
    _, prepared = shapes
    stream = tiny.samples(prepared, seed=0, caption_dropout=0.25)
    dropped = np.array([[stream[e * 64 + i].caption < 0 for i in range(64)] for e in range(40)])
    assert dropped.mean() == pytest.approx(0.25, abs=0.03)
    assert not any((dropped[0] == row).all() for row in dropped[1:])


def test_noise_levels_spread_evenly_over_any_batch(shapes):
    _, prepared = shapes
    stream = tiny.samples(prepared, seed=0, caption_dropout=0.0)
    for start in (0, 17, 640):
        u = sorted(stream[start + i][3] for i in range(16))
        assert max(np.diff([0.0, *u, 1.0])) < 2.7 / 16


def test_two_processes_see_together_what_one_sees(shapes, tmp_path):
    config, prepared = shapes
    tokenizer = train_tokenizer(prepared.training_captions(), 600, 20)
    texts = cached.cached_texts(prepared, tokenizer, None, tmp_path)
    config.train.batch_size = 4
    pair = [tiny.batches(prepared, config, texts, rank=rank, num_processes=2) for rank in range(2)]
    one = tiny.batches(prepared, config, texts)
    for _ in range(3):
        for stream in pair:
            a, b = next(one), next(stream)
            assert all(torch.equal(a[key], b[key]) for key in a)
    resumed = next(tiny.batches(prepared, config, texts, start=24))
    assert torch.equal(resumed["sample_key"], next(one)["sample_key"])
    assert a["pixel_values"].shape == (4, 3, 16, 16) and a["pixel_values"].abs().max() <= 1
    assert a["text"].shape == (4, 20)


def test_noise_depends_on_the_seed_of_each_sample_only():
    seeds = torch.tensor([1, 2, 3])
    noise = streams.noise_for(seeds, (3, 8, 8), torch.device("cpu"))
    assert torch.equal(noise[1], streams.noise_for(seeds[1:2], (3, 8, 8), torch.device("cpu"))[0])
    assert abs(streams.noise_for(torch.arange(500), (3, 8, 8), torch.device("cpu")).std() - 1) < 0.01


def test_openmoji_names_images_in_two_languages():
    records = openmoji.records(["en", "zh"], skin_tones=True)
    by_caption = {record["captions"][0]: record for record in records}
    assert len(records) > 3900
    assert "红心" in by_caption["red heart"]["captions"] and "flag of Fiji" in by_caption
    assert all(record["captions"] and all(record["captions"]) for record in records)
    splits = {record["id"]: record["split"] for record in records}
    assert splits == {record["id"]: record["split"] for record in openmoji.records(["en"], skin_tones=True)}
    combination = [r for r in records if r["split"] == "held_out_combination"]
    assert len(combination) > 50 and all("skin tone" in r["captions"][0] for r in combination)
    # What the shipped model never saw: of this split it was trained, so it stays.
    assert sum(split == "held_out" for split in splits.values()) == 153 and len(combination) == 95
    assert by_caption["green book"]["split"] == by_caption["pink heart"]["split"] == "held_out"
    assert len(openmoji.records(["en"], skin_tones=False)) < 2000


def test_captions_can_begin_with_the_main_colour(tmp_path):
    words = ["face", "heart", "book"]
    settings = {"languages": ["en"], "skin_tones": False, "words": words, "cache_dir": str(tmp_path)}
    plain, told = (prepare.prepare(schema.DataConfig(**settings, colours=colours)) for colours in (False, True))
    captions = {record["captions"][0]: record["captions"] for record in (told[i] for i in range(len(told)))}
    assert captions["pig face"][-1] == "pink pig face" and captions["beating heart"][-1] == "red beating heart"
    assert all("pink pink" not in caption for caption in captions["pink heart"])
    for i in range(len(told)):  # those of before are all there, the first one first
        before = plain[i]["captions"]
        assert told[i]["captions"][: len(before)] == before and told[i]["split"] == plain[i]["split"]

    chinese = prepare.prepare(schema.DataConfig(**{**settings, "languages": ["zh"]}, colours=True))
    assert all(len(chinese[i]["captions"]) == 1 for i in range(len(chinese)))  # the colours have English names


def test_the_main_colour_leaves_ground_and_lines_out():
    image = np.full((10, 10, 3), 255, np.uint8)
    assert openmoji.main_colour(image) is None  # nothing but ground
    image[2:5, 2:5] = 0xB1, 0xCC, 0x33
    assert openmoji.main_colour(image) is None  # too little
    image[2:5, 2:8], image[5] = (0xB1, 0xCC, 0x33), 0
    assert openmoji.main_colour(image) == "green"
    assert openmoji.add_main_colour("pear", image) == ["green pear"]
    assert openmoji.add_main_colour("woman light skin tone", image) == openmoji.add_main_colour("Green apple", image) == []
    image[6:9, 2:8] = 0xEA, 0x5A, 0x47
    assert openmoji.main_colour(image) in ("green", "red")  # half and half
    image[6:10, 2:8] = 0x9B, 0x9B, 0x9A
    assert openmoji.main_colour(image) is None  # grey is read and not named


def test_an_image_is_recoloured_and_says_so(tmp_path):
    """In the colours that its caption names, pairs of colour and thing held out, and of nothing that is held out already."""
    settings = {"languages": ["en"], "skin_tones": False, "words": ["book", "heart", "apple"], "cache_dir": str(tmp_path)}
    plain, told = (prepare.prepare(schema.DataConfig(**settings, recolours=count)) for count in (0, 8))
    records = [told[i] for i in range(len(told))]
    captions = [record["captions"][0] for record in records]
    assert [record["id"] for record in records[: len(plain)]] == [plain[i]["id"] for i in range(len(plain))]
    new = range(len(plain), len(told))
    assert len(new) > 50 and len(set(captions)) == len(captions)
    assert "purple beating heart" in captions and not any("blue orange" in caption for caption in captions)
    for i in new:
        colour, thing = openmoji.split_colour(captions[i])
        assert thing and openmoji.main_colour(told.image(i)) == colour
    held_out = {captions[i] for i in new if records[i]["split"] == "held_out_pair"}
    assert 0 < len(held_out) < 0.3 * len(new)
    assert captions.count("green book") == 1 and records[captions.index("green book")]["split"] == "held_out"
    fewer = prepare.prepare(schema.DataConfig(**settings, recolours=2))
    assert len(plain) < len(fewer) < len(told)


def keywords_folder(root):
    """Two emoji as emojibase-data has them, one of a group whose number another has too."""
    emoji = {
        "en": [
            {"label": "red heart", "hexcode": "2764", "tags": ["love", "emotion", "care", "Red Heart"], "subgroup": 14},
            {"label": "bookmark tabs", "hexcode": "1F4D1", "tags": ["mark"], "subgroup": 46},
            {"label": "regional indicator A", "hexcode": "1F1E6", "tags": None, "subgroup": None},
        ],
        "zh": [{"label": "心", "hexcode": "2764", "tags": ["喜欢", "爱"], "subgroup": 14}],
    }
    groups = {"en": "hearts", "zh": "心形"}
    for language, entries in emoji.items():
        folder = root / "package" / language
        folder.mkdir(parents=True)
        (folder / "data.json").write_text(json.dumps(entries), encoding="utf-8")
        rows = [{"order": 14, "message": groups[language]}, {"order": 46, "message": "one"}, {"order": 46, "message": "two"}]
        (folder / "messages.json").write_text(json.dumps({"subgroups": rows}), encoding="utf-8")
    return root / "package"


def test_keywords_and_groups_are_further_captions(tmp_path):
    """After the names, which stay as they were, and of the languages that are chosen."""
    folder = keywords_folder(tmp_path)
    settings = {"skin_tones": False, "words": ["heart", "bookmark"], "cache_dir": str(tmp_path / "cache")}
    plain = prepare.prepare(schema.DataConfig(**settings))
    more = prepare.prepare(schema.DataConfig(**settings, keywords=str(folder)))
    assert [record["id"] for record in more] == [record["id"] for record in plain]
    captions = {record["id"]: record["captions"] for record in more}
    before = {record["id"]: record["captions"] for record in plain}
    added = {name: captions[name][len(own) :] for name, own in before.items()}
    assert all(captions[name][: len(own)] == own for name, own in before.items())
    assert {name for name, new in added.items() if new} == {"2764", "1F4D1"}
    assert added["1F4D1"] == ["mark"]
    heart = added["2764"]
    assert [heart[0], *heart[2:4]] == ["red heart, hearts", "心", "心，心形"]
    assert set(heart[1].split(", ")) == {"love", "emotion", "care"} and set(heart[4].split("，")) == {"喜欢", "爱"}
    english = prepare.prepare(schema.DataConfig(**settings, languages=["en"], keywords=str(folder)))
    assert all(caption.isascii() for record in english for caption in record["captions"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "en.data.json cannot be read"),
        ("[", "en.data.json is damaged"),
        ("{}", "en.data.json is not a list of emoji"),
        ("[]", "en.data.json is not a list of emoji"),
        ("[1]", "en.data.json is not a list of emoji"),
        ('[{"label": "x"}]', "an emoji without hexcode"),
        ('[{"label": null, "hexcode": "2764"}]', "an emoji without hexcode, label"),
        ('[{"label": "x", "hexcode": "2764", "tags": "love"}]', "a list of tags"),
    ],
)
def test_a_folder_without_keywords_is_named(tmp_path, content, reason):
    folder = keywords_folder(tmp_path)
    (folder / "en" / "data.json").unlink()
    if content is not None:
        (folder / "en" / "data.json").write_text(content)
    with pytest.raises(ValueError, match=f"data.keywords: .*{reason}.*npm pack emojibase-data"):
        read_keywords(folder, ["en", "zh"])


def test_a_folder_of_keywords_that_is_not_there_is_told_at_once(tmp_path):
    with pytest.raises(ValueError, match="data.keywords.*is not a folder: run npm pack emojibase-data"):
        load_config(tiny.config_file(tmp_path, data={"name": "openmoji", "keywords": str(tmp_path / "nowhere")}))


def test_a_touched_keyword_makes_another_key_and_no_other_file_does(tmp_path):
    folder = keywords_folder(tmp_path)
    config = schema.DataConfig(keywords=str(folder), languages=["en"])
    key = prepare.cache_key(config)
    (folder / "zh" / "data.json").write_text("[]")
    assert prepare.cache_key(config) == key
    (folder / "en" / "data.json").write_text("[]")
    assert prepare.cache_key(config) != key


def test_a_recoloured_image_says_so_in_chinese_too(tmp_path):
    settings = {
        "languages": ["en", "zh"],
        "skin_tones": False,
        "words": ["book", "heart", "apple"],
        "cache_dir": str(tmp_path),
    }
    images = prepare.prepare(schema.DataConfig(**settings, recolours=8))
    captions = {record["captions"][0]: record["captions"][1:] for record in (images[i] for i in range(len(images)))}
    assert captions["pink beating heart"] == ["粉色心跳"] and captions["purple book"] == ["紫色书本"]
    assert sum("色" in text for texts in captions.values() for text in texts) > 50


@pytest.mark.parametrize(
    "caption, colour, pair",
    [
        ("铃铛", "yellow", "绿色铃铛"),
        ("蓝色圆", "blue", "绿色圆"),
        ("蓝色的书", "blue", "绿色书"),
        ("绿叶蔬菜", "brown", None),
        ("黄油", "yellow", None),
        ("青苹果", "red", None),
        ("蓝色", "blue", None),
    ],
)
def test_a_chinese_caption_takes_another_colour(caption, colour, pair):
    assert openmoji.chinese_pair(caption, colour, "green" if colour != "green" else "red") == pair
    assert openmoji.chinese_pair("红苹果", "red", "green", named=True) == "绿色苹果"


def test_a_colour_takes_anothers_place_shade_by_shade():
    svg = '<path fill="#92d3f5"/><path fill="#1E50A0"/><path fill="#fcea2b"/>'
    assert openmoji.recolour(svg, "blue", "green") == '<path fill="#B1CC33"/><path fill="#5C9E31"/><path fill="#fcea2b"/>'
    assert openmoji.recolour(svg, "yellow", "red").endswith('<path fill="#EA5A47"/>')
    assert openmoji.split_colour("green soccer ball") == ("green", "soccer ball")
    assert openmoji.split_colour("green") == (None, "green") and openmoji.split_colour("pig face") == (None, "pig face")


def test_openmoji_is_drawn_on_white():
    heart = next(r for r in openmoji.records(["en"], False) if r["captions"][0] == "red heart")
    drawn = openmoji.rasterise(heart["svg"], 32)
    assert drawn.shape == (32, 32, 3) and tuple(drawn[0, 0]) == (255, 255, 255)
    assert drawn[16, 16, 0] > 180 and drawn[16, 16, 1] < 110


def test_a_damaged_set_is_named_with_its_cure(tmp_path):
    """Sizes are looked at on opening, bytes on request; a ready set needs no right to write."""
    config = folder_config(tmp_path, "shapes", num_pictures=30)
    config.name = "shapes"
    images = prepare.prepare(config)
    (tmp_path / "cache").chmod(0o555)
    assert images.verify() and len(prepare.prepare(config)) == len(images)
    (tmp_path / "cache").chmod(0o755)
    pixels = next(images.folder.glob("pictures-*.bin"))
    whole = pixels.read_bytes()
    pixels.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert not prepare.prepare(config).verify()
    for damage in (whole[:-1], whole[: len(whole) // 2], b""):
        pixels.write_bytes(damage)
        with pytest.raises(ValueError, match="is damaged .* remove this folder"):
            prepare.prepare(config)


def test_a_parquet_file_that_would_fill_the_memory_is_named(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from sfumato.training.data.sources import parquet

    monkeypatch.setattr(parquet, "ALWAYS_ALLOWED", 1_000_000)
    (tmp_path / "set").mkdir()
    bomb = pa.table({"image": [b"\0" * 100_000] * 100, "text": ["a red circle"] * 100})
    pq.write_table(bomb, tmp_path / "set" / "bomb.parquet", compression="zstd", use_dictionary=False)
    config = load_config(tiny.config_file(tmp_path, data={"name": str(tmp_path / "set")}))
    with pytest.raises(ValueError, match="would unpack to over 200 times its size"):
        prepare.prepare(config.data)
