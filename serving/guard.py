"""What stands between visitors and Gradio: of its many routes the page's own are open, to the page alone.

Everything is refused before Gradio sees it that has another route, another name of this computer, another
site's page behind it, a body that is too large, or fields that the page never sends. Images are taken and
given out here: Gradio handles no file of a visitor.
"""

import asyncio
import base64
import contextlib
import ctypes
import json
import re
import secrets
import sys
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from typing import NamedTuple
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, PlainTextResponse, Response

from serving.api import Api
from serving.bodies import Refused, read_body
from serving.hosts import Hosts
from serving.messages import clean_cancel, clean_event
from serving.site import Site
from serving.uploads import Uploads
from serving.visitors import answers_to

SESSION = r"[A-Za-z0-9_-]{1,64}"
PART = r"[\w@+-][\w.@+-]*"  # of a path: never a dot first
ROUTES = {  # (method, pattern of the path): who answers
    ("GET", r"/"): "page",
    ("HEAD", r"/"): "page",
    ("GET", rf"/(assets|static)(/{PART})+"): "page",
    ("GET", r"/theme\.css|/favicon\.ico|/config|/gradio_api/info"): "page",
    ("GET", rf"/gradio_api/heartbeat/(?P<session>{SESSION})"): "stream",
    ("GET", r"/gradio_api/queue/data"): "stream",
    ("POST", r"/gradio_api/queue/join"): "event",
    ("POST", r"/gradio_api/run/predict"): "event",
    ("POST", r"/gradio_api/cancel"): "cancel",
    ("POST", r"/gradio_api/reset"): "reset",
    ("POST", r"/gradio_api/upload"): "upload",
    ("GET", r"/gradio_api/file=(?P<name>/.*)"): "image",
    ("POST", r"/v1/chat/completions"): "api",
    ("GET", r"/v1/models(/[^/]+)?|/health"): "api",
}
PATTERNS = {(method, re.compile(pattern, re.ASCII)): kind for (method, pattern), kind in ROUTES.items()}
# What Gradio is told of a request. Others would choose the address that the page gives for itself, or more.
HEADERS = {
    *("host", "accept", "accept-encoding", "accept-language", "user-agent", "x-forwarded-host"),
    *("content-type", "content-length", "if-none-match", "if-modified-since", "x-forwarded-proto"),
}
ADDED = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "frame-ancestors 'self'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
}
MOST_JSON = 256 << 10  # bytes
NO_IMAGE = """<svg xmlns="http://www.w3.org/2000/svg" width="96" height="96" stroke="#999" fill="none">
<rect x="8" y="8" width="80" height="80" rx="8"/><path d="M32 32l32 32M64 32l-32 32"/></svg>"""


class Caller(NamedTuple):
    """Who sends a request, as far as that is known."""

    visitor: str  # the key in the browser's cookie, or ""
    session: str  # of the page, or ""


def find_route(method: str, path: str) -> tuple[str, re.Match] | None:
    """Who answers, and the match of the path; None: nobody."""
    for (wanted, pattern), kind in PATTERNS.items():
        if method == wanted and (match := pattern.fullmatch(path)):
            return kind, match
    return None


