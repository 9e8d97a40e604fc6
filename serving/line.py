"""Whose question is answered next. All on the server's event loop, except the model."""

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from serving.visitors import Visitors, answers_to

MOST_WAITING = 100
NEAR, NEAR_SECONDS, FAR_SECONDS = 10, 1, 4  # how often a place is told: to those in front oftener
BETWEEN = 0.2  # seconds between two texts, where others wait
ARRIVAL = 60  # seconds until a page that asked has opened the connection that brings the answer
AWAY = 10  # seconds without that connection, after which a question is given up


class LineFull(Exception):
    """Too many wait."""


class AlreadyWaiting(Exception):
    """This visitor does already."""


class Place:
    def __init__(self, owner: str, since: float):
        self.owner, self.since, self.first = owner, since, asyncio.Event()


class Line:
    """The visitors who wait for the model, first come, first served. It answers one at a time: on a CPU it
    would not be faster for two."""

    def __init__(self, visitors: Visitors, most_waiting: int = MOST_WAITING):
        self.visitors, self.most_waiting = visitors, most_waiting
        self.places: deque[Place] = deque()
        self.model = ThreadPoolExecutor(1, "model")

    async def answers(self, owner: str, reply: Callable[[], Iterator[str]]) -> AsyncIterator[int | str]:
        """First numbers: the place of the visitor in the line, whenever it has moved. Then the texts of
        reply(). Ends early if the visitor leaves. Raises LineFull, AlreadyWaiting."""
        place, told = self.join(owner), 0
        texts = None
        try:
            while number := self.places.index(place):
                if number != told:
                    yield (told := number)
                with contextlib.suppress(TimeoutError):
                    seconds = NEAR_SECONDS if number <= NEAR else FAR_SECONDS
                    await asyncio.wait_for(place.first.wait(), seconds)
                if not self.is_watched(place):
                    return
            loop, texts = asyncio.get_running_loop(), reply()
            while (text := await loop.run_in_executor(self.model, self.pull, texts)) is not None:
                yield text
        finally:
            if texts is not None:  # it may be at work still: then after that
                self.model.submit(texts.close)
            self.leave(place)

    def pull(self, texts: Iterator[str]) -> str | None:
        """The next text. To show it takes longer than to make it: where others wait, not every one is."""
        text = latest = next(texts, None)
        end = time.monotonic() + BETWEEN
        while latest is not None and len(self.places) > 1 and time.monotonic() < end:
            text, latest = latest, next(texts, None)
        return text if latest is None else latest

    def join(self, owner: str) -> Place:
        if any(place.owner == owner for place in self.places):
            raise AlreadyWaiting
        if len(self.places) > self.most_waiting:
            raise LineFull
        place = Place(owner, self.visitors.clock())
        self.places.append(place)
        return place

    def leave(self, place: Place) -> None:
        self.places.remove(place)
        if self.places:
            self.places[0].first.set()

    def is_watched(self, place: Place) -> bool:
        """Does somebody wait for this answer? A closed tab must not hold up the others."""
        key = answers_to(place.owner)
        if self.visitors.is_here(key, AWAY):
            return True
        has_come = self.visitors.last_seen.get(key, -math.inf) >= place.since
        return not has_come and self.visitors.clock() - place.since <= ARRIVAL
