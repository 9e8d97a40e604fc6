"""Text from files, data and models as a terminal can show it: whatever is printed and was not written by a
programmer goes through here.

A terminal obeys what it is shown: a file's name can hold a sequence that clears the screen, an answer one
that types a command, and a mark of direction makes text read as something else. Imports nothing heavy.
"""

import re

# Control characters, marks of direction, separators of lines, tags, halves of surrogate pairs. Spaces of
# other scripts and joiners inside their words are text.
HIDDEN = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f"
)
OBEYED = re.compile(f"[{HIDDEN}]")
OBEYED_IN_A_LINE = re.compile(f"[{HIDDEN}\n\t]")


def printable(text: str) -> str:
    """What a terminal would obey is spelled out (\\x1b); the ends of lines stay."""
    return OBEYED.sub(spell, text)


def one_line(text: str, limit: int = 300) -> str:
    """The same, with the ends of lines spelled out too, and at most `limit` characters of it."""
    shown = OBEYED_IN_A_LINE.sub(spell, text[:limit])
    return shown + "..." if len(text) > limit else shown


def spell(match: re.Match) -> str:
    return repr(match[0])[1:-1]


def format_bytes(num_bytes: int) -> str:
    unit, name = next(
        pair
        for pair in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))
        if num_bytes >= pair[0] or pair[0] == 1
    )
    return f"{num_bytes / unit:.3g} {name}"