class Guard:
    """An ASGI application around Gradio's.

    quick, events  of the page's events that are answered at once, and of all: their numbers, and how many
                   values each has
    forget         told the keys of visitors who have left
    account        USER:PASSWORD, without which nothing is answered ("" = everybody may ask)
    """

    def __init__(
        self,
        app: Callable,
        hosts: Hosts,
        site: Site,
        quick: dict[int, int],
        events: dict[int, int],
        forget: Callable[[str], None],
        account: str = "",
    ):
        self.app, self.hosts, self.quick, self.events, self.forget = app, hosts, quick, events, forget
        self.images, self.visitors, self.uploads = site.images, site.visitors, Uploads(site)
        self.api, self.account = Api(site, ADDED), account
        self.cookie = f"visitor_{hosts.port}"  # cookies know no ports

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            sweeping = asyncio.create_task(self.sweep())
            try:
                await self.app(scope, receive, send)
            finally:
                sweeping.cancel()
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        try:
            await self.answer(scope, receive, send)
        except Exception as error:
            if not isinstance(error, Refused):  # the visitor learns that it failed, whoever serves why
                print(f"error: {scope['method']} {scope['path']!r}: {error!r}", file=sys.stderr, flush=True)
                raise
            refused = error
            if scope["path"].startswith("/v1/"):
                response = self.api.refuse(refused)
            else:
                response = PlainTextResponse(refused.line + "\n", refused.status, ADDED)
            if refused.status == 401:
                response.headers["WWW-Authenticate"] = 'Basic realm="MiniMind-V", charset="UTF-8"'
            if scope["method"] == "POST":
                response.headers["Connection"] = "close"  # the rest of its body is not waited for
            await response(scope, receive, send)

    async def answer(self, scope, receive, send) -> None:
        headers = Headers(scope=scope)
        self.check_names(scope, headers)
        await self.check_account(headers)
        route = find_route(scope["method"], scope["path"])
        if route is None:
            raise Refused(404, "There is nothing here.")
        check_site(scope, headers)
        kind, match = route
        query = {
            name: values[0] for name, values in parse_qs(scope["query_string"].decode("latin-1")).items()
        }
        session = match.groupdict().get("session") or query.get("session_hash", "")
        if not re.fullmatch(SESSION, session, re.ASCII):
            session = ""
        caller = Caller(self.find_visitor(headers), session)
        self.visitors.see(*caller)
        await getattr(self, f"answer_{kind}")(scope, receive, send, match, caller)

    # ---- who may ask ---------------------------------------------------------------------------------------

    def check_names(self, scope, headers: Headers) -> None:
        """Is it this page that is called, and does it call itself?"""
        address = (scope.get("server") or ("", 0))[0]
        hosts = headers.getlist("host")
        forwarded = headers.get("x-forwarded-host", hosts[0] if hosts else "").split(",")[0].strip()
        for host in (*hosts, forwarded):
            if not self.hosts.knows(host, address):
                shown = re.sub(r"[^\w.:\[\]-]", "?", host, flags=re.ASCII)[:100]
                raise Refused(421, f"This page does not answer as {shown!r}: see --allow_host.")
        if len(hosts) != 1:
            raise Refused(421, "A request names one host.")
        origins = headers.getlist("origin")
        if not all(self.hosts.knows_origin(origin, address) for origin in origins):
            raise Refused(403, "Pages of other sites may not use this one: see --allow_host.")

    async def check_account(self, headers: Headers) -> None:
        """Browsers send it as Basic; programs as the key of the API, USER:PASSWORD."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "basic":
            with contextlib.suppress(ValueError):
                given = base64.b64decode(given).decode()
        if self.account and not secrets.compare_digest(given.encode(), self.account.encode()):
            if given:
                await asyncio.sleep(1)  # for a guess
            raise Refused(401, "This page asks for a name and a password.")

    def find_visitor(self, headers: Headers) -> str:
        with contextlib.suppress(CookieError):
            cookie = SimpleCookie(headers.get("cookie", "")[:4096]).get(self.cookie)
            if cookie and re.fullmatch(r"[0-9a-f]{32}", cookie.value):
                return cookie.value
        return ""

    # ---- answers -------------------------------------------------------------------------------------------

    async def answer_page(self, scope, receive, send, match, caller: Caller, query: bytes = b"") -> None:
        """Gradio's answer, to as much of the request as it needs."""
        headers = [(name, value) for name, value in scope["headers"] if name.decode("latin-1") in HEADERS]
        scope = scope | {"headers": headers, "query_string": query, "root_path": ""}

        async def send_on(message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                for name in [name for name in answer if name.startswith("access-control-")]:
                    del answer[name]
                answer.update(ADDED)
                if scope["path"] == "/" and not caller.visitor:
                    mark = f"{self.cookie}={secrets.token_hex(16)}; Path=/; HttpOnly; SameSite=Lax"
                    answer.append("set-cookie", mark)
            await send(message)

        await self.app(scope, receive, send_on)

    async def answer_stream(self, scope, receive, send, match, caller: Caller) -> None:
        if not caller.session:
            raise Refused(400, "A session is missing.")
        keys, query = [*caller], b""
        if scope["path"].endswith("/data"):
            keys.append(answers_to(caller.session))
            query = f"session_hash={caller.session}".encode()
        with self.visitors.connected(*keys):
            await self.answer_page(scope, receive, send, match, caller, query)

    async def answer_event(self, scope, receive, send, match, caller: Caller) -> None:
        allowed = self.quick if scope["path"].endswith("/predict") else self.events
        await self.pass_json(
            scope, receive, send, caller, lambda body: clean_event(body, allowed, self.images)
        )

    async def answer_cancel(self, scope, receive, send, match, caller: Caller) -> None:
        await self.pass_json(scope, receive, send, caller, clean_cancel)

    async def answer_reset(self, scope, receive, send, match, caller: Caller) -> None:
        """What a browser sends after "cancel"; Gradio does nothing then."""
        async for _ in read_body(scope, receive, MOST_JSON):
            pass
        await JSONResponse({"success": True}, headers=ADDED)(scope, receive, send)

    async def pass_json(self, scope, receive, send, caller: Caller, clean: Callable[[bytes], dict]) -> None:
        """Hand on a body, rebuilt from the fields that are expected in it."""
        body = b"".join([piece async for piece in read_body(scope, receive, MOST_JSON)])
        try:
            fields = clean(body)
        except ValueError as error:
            raise Refused(400, str(error)) from None
        self.visitors.see(fields["session_hash"])
        content = json.dumps(fields).encode()
        headers = [(name, value) for name, value in scope["headers"] if not name.startswith(b"content-")]
        headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
        given = [{"type": "http.request", "body": content, "more_body": False}]

        async def receive_again():
            return given.pop() if given else await receive()

        await self.answer_page(scope | {"headers": headers}, receive_again, send, None, caller)

    async def answer_image(self, scope, receive, send, match, caller: Caller) -> None:
        name, kept = match["name"], self.images.get(match["name"])
        if kept is None and name != self.images.gone:
            raise Refused(404, "There is no such image here.")
        headers = ADDED | {"Cache-Control": "private, no-store", "Content-Security-Policy": "sandbox"}
        if kept and kept.reduced:
            response = Response(kept.reduced.shown, media_type="image/jpeg", headers=headers)
        else:
            response = Response(NO_IMAGE, media_type="image/svg+xml", headers=headers)
        await response(scope, receive, send)

    async def answer_api(self, scope, receive, send, match, caller: Caller) -> None:
        await self.api.answer(scope, receive, send)

    async def answer_upload(self, scope, receive, send, match, caller: Caller) -> None:
        """Take images in, each reduced at once to what the model sees and the page shows."""
        names = await self.uploads.take(scope, receive, caller.visitor)
        await JSONResponse(names, headers=ADDED)(scope, receive, send)

    async def sweep(self) -> None:
        """From time to time: what belongs to visitors who have left goes."""
        while True:
            await asyncio.sleep(5)
            gone = self.visitors.pop_gone()
            for key in gone:
                self.forget(key)
            self.images.drop_gone(self.visitors.is_here)
            if gone:
                return_memory()


def check_site(scope, headers: Headers) -> None:
    """Browsers say whether another site's page sends a request. A link may lead here, no more."""
    if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
        return
    is_link = scope["path"] == "/" and scope["method"] == "GET"
    if (is_link, headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) != (
        True,
        "navigate",
        "document",
    ):
        raise Refused(403, "Pages of other sites may not use this one.")


def return_memory() -> None:
    """What was freed goes back to the system; by itself, glibc keeps most of it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
