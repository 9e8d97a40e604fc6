"""Who is here, and what images they sent. All on the server's event loop."""

import contextlib
import math
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import quote

from serving.decoding import Reduced

GRACE = 120  # seconds without a connection, after which a visitor has left
ARRIVAL = 60  # seconds until a page that asked has opened the connection that brings the answer
AWAY = 10  # seconds without that connection, after which a question is given up
MOST_IMAGES = 64  # of one visitor; the oldest goes when another comes
MOST_BYTES = 128 << 20  # of all images


class Full(Exception):
    """There is no room for more images."""


class Visitors:
    """A visitor is known by keys: the cookie of the browser, the session of the page. Open connections keep
    a visitor here, and for a while so does every request."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.connections: Counter[str] = Counter()
        self.last_seen: dict[str, float] = {}

    def see(self, *keys: str) -> None:
        for key in filter(None, keys):
            self.last_seen[key] = self.clock()

    @contextlib.contextmanager
    def connected(self, *keys: str) -> Iterator[None]:
        """While a connection is open that tells when its visitor leaves."""
        self.see(*keys)
        self.connections.update(filter(None, keys))
        try:
            yield
        finally:
            self.connections.subtract(filter(None, keys))
            self.connections += Counter()  # drops those that are at 0
            self.see(*keys)

    def is_here(self, key: str, grace: float = GRACE) -> bool:
        return self.connections[key] > 0 or self.clock() - self.last_seen.get(key, -1e9) <= grace

    def awaits(self, session: str, since: float) -> bool:
        """Does a page wait for the answer to what it asked then? A closed tab must not hold up others."""
        key = answers_to(session)
        if self.is_here(key, AWAY):
            return True
        has_come = self.last_seen.get(key, -math.inf) >= since
        return not has_come and self.clock() - since <= ARRIVAL

    def pop_gone(self) -> list[str]:
        """Who has left since the last call."""
        gone = [key for key in self.last_seen if not self.is_here(key)]
        for key in gone:
            del self.last_seen[key]
        return gone


# ---- images ------------------------------------------------------------------------------------------------


@dataclass
class Kept:
    """An image that a visitor sent; problem: why it could not be read, for a visitor to read."""

    owner: str
    reduced: Reduced | None
    problem: str = ""

    @property
    def size(self) -> int:
        return len(self.reduced.seen) + len(self.reduced.shown) if self.reduced else 0


class Images:
    """The images in the chats of all visitors, in memory alone: no file is ever written. Each has a name that
    cannot be guessed.

    folder  what the names begin with; Gradio takes them for paths of files that it keeps
    """

    def __init__(self, folder: str):
        self.folder = folder
        self.kept: dict[str, Kept] = {}  # in the order in which they came
        self.size = 0

    def add(self, owner: str, reduced: Reduced | None, problem: str = "") -> str:
        """Keep an image; an empty owner stays for ever. Returns its name. Raises Full."""
        kept = Kept(owner, reduced, problem)
        if owner and self.size + kept.size > MOST_BYTES:
            raise Full
        name = f"{self.folder}/{secrets.token_hex(16)}.jpg"
        self.kept[name] = kept
        self.size += kept.size
        self.trim(owner)
        return name

    @property
    def gone(self) -> str:
        """The name of all images that are not kept any more."""
        return f"{self.folder}/gone.jpg"

    def get(self, name: str) -> Kept | None:
        return self.kept.get(name)

    def claim(self, names: list[str], owner: str) -> None:
        """These are in this visitor's chat now, and stay as long as the visitor does."""
        for name in names:
            if (kept := self.kept.get(name)) and kept.owner:
                kept.owner = owner
        self.trim(owner)

    def trim(self, owner: str) -> None:
        own = [name for name, kept in self.kept.items() if kept.owner == owner]
        for name in own[:-MOST_IMAGES] if owner else []:
            self.drop(name)

    def drop(self, name: str) -> None:
        self.size -= self.kept.pop(name).size

    def drop_gone(self, is_here: Callable[[str], bool]) -> None:
        for name in [name for name, kept in self.kept.items() if kept.owner and not is_here(kept.owner)]:
            self.drop(name)


def address_of(name: str) -> str:
    """Where the page finds an image of the store."""
    return "/gradio_api/file=" + quote(name)


def answers_to(session: str) -> str:
    """The key of the connection that brings a page its answers."""
    return f"answers to {session}"
