"""A running web_server.py, and visitors who send it plain HTTP, for the tests of the page."""

import contextlib
import html
import http.client
import json
import os
import re
import secrets
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from conftest import LONG, ROOT, SIZES, save_image

from model.checkpoint import save_weights
from model.LMConfig import LMConfig
from model.transformer import Transformer

SETTINGS = [0, 0, 1, 1, 40, 0]  # temperature and so on, in the order of the page


def make_folder(folder: Path, tokenizer, tokenizer_path: Path, clip_path: Path) -> Path:
    """Two images, a broken one, an example, and random weights that speak at length."""
    (folder / "examples").mkdir()
    for number, name in enumerate(("first.png", "second.png", "examples/a.png")):
        save_image(folder / name, number)
    (folder / "broken.png").write_bytes((folder / "first.png").read_bytes()[:60])
    torch.manual_seed(3)
    config = LMConfig(**SIZES, vocab_size=len(tokenizer), vision_dim=24, max_seq_len=512)
    model = Transformer(config)
    for name, weight in model.named_parameters():  # fresh weights would only repeat the last token
        if "vision_proj" in name or name.endswith(("wo.weight", "w2.weight")):
            weight.data *= 60
    model.tok_embeddings.weight.data[tokenizer.eos_token_id] = 0  # hardly likely: long answers
    paths = {"tokenizer_path": str(tokenizer_path), "clip_path": str(clip_path)}
    save_weights(model, folder / "32_vlm_sft.pth", stage="vlm_sft", **paths)
    return folder


def read_until(process: subprocess.Popen, pattern: str, seconds: float = LONG) -> str:
    """What the process printed until a line matched; never waits for ever, however silent the process is."""
    printed, end = "", time.monotonic() + seconds
    while not re.search(pattern, printed):
        ready, _, _ = select.select([process.stdout], [], [], max(0, end - time.monotonic()))
        assert ready, f"nothing like {pattern!r} within {seconds} s:\n{printed}"
        piece = os.read(process.stdout.fileno(), 65536).decode()
        assert piece, f"ended early, status {process.wait(10)}:\n{printed}"
        printed += piece
    return printed


