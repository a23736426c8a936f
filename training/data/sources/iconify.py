"""Icon sets of Iconify as images: thousands of named SVGs, drawn at any resolution.

`data.name=iconify:FOLDER`, where FOLDER holds the `icons.json` of one set, as `npm install @iconify-json/noto` leaves it, or
several sets in sub-folders, such as `node_modules/@iconify-json`. A caption is the name of an icon or an alias that the set
has for it; if there are several sets, it also gives the style, "rocket, Noto style".
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from xml.parsers import expat

from sfumato.training.config.schema import DataConfig
from sfumato.training.data.records import Record, Unusable, hash_fraction
from sfumato.training.data.sources.openmoji import rasterise

MEASURES = ("left", "top", "width", "height")
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
MAX_DEPTH = 64  # of nested elements; a few hundred overflow the renderer's stack
# The Hub's names of licences that icon sets have.
LICENSES = {
    *("apache-2.0", "mit", "isc", "cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-4.0"),
    *("cc-by-nc-sa-4.0", "gpl-2.0", "gpl-3.0", "lgpl-3.0", "mpl-2.0", "ofl-1.1", "unlicense", "bsd-2-clause", "bsd-3-clause"),
}
# An icon may only draw what it contains; it must not load anything else.
_FOREIGN = re.compile(
    r"<\s*(image|script|foreignObject|!|\?)|(href|src)\s*=\s*[\"'](?!#)|url\(\s*[\"']?(?!#|[\"']#)", re.IGNORECASE
)


@dataclass(frozen=True, kw_only=True)
class IconSet:
    """An icon set: its icons with their dimensions, and who made them.

    Attributes:
        title: its name, such as `Noto Emoji`.
        style: the name in short, such as `Noto`.
        icons: name -> its entry in `icons.json`, with `body`, the content of an SVG.
        aliases: name -> the icon that it is another name for.
        license: the Hub's name for the licence, or None.
        credit: name, author and licence in one sentence.
    """

    title: str
    style: str
    icons: dict[str, dict]
    aliases: dict[str, str]
    license: str | None
    credit: str


def find_sets(name: str) -> list[IconSet]:
    """The sets in the folder that `data.name` names, in the order of their paths.

    Raises:
        ValueError: there is no such folder, no set in it, or a file that is not an icon set.
    """
    place = name.partition(":")[2]
    root = Path(place).expanduser()
    if not place or not root.is_dir():
        raise ValueError(f"data.name={name!r}: there is no folder {str(root)!r}; write iconify:FOLDER")
    paths = [path for depth in ("", "*/", "*/*/") for path in sorted(root.glob(f"{depth}icons.json"))]
    if not paths:
        raise ValueError(f"{root} holds no icons.json; unpack a set there, for example with: npm install @iconify-json/noto")
    sets = [read_set(path) for path in paths]
    styles = [each.style for each in sets]
    return [replace(each, style=each.title) if styles.count(each.style) > 1 else each for each in sets]


def read_set(path: Path) -> IconSet:
    """Read one set from its `icons.json`.

    Raises:
        ValueError: the file is not an icon set.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        info_path = path.with_name("info.json")
        info = content.get("info") or (json.loads(info_path.read_text(encoding="utf-8")) if info_path.is_file() else {})
        common = {"width": 16, "height": 16} | {key: content[key] for key in MEASURES if key in content}
        title = str(info.get("name") or content.get("prefix") or path.parent.name)
        license, author = info.get("license") or {}, info.get("author") or {}
        spdx = license.get("spdx")
        by = author.get("name")
        terms = license.get("title") or "no licence named"
        icons = {str(name): common | icon for name, icon in content["icons"].items()}
        plain = {name: alias for name, alias in content.get("aliases", {}).items() if set(alias) <= {"parent", "hidden"}}
        aliases = {str(name): str(alias["parent"]) for name, alias in plain.items()}  # other aliases are rotated or mirrored
        license_id = re.sub("-(only|or-later)$", "", str(spdx).lower())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not an icon set in Iconify's format: {error!r}") from error
    style = " ".join(re.sub(r"\(.*?\)|\b[Ee]mojis?\b|\b[Ii]cons?\b", " ", title).split()) or title
    credit = f"{title}{f' by {by}' if by else ''}. License: {terms}"
    return IconSet(
        title=title,
        style=style,
        icons=icons,
        aliases=aliases,
        license=license_id if license_id in LICENSES else None,
        credit=credit,
    )


def credits_of(config: DataConfig) -> tuple[str, str | None]:
    """Who made the sets, and their licence if they share one; called when a model is saved, hours after the sets were read."""
    try:
        sets = find_sets(config.name)
    except (ValueError, OSError):
        return "icon sets that no longer existed when this was written; look up their licences", None
    licenses = {each.license for each in sets}
    return "; ".join(each.credit for each in sets), licenses.pop() if len(licenses) == 1 else None


