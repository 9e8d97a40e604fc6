"""The bodies of requests, bounded in size and in time."""

import asyncio
import time
from collections.abc import AsyncIterator

SECONDS = 15  # for a pause in a body
SLOWEST = 20 << 10  # bytes a second, after the first SECONDS


class Refused(Exception):
    def __init__(self, status: int, line: str):
        super().__init__(line)
        self.status, self.line = status, line


async def read_body(scope, receive, most: int) -> AsyncIterator[bytes]:
    """The pieces of a body of at most so many bytes, that comes without long pauses. Raises Refused."""
    size, start = 0, time.monotonic()
    length = dict(scope["headers"]).get(b"content-length", b"")
    if length.isdigit() and (len(length) > 15 or int(length) > most):
        raise Refused(413, f"At most {most:,} bytes are taken.")
    more = True
    while more:
        try:
            message = await asyncio.wait_for(receive(), SECONDS)
        except TimeoutError:
            raise Refused(408, "The request did not come to its end.") from None
        if message["type"] == "http.disconnect":
            raise Refused(400, "The request did not come to its end.")
        piece, more = message.get("body", b""), message.get("more_body", False)
        size += len(piece)
        if size > most:
            raise Refused(413, f"At most {most:,} bytes are taken.")
        if more and time.monotonic() - start > SECONDS + size / SLOWEST:
            raise Refused(408, "The request comes too slowly.")
        yield piece
