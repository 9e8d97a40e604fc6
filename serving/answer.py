"""An answer in the making, as the one who asked for it sees it; engine.py makes it."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator

from model.generate import Sampling
from model.prompt import Prompt

FIRST_PLACE = 0.2  # seconds until somebody is told to wait: most do not have to
LOOK, FAR_LOOK = 1, 4  # seconds between two looks at the line and at who asked; from place NEAR on the latter
NEAR = 10
BETWEEN = 0.2  # seconds between two texts, where others are answered too: to show one takes its time


class LineFull(Exception):
    """Too many wait."""


class AlreadyWaiting(Exception):
    """This visitor does already."""


class Answer:
    """One answer in the making, as the one who asked sees it.

    engine         an Engine, which makes it
    pieces         of its text so far
    finish_reason  "" while it grows; then "stop" (the model has ended it, or a stop word came), "length"
                   (max_new_tokens, or the end of the context), "stopped" (nobody wants it any more), "error"
    """

    def __init__(self, engine, owner: str, prompt: Prompt, sampling: Sampling):
        self.engine, self.owner, self.prompt, self.sampling = engine, owner, prompt, sampling
        self.pieces: list[str] = []
        self.finish_reason, self.error = "", None
        self.num_tokens = 0
        self.asked = time.monotonic()
        self.first = self.last = math.nan  # when these tokens came
        self.wake: Callable[[], None] = lambda: None

    def __repr__(self) -> str:
        state = self.finish_reason or (f"number {self.place} in line" if self.place else "growing")
        return f"Answer({state}, {self.num_tokens} tokens, {self.text!r})"

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def place(self) -> int:
        """In the line; 0 = its turn has come."""
        return self.engine.place_of(self)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt.input_ids)

    @property
    def seconds_to_first(self) -> float:
        return self.first - self.asked

    @property
    def tokens_per_second(self) -> float:
        """After the first one; nan if there is but one."""
        return (self.num_tokens - 1) / (self.last - self.first) if self.num_tokens > 1 else math.nan

    def stop(self) -> None:
        self.engine.stop(self)

    def __iter__(self) -> Iterator[str]:
        """The pieces as they come, on any thread; to leave the loop stops the answer. Raises what went wrong
        in the model."""
        changed, shown = self.engine.changed, 0
        try:
            is_last = False
            while not is_last:
                with changed:
                    while len(self.pieces) == shown and not self.finish_reason:
                        changed.wait()
                    new, is_last = self.pieces[shown:], bool(self.finish_reason)
                shown += len(new)
                yield from new
        finally:
            self.stop()
        if self.error:
            raise self.error

    async def events(self, is_here: Callable[[], bool] = lambda: True) -> AsyncIterator[int | str]:
        """On an event loop: numbers, the place in the line whenever it has moved, then pieces. Ends once
        is_here() says no, and stops the answer then, as it does when the iteration is closed."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:  # from the model's thread
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(changed.set)

        self.wake, told, shown, pause = wake, 0, 0, FIRST_PLACE
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), pause)
                changed.clear()
                if not is_here():
                    return
                is_last, place = bool(self.finish_reason), self.place
                new, pause = self.pieces[shown:], FAR_LOOK if place > NEAR else LOOK
                shown += len(new)
                if place not in (0, told):
                    yield (told := place)
                for text in ["".join(new)] if new and self.engine.is_shared else new:
                    yield text
                if is_last:
                    break
                if new and self.engine.is_shared:
                    await asyncio.sleep(BETWEEN)
        finally:
            self.stop()
        if self.error:
            raise self.error
