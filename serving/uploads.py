"""Image files that visitors send: taken in, reduced, forgotten. What is kept of them: visitors.Images."""

import asyncio
import contextlib
import secrets
from typing import IO

from starlette.requests import Request

from serving.bodies import SECONDS, Refused, read_body
from serving.decoding import Reduced
from serving.site import Site
from serving.visitors import Full

MOST_FILES = 16
MOST_UPLOAD = 64 << 20  # of one request, which may hold several files; at least the largest one
FORM = 64 << 10  # bytes of a form around its files
# While they come in they lie on the disk, as files without a name. Requests beyond so many wait.
MOST_AT_ONCE, MOST_PENDING = 64, 512 << 20


class Uploads:
    def __init__(self, site: Site):
        self.site, self.turns, self.pending = site, asyncio.Semaphore(MOST_AT_ONCE), 0

    async def take(self, scope, receive, visitor: str) -> list[str]:
        """The names of the images in a form, each reduced at once to what the model sees and the page shows.
        Raises Refused."""
        size, pieces = 0, read_body(scope, receive, max(MOST_UPLOAD, self.site.most_file + FORM))

        async def receive_counted() -> dict:
            nonlocal size
            piece = await anext(pieces, None)
            size += len(piece or b"")
            self.pending += len(piece or b"")
            if self.pending > MOST_PENDING:
                raise Refused(503, "Many images are coming in: try again in a minute.")
            return {"type": "http.request", "body": piece or b"", "more_body": piece is not None}

        request = Request(scope, receive_counted)
        if "multipart/form-data" not in request.headers.get("content-type", ""):
            raise Refused(400, "Images come as multipart/form-data.")
        async with self.turns:
            try:
                async with request.form(
                    max_files=MOST_FILES, max_fields=MOST_FILES, max_part_size=4096
                ) as form:
                    files = [value.file for _, value in form.multi_items() if not isinstance(value, str)]
                    return [await self.keep(file, visitor or secrets.token_hex(16)) for file in files]
            except Refused:
                raise
            except Exception as error:  # what a damaged body does to its parser
                raise Refused(400, "The form is damaged.") from error
            finally:
                self.pending -= size

    async def keep(self, file: IO[bytes], owner: str) -> str:
        """The name of an image, whatever is in its file: what is wrong with it is said when it is asked
        about."""
        reduced, problem = None, ""
        if file.seek(0, 2) > self.site.most_file:
            problem = f"it is larger than {self.site.most_file >> 20} MB"
        else:
            try:
                reduced = await self.site.reducer.reduce(file)
            except ValueError as error:
                problem = str(error)
        self.site.visitors.see(owner)
        return self.add(owner, reduced, problem)

    def add(self, owner: str, reduced: Reduced | None, problem: str) -> str:
        images, visitors = self.site.images, self.site.visitors
        with contextlib.suppress(Full):
            return images.add(owner, reduced, problem)
        images.drop_gone(lambda key: visitors.is_here(key, SECONDS))  # who may only have lost a connection
        try:
            return images.add(owner, reduced, problem)
        except Full:
            raise Refused(503, "There is no room for another image: try again in a minute.") from None
