"""Rows as people's data hold them -> the documented row. The one place that knows what others call a column:

    turns    "conversations", or else "messages", or else "texts": a list of {"from", "value"} (LLaVA), of
             {"role", "content"} (OpenAI, Hugging Face; content may be a list of parts), or of
             {"user", "assistant"} (The Cauldron, FineVision); or any of these as JSON text
    images   "image_bytes" (MiniMind-V's later releases), or else "image", or else "images": one or a list,
             each a file name, base64, or {"bytes", "path"} (Hugging Face); or else what the parts of
             the turns hold

Imports nothing heavy: parquet.py loads it in a process of its own.
"""

import json
from typing import NamedTuple

from model.names import IMAGE_MARK, VIDEO_MARK

TURN_COLUMNS = ("conversations", "messages", "texts")  # the first that holds anything counts
IMAGE_COLUMNS = ("image_bytes", "image", "images")
STORED = "$stored"  # in the place of bytes: {"$stored": [offset, length, digest]}; see Rows
MARK_OF_PART = {
    "image": IMAGE_MARK,
    "image_url": IMAGE_MARK,
    "input_image": IMAGE_MARK,
    "video": VIDEO_MARK,
}
PLACES = ("image", "image_url", "url", "path")  # in a part that brings its image
TEXT_PARTS = ("text", "input_text")
SHEET = "dataset/README.md lists what is read"


class Stored(NamedTuple):
    """An image whose bytes were taken out of a table: where they lie in the index, and image_digest() of
    them."""

    offset: int
    length: int
    digest: str


# ---- turns -------------------------------------------------------------------------------------------------


def find_turns(row: dict) -> tuple[list[dict], bool]:
    """The turns of a row as the documented row has them, one {"from", "value"} or {"role", "content"} each;
    and whether rows of this kind say by marks where an image stands. Raises ValueError."""
    column, given = turns_in(row)
    turns = [turn for one in given for turn in split_pair(one)]
    has_marks = column == TURN_COLUMNS[0] and len(turns) == len(given)
    return [with_text(turn) for turn in turns], has_marks


def turns_in(row: dict) -> tuple[str, list]:
    """The column of the turns, and the list there. Raises ValueError if there is none."""
    column = first_filled(row, TURN_COLUMNS)
    if not column:
        raise ValueError(
            f'it has no "{TURN_COLUMNS[0]}": its columns are {list_columns(row)}; '
            f"turns are read from {', '.join(TURN_COLUMNS)} ({SHEET})"
        )
    turns = row[column]
    if isinstance(turns, str):
        try:
            turns = json.loads(turns, object_hook=without_places if STORED in turns else None)
        except (ValueError, RecursionError):
            raise ValueError(f'it has no "{column}": the text there is not JSON') from None
    if not isinstance(turns, list) or not turns:
        raise ValueError(f'it has no "{column}": a list of turns should stand there ({SHEET})')
    return column, turns


def without_places(inside: dict) -> dict:
    """What a text says of places is not true."""
    return {name: value for name, value in inside.items() if name != STORED}


def split_pair(given: object) -> list:
    """The turns in one element of a list of turns: of {"user", "assistant"} two, or with "system" three."""
    if not isinstance(given, dict) or not {"user", "assistant"} <= given.keys():
        return [given]
    roles = ("system", "user", "assistant") if given.get("system") else ("user", "assistant")
    return [{"role": role, "content": given[role]} for role in roles]


def with_text(turn: object) -> object:
    """The same turn, with one text in the place of a list of parts. Raises ValueError for a turn without a
    role, and for a part of another kind than text, image and video."""
    if isinstance(turn, dict) and not {"from", "role"} & turn.keys():
        raise ValueError(
            'a turn must look like {"from": ..., "value": ...}, {"role": ..., "content": ...} or '
            f'{{"user": ..., "assistant": ...}}, but its keys are {list_columns(turn)}'
        )
    if not isinstance(turn, dict) or not isinstance(turn.get("content"), list):
        return turn
    texts = [text_of_part(part) for part in turn["content"]]
    return {**turn, "content": "\n".join(text for text in texts if text)}


def text_of_part(part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind in MARK_OF_PART:
        return MARK_OF_PART[kind]
    text = part.get("text") if kind in TEXT_PARTS else part
    if not isinstance(text, str):
        raise ValueError(
            f'a part of a turn must look like {{"type": "text", "text": "..."}} or {{"type": "image"}}, '
            f"not {str(part)[:80]}"
        )
    return text


# ---- images ------------------------------------------------------------------------------------------------


def find_images(row: dict) -> str | list[str | Stored] | None:
    """What stands for the images of a row: names and base64 as they are, one string or a list of them, and
    images that were taken out of a table. Raises ValueError."""
    column = first_filled(row, IMAGE_COLUMNS)
    if not column:
        return [image_in(value, "image") for value in images_in_turns(row)] or None
    given = row[column]
    if isinstance(given, list):
        return [image_in(value, column) for value in given]
    image = image_in(given, column)
    return image if isinstance(given, str) else [image]


def images_in_turns(row: dict) -> list:
    """What the parts of the turns hold besides their kind: {"type": "image", "image": "a.jpg"}."""
    if not first_filled(row, TURN_COLUMNS):
        return []
    contents = [turn.get("content") for turn in turns_in(row)[1] if isinstance(turn, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    shown = [
        part
        for part in parts
        if isinstance(part, dict) and MARK_OF_PART.get(str(part.get("type"))) == IMAGE_MARK
    ]
    found = [next((part[key] for key in PLACES if part.get(key)), None) for part in shown]
    return [place.get("url", place) if isinstance(place, dict) else place for place in found if place]


def image_in(value: object, column: str) -> str | Stored:
    """A file name, base64, or where the bytes lie. Raises ValueError for anything else."""
    if isinstance(value, dict) and STORED not in value:
        inside = value.get("bytes")
        column, value = (column, value.get("path")) if inside is None else ("bytes", inside)
    if isinstance(value, dict) and is_stored(value.get(STORED)):
        return Stored(*value[STORED])
    if not isinstance(value, str):
        raise ValueError(f'its "{column}" must be a file name or a list of them, not {str(value)[:80]}')
    is_base64 = column in ("bytes", "image_bytes") and value[:5].lower() != "data:"
    return f"data:;base64,{value}" if is_base64 else value


def is_stored(place: object) -> bool:
    return (
        isinstance(place, list) and [type(part) for part in place] == [int, int, str] and min(place[:2]) >= 0
    )


# ---- columns -----------------------------------------------------------------------------------------------


def first_filled(row: dict, columns: tuple[str, ...]) -> str:
    """The first of these columns that holds anything; "" if none does."""
    return next((column for column in columns if not is_empty(row.get(column))), "")


def is_empty(value: object) -> bool:
    """Is this how tables write that there is nothing?"""
    if isinstance(value, dict):
        return all(inside is None for inside in value.values())
    return value is None or value in ("", [])


def list_columns(row: dict) -> str:
    return ", ".join(str(name)[:40] for name in list(row)[:20]) or "none"
