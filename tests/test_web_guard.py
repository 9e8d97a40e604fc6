"""What stands in front of Gradio, piece by piece: routes, names, fields, images.
test_web_hostile.py attacks the page as a whole.

Gradio brought some 80 routes; the page uses 15. One of the others, /gradio_api/process_recording, ran
ffmpeg on what any site's visitor sent: a playlist that named a local file brought back that video.
"""

import asyncio
import io
import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from benchmarks.machine import family_of
from model.images import open_image
from model.vision_utils import ImageProcessor, get_img_process
from serving import decoding, guard, visitors
from serving.bodies import Refused, read_body
from serving.decoding import Limits, Reduced, Reducer
from serving.hosts import Hosts
from serving.messages import clean_event
from serving.visitors import Images, Visitors

# Routes of Gradio that are not for visitors. A new one belongs here, or into ROUTES of serving/guard.py.
REFUSED = """
GET HEAD /openapi.json
GET /config/ /logout /manifest.json /monitoring /monitoring/summary /monitoring/{key} /pwa_icon
GET /pwa_icon/{size} /robots.txt /svelte/{path:path} /gradio_api/app_id /gradio_api/app_id/
GET /gradio_api/theme.css
GET /gradio_api/call/v2/{api_name}/{event_id} /gradio_api/call/{api_name}/{event_id}
GET /gradio_api/custom_component/{id}/{environment}/{type}/{file_name} /gradio_api/deep_link
GET /gradio_api/dev/reload /gradio_api/file/{path:path} /gradio_api/info/
GET /gradio_api/login_check /gradio_api/login_check/ /gradio_api/openapi.json /gradio_api/queue/status
GET /gradio_api/run-history/buckets /gradio_api/run-history/records
GET /gradio_api/run-history/records/{endpoint}/{record_id}/assets/{asset_id}
GET /gradio_api/runs /gradio_api/runs/ /gradio_api/startup-events
GET /gradio_api/stream/{session_hash}/{run}/{component_id}/playlist-file
GET /gradio_api/stream/{session_hash}/{run}/{component_id}/playlist.m3u8
GET /gradio_api/stream/{session_hash}/{run}/{component_id}/{segment_id}.{ext}
GET /gradio_api/token /gradio_api/token/ /gradio_api/upload_progress /gradio_api/user /gradio_api/user/
GET /gradio_api/vibe-code /gradio_api/vibe-code/
GET HEAD /gradio_api/proxy={url_path:path}
HEAD /gradio_api/file={path_or_url:path}
POST /gradio_api/api/{api_name} /gradio_api/api/{api_name}/ /gradio_api/call/v2/{api_name}
POST /gradio_api/call/v2/{api_name}/ /gradio_api/call/{api_name} /gradio_api/call/{api_name}/
POST /gradio_api/component_server /gradio_api/component_server/ /gradio_api/process_recording
POST /gradio_api/reset/ /gradio_api/run-history/connect
POST /gradio_api/run/{api_name}/ /gradio_api/stream/{event_id} /gradio_api/stream/{event_id}/close
POST /gradio_api/undo-vibe-edit /gradio_api/undo-vibe-edit/ /gradio_api/vibe-code /gradio_api/vibe-code/
POST /gradio_api/vibe-edit /gradio_api/vibe-edit/ /gradio_api/vibe-starter-queries
POST /gradio_api/vibe-starter-queries/ /login /login/
"""
ALLOWED = {  # of Gradio's routes; a body or a file is looked through first
    *("GET /", "HEAD /", "GET /assets/{path:path}", "GET /static/{path:path}", "GET /theme.css"),
    *("GET /favicon.ico", "GET /config", "GET /gradio_api/info", "GET /gradio_api/queue/data"),
    *("GET /gradio_api/heartbeat/{session_hash}", "GET /gradio_api/file={path_or_url:path}"),
    *("POST /gradio_api/queue/join", "POST /gradio_api/run/{api_name}", "POST /gradio_api/cancel"),
    *("POST /gradio_api/reset", "POST /gradio_api/upload"),
}