@contextlib.contextmanager
def serve_page(folder: Path, *flags: str, change: str = "", **variables: str) -> Iterator[subprocess.Popen]:
    """web_server.py as a process; its address is in .address.

    change     code that runs before it
    variables  of its environment
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    # A proxy, as many people have: Gradio once asked it whether the page was up, and gave up.
    environment |= dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
    environment |= dict.fromkeys(("NO_PROXY", "no_proxy"), "") | variables
    start = f"import runpy; {change}\nrunpy.run_path('web_server.py', run_name='__main__')"
    command = [sys.executable, *(["-c", start] if change else ["web_server.py"])]
    command += ["--load_from", folder / "32_vlm_sft.pth"]
    command += ["--image_dir", folder / "examples", "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(
        [*map(str, command), "--max_new_tokens", "40", *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        process.address = re.search(r"http://\S+:\d+", read_until(process, r"http://\S+  \(")).group()
        yield process
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(60)
            raise


def make_tools(folder: Path) -> Path:
    """Programs named ffmpeg and gs that write into a log when they are started; the log."""
    for name in ("ffmpeg", "ffprobe", "gs"):
        (folder / name).write_text(f'#!/bin/sh\necho "$0 $*" >> {folder}/started\n')
        (folder / name).chmod(0o755)
    assert shutil.which("gs", path=str(folder))
    return folder / "started"


# ---- plain HTTP --------------------------------------------------------------------------------------------


def send(
    server: str,
    method: str = "GET",
    path: str = "/",
    body: bytes | None = None,
    headers: dict | None = None,
    timeout: float = LONG,
) -> tuple[int, dict, bytes]:
    """Status, headers and body of the answer; (0, {}, b"") where the connection was closed instead."""
    connection = http.client.HTTPConnection(server.removeprefix("http://"), timeout=timeout)
    try:
        connection.putrequest(method, path, skip_host="Host" in (headers or {}), skip_accept_encoding=True)
        for name, value in (headers or {}).items():
            connection.putheader(name, value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        with contextlib.suppress(ConnectionError):  # refused before all of it was sent
            connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    except (ConnectionError, http.client.HTTPException, AttributeError):  # the latter: closed long ago
        return 0, {}, b""
    finally:
        connection.close()


def form_of(*files: tuple[str, bytes]) -> tuple[bytes, dict]:
    """A body of names and contents, and its headers."""
    mark = secrets.token_hex(8)
    parts = [
        f'--{mark}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
        f"Content-Type: image/png\r\n\r\n".encode()
        + content
        + b"\r\n"
        for name, content in files
    ]
    return b"".join(parts) + f"--{mark}--\r\n".encode(), {
        "Content-Type": f"multipart/form-data; boundary={mark}"
    }


def upload(server: str, *files: tuple[str, bytes]) -> tuple[int, list[str]]:
    body, headers = form_of(*files)
    status, _, answer = send(server, "POST", "/gradio_api/upload", body, headers)
    return status, json.loads(answer) if status == 200 else []


def post(server: str, path: str, fields: dict | list | str | bytes, headers: dict | None = None):
    body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return send(server, "POST", path, body, {"Content-Type": "application/json"} | (headers or {}))


def event(number: int, session: str, *data, **more) -> dict:
    return {"data": list(data), "fn_index": number, "session_hash": session, "trigger_id": None} | more


def text_of(shown: str) -> str:
    """What the Chatbot was given, as it reads: of an answer its own words, of a notice both languages."""
    answer = re.sub(r'<span class="facts">.*', "", shown, flags=re.DOTALL)
    return html.unescape(re.sub("<[^>]*>", "", answer.replace('</span><span lang="en">', "\n")))


def question(text: str, *names: str) -> dict:
    return {"text": text, "files": [{"path": name, "meta": {"_type": "gradio.FileData"}} for name in names]}


class Visitor:
    """One who asks as the page does."""

    def __init__(self, server: str, settings: Sequence[float] = SETTINGS):
        self.server, self.session, self.settings = server, secrets.token_hex(6), settings
        self.refusals: list[int] = []  # statuses of what was not answered

    def ask(self, text: str, *images: bytes) -> list[str]:
        """What the page said meanwhile, the answer last; [] if it was refused."""
        return list(self.listen()) if self.put(text, *images) else []

    def put(self, text: str, *images: bytes) -> bool:
        names = [name for image in images for name in upload(self.server, ("a.png", image))[1]]
        if len(names) < len(images):
            self.refusals.append(-1)
            return False
        asked = event(0, self.session, question(text, *names), None)
        for path, fields in (
            ("/gradio_api/run/predict", asked),
            ("/gradio_api/queue/join", event(2, self.session, None, *self.settings)),
        ):
            status, _, _ = post(self.server, path, fields)
            if status != 200:
                self.refusals.append(status)
                return False
        return True

    def listen(self) -> Iterator[str]:
        """The texts of the last message of the chat, as they change."""
        from gradio_client.utils import apply_diff

        connection = http.client.HTTPConnection(self.server.removeprefix("http://"), timeout=LONG)
        connection.request("GET", f"/gradio_api/queue/data?session_hash={self.session}")
        stream, chat = connection.getresponse(), None
        if stream.status != 200:
            self.refusals.append(stream.status)
        for line in stream:
            message = json.loads(line[5:]) if line.startswith(b"data:") else {}
            if message.get("msg") == "process_generating":
                first = message["output"]["data"][0]
                chat = apply_diff(chat, first) if chat is not None else first
                yield text_of(chat[-1]["content"][-1]["text"])
            if message.get("msg") in ("process_completed", "unexpected_error"):
                if not message["success"]:
                    self.refusals.append(500)
                break
        connection.close()


# ---- the process -------------------------------------------------------------------------------------------


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]  # the sockets of processes are none
