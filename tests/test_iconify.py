"""Icon sets: captions tell thing and style, pairs are held out so that each thing is still seen, and bad icons are counted."""

import json

import pytest
import tiny

from sfumato.training.config.load import load_config
from sfumato.training.data.prepare import prepare
from sfumato.training.data.sources import iconify
from sfumato.training.train import main

nan = float("nan")
DOT = '<circle cx="8" cy="8" r="7" fill="{}"/>'


def write_set(folder, style, icons, **more):
    info = {"name": f"{style} Emoji", "author": {"name": "Ada"}, "license": {"title": "MIT", "spdx": "MIT"}}
    folder.mkdir(parents=True)
    held = {"prefix": folder.name, "icons": icons, "width": 16, "height": 16, **more}
    (folder / "icons.json").write_text(json.dumps(held))
    (folder / "info.json").write_text(json.dumps(info))


def config(folder, *overrides):
    return load_config(
        "folder_cpu",
        [f"data.name=iconify:{folder}", f"data.cache_dir={folder.parent / 'cache'}", "data.resolution=16", *overrides],
    )


def read(folder, *overrides):
    return list(iconify.open_source(config(folder, *overrides).data, []))


@pytest.fixture
def two(tmp_path):
    things = {f"thing-{i}": {"body": DOT.format("#f00")} for i in range(200)}
    write_set(tmp_path / "sets" / "noto", "Noto", things, aliases={"first": {"parent": "thing-0"}})
    only = {"only-here": {"body": DOT.format("#0f0")}, "gone": {"body": DOT.format("#00f"), "hidden": True}}
    write_set(tmp_path / "sets" / "flat", "Flat", things | only)
    return tmp_path / "sets"


def test_captions_tell_thing_and_style(two):
    captions = {record.name: record.captions for record in read(two)}
    assert captions["Noto/thing-0"] == ["thing 0, Noto style", "first, Noto style"]
    assert captions["Flat/thing-0"] == ["thing 0, Flat style"]
    assert [record.captions for record in read(two / "noto")][0] == [
        "thing 0",
        "first",
    ]  # of one set there is no style to tell


def test_held_out_pairs_are_of_things_that_another_style_shows(two):
    records = [record for record in read(two) if not record.left_out]
    held_out = {record.captions[0] for record in records if record.split == "held_out"}
    things = [caption.split(",")[0] for caption in held_out]
    assert len(held_out) == len(set(things)) and 20 <= len(held_out) <= 60  # one in ten of 400
    assert [record.name for record in read(two) if record.left_out] == ["Flat/gone"]


def test_skin_tones_are_called_alike_by_all_sets():
    known = {f"man-cook-{tone}": {} for tone in iconify.TONES}
    assert iconify.thing_of("man-cook-medium-dark", known) == "man cook medium-dark skin tone"
    assert iconify.thing_of("man-cook-medium-dark-skin-tone", {}) == "man cook medium-dark skin tone"
    assert iconify.thing_of("moon-dark", {"moon-dark": {}}) == "moon dark"


def test_skin_tones_and_words_choose(two):
    assert {record.captions[0] for record in read(two, "data.words=[7]")} == {"thing 7, Noto style", "thing 7, Flat style"}
    with pytest.raises(ValueError, match="no icon has a name"):
        read(two, "data.words=[unicorn]")


def test_an_icon_is_drawn_in_the_middle_whatever_its_measures(tmp_path):
    bar = '<path d="M0 0h32v8H0z"/>'  # black, where the set leaves the colour to its reader
    write_set(tmp_path / "sets", "Bar", {"bar": {"body": bar, "width": 32, "height": 8}})
    (record,) = read(tmp_path / "sets")
    image = record.image()
    assert image.shape == (16, 16, 3)
    assert (image[6:10] < 8).all() and (image[:6] == 255).all() and (image[10:] == 255).all()


def test_bad_icons_are_counted_and_named(tmp_path, capsys):
    foreign = ('<image href="file:///etc/passwd"/>', '<use xlink:href="other.svg#a"/>', '<path fill="url(http://x/y)"/>')
    bad = {f"foreign-{i}": {"body": body} for i, body in enumerate(foreign)}
    bad |= {"empty": {"body": " "}, "flat": {"body": "<g/>", "height": 0}, "torn": {"body": "<path d="}, "wide": {"body": 1}}
    bad |= {
        "words": {"body": "<g/>", "width": "wide"},
        "endless": {"body": "<g/>", "width": 10**400},
        "nan": {"body": "<g/>", "top": nan},
    }
    bad |= {
        "deep": {"body": "<g>" * 900 + "</g>" * 900},
        "slow": {"body": '<filter id="a"><feTurbulence numOctaves="9999"/></filter>'},
    }
    good = {f"good-{i}": {"body": DOT.format("#f00")} for i in range(20)} | {"own": {"body": '<g id="a"/><use href="#a"/>'}}
    write_set(tmp_path / "sets", "Odd", good | bad)
    images = prepare(config(tmp_path / "sets", "data.max_bad_share=0.5").data)
    assert len(images) == len(good)
    reasons = {reason: len(names) for reason, names in images.skipped.items()}
    assert reasons == {
        "an icon that refers to something outside itself": 3,
        "an icon that draws nothing": 3,
        "an icon that cannot be drawn": 1,
        "an icon without valid dimensions": 3,
        "an icon with elements nested too deeply": 1,
        "an icon with filters": 1,
    }


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"icons": 3}', '{"icons": {"a": 1}}', '{"icons": {}, "aliases": {"a": {}}, "info": 4}']
)
def test_what_is_no_set_is_told(tmp_path, text):
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "icons.json").write_text(text)
    with pytest.raises(ValueError, match="is not an icon set"):
        read(tmp_path / "sets")


def test_no_folder_and_no_set_are_told(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no icons.json"):
        read(tmp_path)


def test_a_model_of_icons_names_their_makers_and_licence(tmp_path, two):
    data = {"name": f"iconify:{two / 'noto'}", "resolution": 8}
    assert main([str(tiny.config_file(tmp_path, data=data, text_encoder={"vocab_size": 560}))]) == 0
    card = (tmp_path / "run" / "pipeline" / "README.md").read_text()
    assert "license: mit" in card and "Noto Emoji by Ada. License: MIT" in card
    assert str(two) not in card
    (two / "noto" / "icons.json").unlink()
    assert "no longer existed" in iconify.credits_of(config(two / "noto").data)[0]


def test_sets_of_one_name_keep_their_whole_titles_and_odd_licences_stay_words(tmp_path):
    for folder, title, spdx in (
        ("a", "Noto Emoji", "Apache-2.0"),
        ("b", "Noto Emoji (v1)", "GPL-3.0-or-later"),
        ("c", "Own", 5),
    ):
        write_set(tmp_path / "sets" / folder, "", {"thing": {"body": DOT.format("#f00")}})
        info = {"name": title, "license": {"title": "Terms", "spdx": spdx}}
        (tmp_path / "sets" / folder / "info.json").write_text(json.dumps(info))
    sets = iconify.find_sets(f"iconify:{tmp_path / 'sets'}")
    assert [each.style for each in sets] == ["Noto Emoji", "Noto Emoji (v1)", "Own"]
    assert [each.license for each in sets] == ["apache-2.0", "gpl-3.0", None]
    assert "Own. License: Terms" in iconify.credits_of(config(tmp_path / "sets").data)[0]
