"""Names, keywords and groups of emoji, English and Chinese, as further captions; of npm's package `emojibase-data` (MIT)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sfumato.training.data.records import hash_fraction

HOW = "npm pack emojibase-data, unpack it, and name the folder `package` that was in it"
COMMAS = {"en": ", ", "zh": "，"}
NUM_KEYWORDS = 3  # in a caption


def read_keywords(folder: Path, languages: Sequence[str]) -> dict[str, list[str]]:
    """Further captions of each emoji, by its code points (hexadecimal, FE0F left out): its name in Unicode's CLDR, this with
    its group ("nerd face, with glasses"), and some of its keywords ("clever, geek, glasses").

    Args:
        folder: as npm packs it, with `LANGUAGE/data.json` and `LANGUAGE/messages.json`.

    Raises:
        ValueError: it is another folder, or damaged.
    """
    captions: dict[str, list[str]] = {}
    for language in languages:
        try:
            entries, messages = (
                json.loads((folder / language / f"{name}.json").read_bytes()) for name in ("data", "messages")
            )
            if not isinstance(entries, list) or not entries:
                raise ValueError("no list of emoji")
            groups = {group["order"]: str(group["message"]) for group in messages["subgroups"]}
            for entry in entries:
                captions.setdefault(plain_code(entry["hexcode"]), []).extend(_captions(entry, groups, COMMAS[language]))
        except OSError as error:
            raise ValueError(f"data.keywords={folder} has no {language}/data.json and messages.json: {HOW}") from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"data.keywords={folder}: {language}/ is damaged ({type(error).__name__}: {error}): {HOW}"
            ) from error
    return captions


def plain_code(code: str) -> str:
    """Hexadecimal code points without the sign that asks for an image in place of a letter."""
    return "-".join(point for point in code.split("-") if point != "FE0F")


def _captions(entry: dict[str, Any], groups: dict[int, str], comma: str) -> list[str]:
    name = str(entry["label"])
    found = [name]
    if "subgroup" in entry:
        found.append(f"{name}{comma}{groups[entry['subgroup']]}")
    words = sorted(set(map(str, entry.get("tags", []))) - {name}, key=lambda word: hash_fraction(f"keyword {name} {word}"))
    return [*found, comma.join(words[:NUM_KEYWORDS])] if len(words) >= NUM_KEYWORDS else found