def refused_routes() -> set[str]:
    found = set()
    for row in REFUSED.strip().splitlines():
        words = row.split()
        methods = [word for word in words if word.isupper()]
        found |= {f"{method} {path}" for method in methods for path in words[len(methods) :]}
    return found


def routes_of(routes) -> set[str]:
    """All routes of an application, of the parts that are included or mounted in it too."""
    found = set()
    for route in routes:
        inner = getattr(route, "original_router", None) or getattr(route, "app", None)
        if hasattr(inner, "routes"):
            found |= routes_of(inner.routes)
        else:
            found |= {f"{method} {route.path}" for method in route.methods}
    return found


def test_every_route_of_gradio_is_known_and_only_the_pages_own_are_open():
    gr = pytest.importorskip("gradio")
    with gr.Blocks() as page:
        gr.Textbox()
    installed = routes_of(gr.routes.App.create_app(page).routes)
    assert len(installed) > 70
    new = installed - refused_routes() - ALLOWED
    assert not new, f"Gradio has new routes. Does the page need them? {sorted(new)}"
    for route in sorted(installed | refused_routes()):
        method, path = route.split(" ", 1)
        for value in ("x", "predict", "answer", "a/b.js"):
            example = re.sub(r"\{(path_or_url|url_path):path\}", f"/{value}", path)
            example = re.sub(r"\{[^}]*\}", value, example)
            is_open = guard.find_route(method, example) is not None
            assert not is_open or route in ALLOWED, f"{method} {example} is open"


def test_paths_that_climb_are_no_routes():
    for path in (
        *(
            "/assets/../config",
            "/assets/%2e%2e/x",
            "/assets/a/../../x",
            "/static//etc/passwd",
            "/assets/.env",
        ),
        *(
            "/assets/a\\..\\b",
            "/assets/a\0.js",
            "/gradio_api/file=x",
            "/gradio_api/run/answer",
            "//",
            "/config\n",
        ),
        *(
            "/gradio_api/heartbeat/a/b",
            "/gradio_api/heartbeat/" + "a" * 65,
            "/gradio_api/upload/",
            "",
            "http://a/",
        ),
    ):
        for method in ("GET", "POST"):
            assert guard.find_route(method, path) is None, path
    assert guard.find_route("OPTIONS", "/") is None and guard.find_route("PUT", "/") is None


# ---- names -------------------------------------------------------------------------------------------------


def test_the_page_answers_to_its_own_names_alone():
    """A name of another site that points at this computer (DNS rebinding) was answered, with a header that
    let the other site's scripts read the answer."""
    here = Hosts("127.0.0.1", 7860, ["chat.example.org", "tunnel:9000", "[2001:db8::7]:80"])
    for host in (
        "127.0.0.1:7860",
        "localhost:7860",
        "LOCALHOST:7860",
        "[::1]:7860",
        "chat.example.org",
        "tunnel:9000",
    ):
        assert here.knows(host, "127.0.0.1"), host
    for host in ("[2001:db8::7]", "chat.example.org:8443"):
        assert here.knows(host, "127.0.0.1"), host
    for host in (
        *(
            "evil.com",
            "evil.com:7860",
            "127.0.0.1",
            "127.0.0.1:80",
            "localhost:7861",
            "localhost.evil.com:7860",
        ),
        *(
            "tunnel",
            "127.0.0.1:7860@evil.com",
            "127.0.0.1.evil.com:7860",
            "",
            ":7860",
            "0.0.0.0:7860",
            "a b:7860",
        ),
        *(
            "192.168.1.5:7860",
            "127.1:7860",
            "[::1",
            "localhost:7860/x",
            "localhost:99999",
            "localhost:７８６０",
        ),
    ):
        assert not here.knows(host, "192.168.1.5"), host
    assert here.knows_origin("http://localhost:7860", "127.0.0.1")
    assert here.knows_origin("https://chat.example.org", "127.0.0.1")
    for origin in (
        "null",
        "http://localhost:3000",
        "http://localhost",
        "https://evil.com",
        "file://localhost:7860",
        "",
    ):
        assert not here.knows_origin(origin, "127.0.0.1"), origin


