"""A stand-in for the Hugging Face hub, on loopback: as much of its HTTP as huggingface_hub speaks."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = 10_000  # bytes; from here on a file lies in large-file storage, behind a redirect to another host
PAGE = b"<!DOCTYPE html><html><body>Please log in to this network</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


class Hub(ThreadingHTTPServer):
    """Files by (repository, revision), and how to be at fault.

    requests      (method, path, Range) of all that was asked, redirects not counted
    instead       name -> bytes that are sent, whatever the headers promise
    cuts          name -> after how many bytes the connection ends, one entry for each answer
    stalls        name -> after how many bytes nothing more comes
    pages         answer everything with a web page, as a network does that wants a login first
    status        answer everything with this error
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.instead: dict[str, bytes] = {}
        self.cuts: dict[str, list[int]] = {}
        self.stalls: dict[str, int] = {}
        self.stalled, self.closing = threading.Event(), threading.Event()
        self.pages, self.ignores_ranges, self.commit, self.status = False, False, "", 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def sent(self, name: str) -> list[str]:
        """The Range of each request for a file's content."""
        return [part for method, path, part in self.requests if method == "GET" and path.endswith("/" + name)]

    def handle_error(self, request, client_address) -> None:
        """Clients that go away are part of the tests."""


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        hub.shutdown()
        thread.join()
        hub.server_close()


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        hub = self.server
        if not path.startswith("/storage/"):
            hub.requests.append((self.command, path, self.headers.get("Range", "")))
        if hub.pages or hub.status:
            self.send(hub.status or 200, PAGE, {"Content-Type": "text/html"})
        elif path.startswith("/api/"):
            self.list_tree(*path.removeprefix("/api/").partition("/tree/")[::2])
        elif path.startswith("/storage/"):
            self.send_content(path.split("/", 3)[3], self.find(path.split("/", 3)[2]), {})
        else:
            self.resolve(*path.strip("/").partition("/resolve/")[::2])

    def resolve(self, repository: str, rest: str) -> None:
        """A small file itself, a large one by a redirect, with what the library wants to know of it."""
        revision, _, name = rest.partition("/")
        files = self.server.files.get((repository.removeprefix("datasets/"), revision), {})
        if name not in files:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound" if files else "RevisionNotFound"})
            return
        content = files[name]
        headers = {"X-Repo-Commit": self.server.commit or (revision if len(revision) == 40 else "c" * 40)}
        if len(content) < LARGE:
            self.send_content(name, content, headers | {"ETag": f'"{git_sha1(content)}"'})
            return
        headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{sha256(content)}"'}
        headers["Location"] = f"http://localhost:{self.server.server_port}/storage/{sha256(content)}/{name}"
        self.send(302, b"", headers)

    def find(self, digest: str) -> bytes:
        every = (content for files in self.server.files.values() for content in files.values())
        return next(content for content in every if sha256(content) == digest)

    def list_tree(self, repository: str, rest: str) -> None:
        revision, _, folder = rest.partition("/")
        files = self.server.files.get((repository.partition("/")[2], revision))
        if files is None:
            self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
            return
        entries = [{"type": "directory", "oid": "d" * 40, "size": 0, "path": "folder"}]
        for name, content in files.items():
            if not folder or name.startswith(folder + "/"):
                entry = {"type": "file", "path": name, "size": len(content), "oid": git_sha1(content)}
                if len(content) >= LARGE:
                    entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
                entries.append(entry)
        self.send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})

    def send_content(self, name: str, content: bytes, headers: dict[str, str]) -> None:
        hub, status = self.server, 200
        if self.command == "GET":
            content = hub.instead.get(name, content)
        part = self.headers.get("Range", "")
        if part and not hub.ignores_ranges:
            start = int(part.removeprefix("bytes=").partition("-")[0])
            headers = headers | {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            status, content = 206, content[start:]
        end = hub.stalls.get(name, len(content))
        if self.command == "GET" and hub.cuts.get(name):
            end = hub.cuts[name].pop(0)
        self.send(status, content, headers, end)
        if end < len(content) and name in hub.stalls:
            hub.stalled.set()
            hub.closing.wait()

    def send(self, status: int, content: bytes, headers: dict[str, str], end: int | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:end])
            self.wfile.flush()
        if end is not None and end < len(content):
            self.close_connection = True


# ---- its table ---------------------------------------------------------------------------------------------


def write_table(path: Path, hub: Hub, downloads: dict[str, dict], commit: str = "a" * 40) -> Path:
    """A table of downloads as model/downloads.toml: name -> {"place", "files": {name: content}}, and what
    else is said of a file, in "more": {name: {...}}. The hub gets the files, with true checksums."""
    lines = [
        "[repositories.all]",
        'id = "someone/all"',
        'kind = "dataset"',
        f'revision = "{commit}"',
        'licence = "none"',
    ]
    store = hub.files.setdefault(("someone/all", commit), {})
    for name, download in downloads.items():
        lines += [f"[downloads.{name}]", f'what = "{name}"', 'from = "all"']
        lines += [f'place = "{download["place"]}"'] if "place" in download else []
        for file, content in download["files"].items():
            store[file] = content
            facts = {"name": file, "size": len(content), "sha256": sha256(content)}
            facts |= download.get("more", {}).get(file, {})
            lines += [f"[[downloads.{name}.files]]"]
            lines += [f"{key} = {json.dumps(value)}" for key, value in facts.items() if value is not None]
    path.write_text("\n".join(lines))
    return path
