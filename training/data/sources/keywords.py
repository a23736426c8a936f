"""Names, keywords and groups of emoji, English and Chinese, as further captions; from npm's `emojibase-data` (MIT)."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sfumato.training.data.records import hash_fraction

HOW = "run npm pack emojibase-data, unpack the archive, and give the folder `package` that was in it"
COMMAS = {"en": ", ", "zh": "，"}
NUM_KEYWORDS = 3  # per caption


def keyword_files(folder: Path, languages: Sequence[str]) -> list[Path]:
    """The files that are read: for each language its emoji, then its groups."""
    return [folder / language / f"{name}.json" for language in languages for name in ("data", "messages")]


def read_keywords(folder: Path, languages: Sequence[str]) -> dict[str, list[str]]:
    """Further captions of emoji, by code points (hexadecimal, FE0F left out): the name in Unicode's CLDR, the name with its
    group ("nerd face, with glasses"), and up to three keywords ("clever, brainy, gifted"). There are none for skin-tone
    variants, as their names already say everything.

    Args:
        folder: the unpacked npm package, with `LANGUAGE/data.json` and `LANGUAGE/messages.json`.

    Raises:
        ValueError: it is a different folder, or its files are damaged.
    """
    captions: dict[str, list[str]] = {}
    for language in languages:
        data, messages = keyword_files(folder, [language])
        groups = _groups(_read(messages))
        for entry in _list(_read(data), data):
            code, added = _captions(entry, groups, COMMAS[language], data)
            captions.setdefault(plain_code(code), []).extend(added)
    return captions


def plain_code(code: str) -> str:
    """Hexadecimal code points without FE0F, the variation selector that asks for an emoji instead of text."""
    return "-".join(point for point in code.upper().split("-") if point != "FE0F")


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        raise ValueError(f"data.keywords: {file} cannot be read ({error.strerror}): {HOW}") from error
    except ValueError as error:
        raise ValueError(f"data.keywords: {file} is damaged ({error}): {HOW}") from error


def _list(content: Any, file: Path) -> list[dict[str, Any]]:
    if not isinstance(content, list) or not content or not all(isinstance(entry, dict) for entry in content):
        raise ValueError(f"data.keywords: {file} is not a list of emoji: {HOW}")
    return content


def _groups(messages: Any) -> dict[int, str]:
    """Number of a group -> its name; numbers that two groups share, such as 46 in version 17, are left out."""
    rows = messages.get("subgroups") if isinstance(messages, dict) else None
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    named = [(row["order"], row["message"]) for row in rows if isinstance(row.get("order"), int) and row.get("message")]
    count = Counter(order for order, _ in named)
    return {order: str(message) for order, message in named if count[order] == 1}


def _captions(entry: dict[str, Any], groups: dict[int, str], comma: str, file: Path) -> tuple[str, list[str]]:
    """Code and captions of one emoji; keywords are ordered by a hash, so that the choice does not favour the first letters."""
    code = entry.get("hexcode")
    name = entry.get("label")
    tags = entry.get("tags") or []
    if not (isinstance(code, str) and isinstance(name, str) and name and isinstance(tags, list)):
        raise ValueError(f"data.keywords: {file} has an emoji without hexcode, label or a list of tags: {entry}: {HOW}")
    captions = [name]
    number = entry.get("subgroup")
    if isinstance(number, int) and number in groups:
        captions.append(f"{name}{comma}{groups[number]}")
    words = {str(tag) for tag in tags if str(tag).lower() != name.lower()}
    chosen = sorted(words, key=lambda word: hash_fraction(f"keyword {name} {word}"))[:NUM_KEYWORDS]
    return code, captions + ([comma.join(chosen)] if chosen else [])