def test_a_page_for_others_answers_to_the_address_that_they_reached():
    there = Hosts("0.0.0.0", 7860, [])
    assert there.is_open and not Hosts("::1", 7860, []).is_open
    assert there.knows("192.168.1.5:7860", "192.168.1.5") and there.knows(
        "192.168.1.5:7860", "::ffff:192.168.1.5"
    )
    assert there.knows("localhost:7860", "127.0.0.1")
    for host in ("192.168.1.6:7860", "evil.com:7860", "0.0.0.0:7860"):
        assert not there.knows(host, "192.168.1.5")
    assert Hosts("chat.lan", 7860, []).knows("chat.lan:7860", "192.168.1.5")


# ---- what a request may hold -------------------------------------------------------------------------------


def test_of_an_event_only_known_fields_and_images_of_the_store_go_on():
    """A forged conversation could name any file that Gradio may read, or an address that it would fetch."""
    images = Images("/folder")
    name = images.add("me", Reduced(b"1", b"2"))
    file = {"path": name, "url": "http://evil.com/x", "meta": {"_type": "gradio.FileData"}, "is_stream": True}
    forged = ["/etc/passwd", "http://evil.com/a.png", {"path": name}, None, 7, "/folder/../etc/passwd", ["x"]]
    files = [file, *({"path": path} for path in forged), "text", None]
    data = [{"text": "a", "files": files, "x": 1}, "text", 0.5, True, {"path": "/etc/passwd"}, [name], None]
    body = {
        "data": data,
        "fn_index": 1,
        "session_hash": "s",
        "batched": True,
        "event_data": {"index": 0, "value": 9},
    }
    clean = clean_event(json.dumps(body).encode(), {1: 7}, images)
    assert clean["data"][1:] == [None, 0.5, None, None, None, None]
    assert clean["event_data"] == {"index": 0, "value": None}
    assert set(clean) == {"data", "event_data", "fn_index", "session_hash", "trigger_id"}
    paths = [file["path"] for file in clean["data"][0]["files"]]
    assert paths == [name] + [images.gone] * len(forged)
    assert all(set(file) == {"path", "meta"} for file in clean["data"][0]["files"])


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b'{"fn_index": 1}',
        *(json.dumps(fields).encode() for fields in (
            {"data": [], "fn_index": 2, "session_hash": "s"},
            {"data": [], "fn_index": "1", "session_hash": "s"},
            {"data": [], "fn_index": 1, "session_hash": "../s"},
            {"data": [], "fn_index": 1, "session_hash": ""},
            {"data": {}, "fn_index": 1, "session_hash": "s"},
            {"data": [0], "fn_index": 1, "session_hash": "s"},
        )),
    ],
)  # fmt: skip
def test_what_the_page_never_sends_is_refused(body):
    with pytest.raises(ValueError):
        clean_event(body, {1: 0}, Images("/folder"))


def read_all(pieces: list[bytes], most: int, length: bytes | None = None) -> bytes:
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> dict:
        return messages.pop(0)

    async def read() -> bytes:
        headers = [(b"content-length", length)] if length else []
        return b"".join([piece async for piece in read_body({"headers": headers}, receive, most)])

    return asyncio.run(read())


def test_a_body_is_bounded_whatever_it_says_of_itself():
    assert read_all([b"ab", b"c"], 3) == b"abc"
    for pieces, length in (([b"ab", b"cd"], None), ([], b"4"), ([], b"9" * 5000), ([b"abcd"], b"1")):
        with pytest.raises(Refused) as refused:
            read_all(pieces, 3, length)
        assert refused.value.status == 413


# ---- visitors and their images -----------------------------------------------------------------------------


