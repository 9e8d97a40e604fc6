"""What the page sends when something happens on it, rebuilt from the fields that it needs: nothing else that
is in a request reaches Gradio, which would take any `path` in it for a file and any address for one to fetch.
"""

import json
import re

from serving.visitors import Images

SESSION = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
MOST_TEXT = 20_000  # characters of a question; a longer one fits no model's context
MOST_NAMED = 32  # images; the page refuses fewer, with a friendly line


def read_fields(body: bytes) -> dict:
    """Raises ValueError."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("The request is not JSON.") from None
    if not isinstance(fields, dict):
        raise ValueError("The request is no object.")
    for name, kind in (("session_hash", str), ("fn_index", int)):
        if not isinstance(fields.get(name), kind):
            raise ValueError(f"{name} is missing.")
    if not SESSION.fullmatch(fields["session_hash"]):
        raise ValueError("session_hash is no name.")
    return fields


def clean_event(body: bytes, allowed: dict[int, int], images: Images) -> dict:
    """An event of the page; allowed: how many values each has, by its number. Raises ValueError."""
    fields = read_fields(body)
    data, event, trigger = (fields.get(name) for name in ("data", "event_data", "trigger_id"))
    if fields["fn_index"] not in allowed:
        raise ValueError("The page has no such event.")
    if not isinstance(data, list) or len(data) != allowed[fields["fn_index"]]:
        raise ValueError("The page has other values.")
    index = event.get("index") if isinstance(event, dict) else None
    return {
        "data": [clean_value(value, images) for value in data],
        "event_data": {"index": index if is_number(index) else -1, "value": None},  # which example
        "fn_index": int(fields["fn_index"]),
        "session_hash": fields["session_hash"],
        "trigger_id": trigger if is_number(trigger) and isinstance(trigger, int) else None,
    }


def clean_value(value, images: Images):
    """A number, or what stands in the box: a text and names of images. None of anything else."""
    if is_number(value):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        return None
    files = value.get("files")
    files = files[:MOST_NAMED] if isinstance(files, list) else []
    named = [file.get("path") for file in files if isinstance(file, dict)]
    known = [name if isinstance(name, str) and images.get(name) else images.gone for name in named]
    return {
        "text": value["text"][:MOST_TEXT].encode(errors="replace").decode(),  # half a surrogate is no text
        "files": [{"path": name, "meta": {"_type": "gradio.FileData"}} for name in known],
    }


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**53


def clean_cancel(body: bytes) -> dict:
    """Raises ValueError."""
    fields = read_fields(body)
    event = fields.get("event_id")
    if not isinstance(event, str) or not SESSION.fullmatch(event):
        raise ValueError("event_id is missing.")
    return {"session_hash": fields["session_hash"], "fn_index": fields["fn_index"], "event_id": event}
