"""The page on a port of this computer, until it is interrupted."""

import contextlib
import ctypes
import logging
import socket
import sys

import gradio as gr
import uvicorn
from fastapi import FastAPI

from serving.guard import Guard
from serving.hosts import Hosts
from serving.look import FONTS, ICON, read
from serving.site import Site

MOST_SESSIONS = 2000  # whose conversations are kept
MOST_CONNECTIONS = 4000
MOST_EVENTS = 1000  # under way at once: answers that wait in the line count


def serve(
    page: gr.Blocks, site: Site, host: str, port: int, allowed_hosts: list[str], account: str = ""
) -> None:
    """Serve the page until interrupted. Raises OSError where the address cannot be had.

    host           a name or an address, of IPv6 too
    port           0 = any free one
    allowed_hosts  other names that the page answers to
    account        USER:PASSWORD that everybody has to know ("" = nobody is asked)
    """
    sockets = listen(host, port)
    port = sockets[0].getsockname()[1]
    hosts = Hosts(host, port, allowed_hosts)
    app = guard_page(page, site, hosts, account)
    allow_many_files()
    share_heap()
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # damaged forms are visitors' business
    config = uvicorn.Config(
        app,
        log_level="critical",  # the guard reports
        proxy_headers=False,
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=1,  # open pages never end by themselves
    )
    try:
        Announcing(config, f"[{host}]" if ":" in host else host, port, hosts.is_open, bool(account)).run(
            sockets
        )
    finally:
        site.close()


def guard_page(page: gr.Blocks, site: Site, hosts: Hosts, account: str = "") -> Guard:
    """The page as an ASGI application that answers the page alone."""
    page.state_session_capacity = MOST_SESSIONS
    page.queue(max_size=None, default_concurrency_limit=None)
    page._queue.max_thread_count = MOST_EVENTS  # waiting takes no thread
    theme = gr.themes.Soft(
        primary_hue="indigo", neutral_hue="slate", font=FONTS, font_mono=["ui-monospace", "monospace"]
    )
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        page,
        "/",
        theme=theme,
        css=read("style.css"),
        js=read("page.js"),
        favicon_path=str(ICON),
        footer_links=[],
        max_file_size=site.most_file,
        show_error=False,
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        root_path="",
        server_name="",
    )
    page.has_launched = True  # else Gradio checks no path
    events = {number: len(event.inputs) for number, event in page.fns.items() if event.fn}
    quick = {
        number: events[number] for number, event in page.fns.items() if number in events and not event.queue
    }

    def forget(session: str) -> None:
        """What Gradio keeps of a session, for hours."""
        sessions, queue = page.state_holder, page._queue
        sessions.session_data.pop(session, None)
        sessions.time_last_used.pop(session, None)
        queue.pending_messages_per_session.pop(session, None)
        queue.pending_event_ids_session.pop(session, None)
        for block in page.blocks.values():
            getattr(block, "temp_files", set()).clear()

    return Guard(app, hosts, site, quick, events, forget, account)


class Announcing(uvicorn.Server):
    """Says where the page is, once it is there."""

    def __init__(self, config: uvicorn.Config, host: str, port: int, is_open: bool, asks: bool):
        super().__init__(config)
        self.host, self.port, self.is_open = host, port, is_open
        self.limits = "no encryption" if asks else "no password, no encryption"

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.is_open:
            print(
                f"warning: whoever can reach {self.host} can use this page; {self.limits}",
                file=sys.stderr,
                flush=True,
            )
        print(f"http://{self.host}:{self.port}  (Ctrl+C ends it)", flush=True)


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets on all addresses of a name. Raises OSError."""
    sockets = []
    try:
        for family, kind, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            if sockets and not port:
                address = (address[0], sockets[0].getsockname()[1], *address[2:])
            with contextlib.suppress(OSError):
                sockets.append(bind(family, kind, address))
    except (OSError, UnicodeError):
        pass
    if not sockets:
        raise OSError(f"cannot serve on {host}:{port}: is it taken? Try another --port")
    return sockets


def bind(family: int, kind: int, address: tuple) -> socket.socket:
    found = socket.socket(family, kind)
    try:
        if sys.platform != "win32":  # there it would share the port
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        found.bind(address)
    except OSError:
        found.close()
        raise
    return found


def allow_many_files() -> None:
    """Each connection is an open file to the system."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 2 * MOST_CONNECTIONS
        if soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))


def share_heap() -> None:
    """All threads allocate from two heaps: with one each, many visitors at once would leave many behind."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-8, 2)  # M_ARENA_MAX of glibc