def test_images_go_when_their_visitor_has_left(monkeypatch):
    """Uploads lay on the disk for a day."""
    now = [0.0]
    here, images = Visitors(lambda: now[0]), Images("/folder")
    reduced = Reduced(b"1" * 100, b"2" * 50)
    with here.connected("cookie", "session"):
        sent = images.add("cookie", reduced)
        example = images.add("", reduced)
        now[0] = 10_000
        here.pop_gone(), images.drop_gone(here.is_here)
        assert images.get(sent), "the page is open"
        images.claim([sent, example, "/etc/passwd"], "session")
    now[0] += visitors.GRACE - 1
    assert not here.pop_gone()
    now[0] += 2
    assert set(here.pop_gone()) == {"cookie", "session"}
    images.drop_gone(here.is_here)
    assert not images.get(sent) and images.get(example) and images.size == 150
    assert not here.connections and not here.last_seen

    monkeypatch.setattr(visitors, "MOST_IMAGES", 2)
    names = [images.add("me", reduced) for _ in range(3)]
    assert [bool(images.get(name)) for name in names] == [False, True, True]
    monkeypatch.setattr(visitors, "MOST_BYTES", images.size + 100)
    with pytest.raises(visitors.Full):
        images.add("other", reduced)
    assert len(set(names)) == 3 and all(re.fullmatch(r"/folder/[0-9a-f]{32}\.jpg", name) for name in names)


# ---- decoding ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reducer():
    reducer = Reducer(64)
    yield reducer
    reducer.close()


def encode(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def test_the_model_sees_what_it_sees_in_a_terminal(reducer, tmp_path):
    rng = np.random.default_rng(0)
    for size in ((40, 48), (300, 900), (1000, 1)):
        image = Image.fromarray(rng.integers(0, 256, (*size, 4), dtype=np.uint8))
        (tmp_path / "a").write_bytes(encode(image))
        reduced = reducer.reduce_now((tmp_path / "a").read_bytes())
        seen = Image.frombytes("RGB", (64, 64), reduced.seen)
        processor = ImageProcessor(64)
        expected = get_img_process(open_image(tmp_path / "a"), processor)
        assert get_img_process(seen, processor).equal(expected)
        assert max(Image.open(io.BytesIO(reduced.shown)).size) == min(max(size), decoding.SHOWN_SIDE)


def test_what_is_no_image_is_refused_in_words(reducer):
    for content in (
        b"",
        b"%!PS-Adobe-3.0 EPSF-3.0\n{} loop",
        b"#EXTM3U\nfile:///etc/passwd",
        b"<svg/>",
        bytes(99),
    ):
        with pytest.raises(ValueError, match="none of the formats"):
            reducer.reduce_now(content)


def test_decoding_is_bounded_in_memory_and_time(reducer, monkeypatch):
    """An image just under Pillow's own limit took 2 to 6 GB and a minute, and nobody else was answered."""
    large = encode(Image.new("L", (5000, 5000)))
    assert reducer.reduce_now(large, decoding.QUICK) is None, "larger ones wait for their turn"
    small = Limits(pixels=1 << 40, memory=30 << 20, seconds=20, at_once=1)
    with pytest.raises(ValueError, match="memory"):
        reducer.reduce_now(large, small)
    assert reducer.reduce_now(large, decoding.SLOW)
    monkeypatch.setattr(decoding, "PATIENCE", 0.001)
    monkeypatch.setattr(decoding, "START", 0)
    with pytest.raises(ValueError, match="time"):
        reducer.reduce_now(large, decoding.SLOW)
    quick = encode(Image.new("L", (2000, 2000)))
    assert reducer.reduce_now(quick, decoding.QUICK) is None, "a slow one begins anew when its turn has come"
    assert not reducer.running


def test_many_at_once_are_all_read_and_no_process_stays(reducer):
    content = [encode(Image.new("RGB", (8, 8), (number, 0, 0))) for number in range(12)]
    before = len(family_of(os.getpid()))

    async def reduce_all() -> list[Reduced]:
        queue = Reducer.__new__(Reducer)
        queue.__dict__ |= reducer.__dict__ | {
            "turns": {limits: asyncio.Semaphore(limits.at_once) for limits in (decoding.QUICK, decoding.SLOW)}
        }
        return await asyncio.gather(*(queue.reduce(io.BytesIO(one)) for one in content))

    found = asyncio.run(reduce_all())
    assert [image.seen[0] for image in found] == list(range(12))
    assert len(family_of(os.getpid())) <= before