def thing_of(name: str, icons: dict) -> str:
    """The name in words; "dark" becomes "dark skin tone" if the set has the icon in all five tones (`person-dark`)."""
    for tone in sorted(TONES, key=len, reverse=True):
        base = name.removesuffix(f"-{tone}")
        if base != name and all(f"{base}-{each}" in icons for each in TONES):
            return f"{base.replace('-', ' ')} {tone} skin tone"
    return re.sub(r"\b(medium) (light|dark) (skin tone)", r"\1-\2 \3", re.sub("[-_]+", " ", name))


def svg_of(icon: dict) -> str:
    """The icon as an SVG in the middle of a square; black where the set leaves the colour to the renderer.

    Raises:
        Unusable: it draws nothing, has no valid dimensions, or refers to something outside itself.
    """
    body = icon.get("body")
    try:
        left, top, width, height = (float(icon.get(key, 0)) for key in MEASURES)
    except (TypeError, ValueError, OverflowError) as error:
        raise Unusable("an icon without valid dimensions") from error
    if not all(map(math.isfinite, (left, top, width, height))):
        raise Unusable("an icon without valid dimensions")
    if not isinstance(body, str) or not body.strip() or not 0 < min(width, height) <= max(width, height) < 1e6:
        raise Unusable("an icon that draws nothing")
    if _FOREIGN.search(body):
        raise Unusable("an icon that refers to something outside itself")
    side = max(width, height)
    box = f"{left - (side - width) / 2:g} {top - (side - height) / 2:g} {side:g} {side:g}"
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = f'<svg {spaces} viewBox="{box}" width="{side:g}" height="{side:g}" color="#000000">{body}</svg>'
    _check_elements(svg)
    return svg


def _check_elements(svg: str) -> None:
    """Raise Unusable for deep nesting and filters, which would overflow the renderer's stack or keep it busy."""
    depth = 0
    faults = []

    def enter(name, attributes):
        nonlocal depth
        depth += 1
        if depth > MAX_DEPTH:
            faults.append("an icon with elements nested too deeply")
        if name.rpartition(":")[2].startswith("fe"):
            faults.append("an icon with filters")

    def leave(name):
        nonlocal depth
        depth -= 1

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = enter, leave
    try:
        parser.Parse(svg, True)
    except expat.ExpatError as error:
        raise Unusable("an icon that cannot be drawn") from error
    if faults:
        raise Unusable(faults[0])


def open_source(config: DataConfig, files: list[Path]) -> Iterator[Record]:
    """A record for each icon. One in ten pairs of thing and style is held out, provided that another style of the thing is in
    the training split, and one in twenty things that only one set has. (`data.max_records` may leave the other style out.)

    Raises:
        ValueError: there are no sets, or no icon has a name with one of the words.
    """
    sets = find_sets(config.name)
    styles: dict[str, list[str]] = defaultdict(list)
    things = [{name: thing_of(name, each.icons) for name in each.icons} for each in sets]  # the names in words, for each set
    for each, names in zip(sets, things):
        for name, thing in names.items():
            if not each.icons[name].get("hidden"):
                styles[thing].append(each.style)
    words = set(config.words)
    if words and not any(words & set(thing.lower().split()) for thing in styles):
        raise ValueError(f"no icon has a name with one of data.words={config.words}")
    for each, names in zip(sets, things):
        others = defaultdict(list)
        for alias, parent in each.aliases.items():
            others[parent].append(thing_of(alias, each.icons))
        for name, icon in each.icons.items():
            thing, ending = names[name], f", {each.style} style" if len(sets) > 1 else ""
            label = f"{each.style}/{name}"
            if words and not words & set(thing.lower().split()):
                continue
            if icon.get("hidden"):
                yield Record(label, left_out="withdrawn by the set")
                continue
            if not config.skin_tones and "skin tone" in thing:
                continue
            captions = list(dict.fromkeys(f"{text}{ending}" for text in [thing, *others[name]]))
            split = "held_out" if is_held_out(thing, each.style, styles[thing]) else "train"
            yield Record(label, lambda icon=icon: _draw(icon, config.resolution), captions, split)


def is_held_out(thing: str, style: str, styles: list[str]) -> bool:
    """Whether an icon is held out; see `open_source`."""
    if len(set(styles)) == 1:
        return hash_fraction(f"icon {thing}") < 0.05
    rank = {each: hash_fraction(f"icon {thing}, {each}") for each in styles}
    return rank[style] < 0.1 and style != max(rank, key=lambda each: rank[each])


def _draw(icon: dict, resolution: int):
    svg = svg_of(icon)
    try:
        return rasterise(svg, resolution)
    except Exception as error:  # whatever resvg raises for input it cannot read
        raise Unusable("an icon that cannot be drawn") from error
