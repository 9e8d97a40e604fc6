"""Images of visitors are decoded in a process of their own, which ends with its image: whatever a file does
to a decoder, it meets a limit of memory and of time, holds up no answer, and leaves nothing behind.
"""

import asyncio
import contextlib
import io
import math
import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO

import PIL
from PIL import Image

from model.bounds import bound_memory
from model.data.sources import Embedded
from model.images import identify, open_image

SHOWN_SIDE = 768  # pixels, at most, of what the page shows
READ, REFUSED, TOO_LARGE = b"+", b"-", b"?"  # what the process says of an image
BUSY = "many large images are being read: try again in a minute"
TOO_SLOW = "it takes too much memory or time to read: scale it down"


@dataclass(frozen=True)
class Limits:
    pixels: int  # a larger image is not begun
    memory: int  # bytes, beyond what the process has at its start
    seconds: int  # of the processor; a clock would refuse images because the machine is busy
    at_once: int


# Photographs are read side by side, in half a second. What takes longer begins anew when its turn has come:
# it holds up no photograph, and memory stays bounded.
QUICK = Limits(pixels=16_000_000, memory=512 << 20, seconds=1, at_once=4)
SLOW = Limits(pixels=1 << 62, memory=1536 << 20, seconds=20, at_once=1)
MOST_WAITING = 48  # for a slow one; fewer than uploads.MOST_AT_ONCE, so that photographs still come in
PATIENCE = 3  # seconds on the clock for one of the processor, then the process is ended
START = 10  # seconds on the clock for its start


@dataclass(frozen=True)
class Reduced:
    """An image, as small as the model and the page need it."""

    seen: bytes  # (S, S, 3) uint8: what get_img_process() makes of the file
    shown: bytes  # a JPEG of at most SHOWN_SIDE

    @property
    def image(self) -> Image.Image:
        """What the model sees; no copy of it."""
        side = math.isqrt(len(self.seen) // 3)
        return Image.frombuffer("RGB", (side, side), self.seen, "raw", "RGB", 0, 1)


class Upload(Embedded):
    """What a visitor sent, for open_image(): its name says nothing."""

    def __init__(self, data: bytes):
        super().__init__("the file", (), 0, 0)
        object.__setattr__(self, "data", data)

    def read(self) -> bytes:
        return self.data


# ---- in the process of an image ----------------------------------------------------------------------------


def answer_with(sender, data: bytes, side: int, limits: Limits) -> None:
    """The whole life of a process: sends one message."""
    silence()
    restrict(limits)
    try:
        sender.send_bytes(reduce_image(data, side, limits.pixels))
    except MemoryError:
        sender.send_bytes(TOO_LARGE)
    except Exception as error:  # on damaged files the decoders raise anything
        reason = str(error).removeprefix("cannot read image the file: ")
        sender.send_bytes(REFUSED + reason.encode(errors="replace")[:500])


def reduce_image(data: bytes, side: int, most_pixels: int) -> bytes:
    width, height = identify(io.BytesIO(data)).size
    if width * height > most_pixels:
        return TOO_LARGE
    image = open_image(Upload(data))
    seen = image.resize((side, side), Image.Resampling.BICUBIC).tobytes()
    image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    shown = io.BytesIO()
    image.save(shown, "JPEG", quality=90)
    return READ + seen + shown.getvalue()


def silence() -> None:
    """The libraries of some formats write to the terminal what a file tells them to."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)


def restrict(limits: Limits) -> None:
    """Bounds of memory, time and files, where the system has them."""
    with contextlib.suppress(AttributeError, OSError):
        os.nice(5)  # answers go first
    try:
        import resource
    except ImportError:  # Windows
        return
    for name, bound in {"RLIMIT_CPU": limits.seconds, "RLIMIT_FSIZE": 0}.items():
        with contextlib.suppress(AttributeError, OSError, ValueError):
            resource.setrlimit(getattr(resource, name), (bound, bound))
    bound_memory(limits.memory)


# ---- in the server -----------------------------------------------------------------------------------------


class Reducer:
    """Starts the processes, as many at once as the limits say.

    side  of the square that the model sees, in pixels
    """

    def __init__(self, side: int):
        self.side = side
        # A small process that has loaded the decoders is copied for every image, in 10 ms instead of 500.
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self.context = multiprocessing.get_context(method)
        if method == "forkserver":
            self.context.set_forkserver_preload([__name__, *(f"PIL.{name}" for name in PIL._plugins)])
        self.threads = ThreadPoolExecutor(QUICK.at_once + SLOW.at_once, "images")
        self.turns = {limits: asyncio.Semaphore(limits.at_once) for limits in (QUICK, SLOW)}
        self.num_slow = 0
        self.lock, self.running, self.closed = threading.Lock(), set(), False

    async def reduce(self, file: IO[bytes]) -> Reduced:
        """Raises ValueError with a reason that a visitor can understand."""
        async with self.turns[QUICK]:
            reduced = await self.run(file, QUICK)
        if reduced is not None:
            return reduced
        if self.num_slow >= MOST_WAITING:
            raise ValueError(BUSY)
        self.num_slow += 1
        try:
            async with self.turns[SLOW]:
                return await self.run(file, SLOW)
        finally:
            self.num_slow -= 1

    async def run(self, file: IO[bytes], limits: Limits) -> Reduced | None:
        def work() -> Reduced | None:
            file.seek(0)
            return self.reduce_now(file.read(), limits)

        return await asyncio.get_running_loop().run_in_executor(self.threads, work)

    def reduce_now(self, data: bytes, limits: Limits = SLOW) -> Reduced | None:
        """None: not to be had within QUICK. Raises ValueError."""
        receiver, sender = self.context.Pipe(duplex=False)
        process = self.context.Process(
            target=answer_with, args=(sender, data, self.side, limits), daemon=True
        )
        try:
            with self.lock:
                if self.closed:
                    raise ValueError(BUSY)
                process.start()
                self.running.add(process)
            sender.close()  # so that its end is seen here
            answer = receiver.recv_bytes() if receiver.poll(START + PATIENCE * limits.seconds) else b""
        except (EOFError, OSError):
            answer = b""  # ended by a limit
        finally:
            receiver.close()
            self.end(process)
        kind, content = answer[:1], answer[1:]
        size = 3 * self.side**2
        if kind == READ and len(content) > size:
            return Reduced(content[:size], content[size:])
        if kind == REFUSED:
            raise ValueError(content.decode(errors="replace"))
        if limits == QUICK:
            return None
        raise ValueError(TOO_SLOW)

    def end(self, process) -> None:
        with self.lock:
            self.running.discard(process)
        if process.pid is not None:
            process.kill()
            process.join()
            process.close()

    def close(self) -> None:
        with self.lock:
            self.closed = True
            for process in self.running:
                process.kill()
        self.threads.shutdown(wait=False, cancel_futures=True)
