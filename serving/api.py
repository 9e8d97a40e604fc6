"""The chat for programs, over HTTP as OpenAI's API: the same questions, the same answers as on the page.

    POST /v1/chat/completions   images as data: URIs; streaming by server-sent events
    GET  /v1/models             the one that answers
    GET  /health                that it does

The guard has looked at the request before: who asks by another name, or from another site's page, is refused.
"""

import asyncio
import contextlib
import io
import json
import secrets
import sys
import time
from collections.abc import AsyncIterator

from starlette.responses import JSONResponse

from serving.answer import Answer, LineFull
from serving.bodies import Refused, read_body
from serving.completions import BadRequest, Reply, Request, decode_data, error_object, read_request
from serving.site import Site

MOST_BODY = 48 << 20  # bytes: one of the largest images, or several photographs, in base64
MOST_PENDING = 256 << 20  # bytes of all bodies that are being read
AT_ONCE = 2  # bodies that are parsed
BUSY = "many people are asking: try again in a minute"
CONTEXT = "context_length_exceeded"


class Api:
    """headers: for every answer."""

    def __init__(self, site: Site, headers: dict[str, str]):
        self.site, self.chat, self.headers = site, site.engine.chat, headers
        self.model, self.started = site.defaults.model, int(time.time())
        self.pending, self.parsing = 0, asyncio.Semaphore(AT_ONCE)

    async def answer(self, scope, receive, send) -> None:
        """Raises Refused."""
        try:
            if scope["path"] == "/v1/chat/completions":
                await self.complete(scope, receive, send)
            else:
                await JSONResponse(self.describe(scope["path"]), headers=self.headers)(scope, receive, send)
        except (Refused, asyncio.CancelledError):
            raise
        except Exception as error:  # the program learns that it failed, whoever serves why
            print(f"error: {scope['path']}: {error!r}", file=sys.stderr, flush=True)
            raise Refused(500, "the model failed at this question") from error

    def refuse(self, error: Refused) -> JSONResponse:
        again = {"Retry-After": "5"} if error.status == 503 else {}
        return JSONResponse(error_object(error), error.status, self.headers | again)

    def describe(self, path: str) -> dict:
        model = {"id": self.model, "object": "model", "created": self.started, "owned_by": "minimind-v"}
        about = {"description": self.chat.knows, "example_questions": self.chat.questions}
        if path == "/health":
            return {"status": "ok", "model": self.model, "under_way": self.site.engine.num_under_way}
        if path == "/v1/models":
            return {"object": "list", "data": [model | about]}
        if path == f"/v1/models/{self.model}":
            return model | about
        raise BadRequest(f"there is no such model here, only {self.model!r}", "model", "model_not_found", 404)

    async def complete(self, scope, receive, send) -> None:
        defaults = self.site.defaults
        fields = await self.read_json(scope, receive)
        request = read_request(fields, self.chat, self.model, defaults.sampling)
        del fields  # the images in it may be large
        answer = await self.submit(request)
        reply = Reply(answer, self.model, secrets.token_hex(12))
        leaving = asyncio.create_task(stop_with(receive, answer))
        try:
            if request.streams:
                await self.stream(answer, reply, request.with_usage, send)
                return
            async for _ in answer.events():
                pass
            await JSONResponse(reply.whole(), headers=self.headers)(scope, receive, send)
        finally:
            leaving.cancel()
            answer.stop()

    async def read_json(self, scope, receive) -> object:
        size, pieces = 0, []
        try:
            async for piece in read_body(scope, receive, MOST_BODY):
                size += len(piece)
                self.pending += len(piece)
                if self.pending > MOST_PENDING:
                    raise Refused(503, BUSY)
                pieces.append(piece)
            async with self.parsing:
                return await asyncio.to_thread(json.loads, b"".join(pieces))
        except (ValueError, RecursionError):
            raise BadRequest("the body is not JSON") from None
        finally:
            self.pending -= size

    async def submit(self, request: Request) -> Answer:
        """Only the images that the model is to see are decoded, in a process of their own each."""
        sampling, chat = request.sampling, self.chat
        max_rounds = self.site.defaults.max_rounds
        try:
            turns, urls = await asyncio.to_thread(
                chat.recall, request.rounds, sampling.max_new_tokens, max_rounds, request.system
            )
            if len(urls) > chat.most_images:
                raise ValueError(f"this model's context holds at most {chat.most_images} images")
            images = [await self.decode(number, url) for number, url in enumerate(urls, 1)]
            return self.site.engine.submit(turns, images, sampling, request.stop)
        except LineFull:
            raise Refused(503, BUSY) from None
        except ValueError as error:
            raise BadRequest(str(error), "messages", CONTEXT) from None

    async def decode(self, number: int, url: str):
        try:
            data = await asyncio.to_thread(decode_data, url)
            return (await self.site.reducer.reduce(io.BytesIO(data))).image
        except ValueError as error:
            raise BadRequest(f"image {number}: {error}", "messages", "invalid_image") from None

    async def stream(self, answer: Answer, reply: Reply, with_usage: bool, send) -> None:
        headers = self.headers | {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        async with contextlib.aclosing(events_of(answer, reply, with_usage)) as events:
            async for text in events:
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def events_of(answer: Answer, reply: Reply, with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events; while others are in front, comments, which clients pass over."""
    yield as_event(reply.chunk({"role": "assistant", "content": ""}))
    try:
        async with contextlib.aclosing(answer.events()) as events:
            async for event in events:
                is_place = isinstance(event, int)
                yield (
                    f": number {event} in line\n\n" if is_place else as_event(reply.chunk({"content": event}))
                )
        for chunk in reply.last_chunks(with_usage):
            yield as_event(chunk)
    except Exception as error:  # too late for a status
        print(f"error: {error!r}", file=sys.stderr, flush=True)
        yield as_event(error_object(Refused(500, "the model failed at this question")))
    yield "data: [DONE]\n\n"


def as_event(content: dict) -> str:
    return f"data: {json.dumps(content)}\n\n"  # in ASCII: some clients end a line at U+2028 too


async def stop_with(receive, answer: Answer) -> None:
    """Whoever hangs up frees the model."""
    while (await receive())["type"] != "http.disconnect":
        pass
    answer.stop()
