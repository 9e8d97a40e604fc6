"""python -m model.download against a stand-in of the hub: what is there, cut, wrong, missing or hostile."""

import argparse
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.file_download
import huggingface_hub.utils
import numpy as np
import pytest
import torch
from conftest import LONG, ROOT, v1_state_dict, wait_until
from hub import PAGE, POINTER, Hub, git_sha1, running_hub, write_table
from PIL import Image

from model.chat import load_chat
from model.download import LINE, main
from model.download_table import COMMAND, describe_size, find_download, read_table
from model.LMConfig import LMConfig
from model.names import CLIP_PATH, TOKENIZER_PATH, find_weights
from trainer.check import main as check
from trainer.inputs import weights_cure
from trainer.script import choose_weights, clean_exit

COMMIT = "a" * 40


def noise(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count)


MODEL, SMALL = noise(3 << 20), b'{"small": true}'


@pytest.fixture
def hub(monkeypatch):
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        huggingface_hub.utils.close_session()
        impatient = SimpleNamespace(sleep=lambda _: None)  # between the library's attempts
        monkeypatch.setattr(huggingface_hub.file_download, "time", impatient)
        yield hub


@pytest.fixture
def table(hub, tmp_path) -> Path:
    files = {"out/a.pth": MODEL, "config.json": SMALL}
    return write_table(tmp_path / "table.toml", hub, {"model": {"place": "w", "files": files}})


class Result(namedtuple("Result", "status out errors")):
    pass


@pytest.fixture
def download(table, tmp_path, capsys):
    """Run the command; `errors` are its lines."""

    def run(*names: str, table: Path = table) -> Result:
        status = 0
        try:
            clean_exit(lambda: main([*names, f"--dir={tmp_path / 'place'}", f"--table={table}"]))
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return Result(status, out, [line for line in err.splitlines() if line.startswith("error: ")])

    return run


@pytest.fixture
def place(tmp_path) -> Path:
    return tmp_path / "place" / "w"


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# ---- what should happen ------------------------------------------------------------------------------------


def test_files_come_to_their_places_once(download, hub, place):
    result = download("model")
    assert result.status == 0 and "2 file(s) to transfer, 3.15 MB: less than a minute" in result.out
    assert (place / "out/a.pth").read_bytes() == MODEL and (place / "config.json").read_bytes() == SMALL
    assert names_in(place) == {"out/a.pth", "config.json"}  # no part, no lock
    asked = len(hub.requests)
    again = download("model", "model")
    assert again.status == 0 and again.out.count("is there (compared)") == 2
    assert len(hub.requests) == asked  # and without a network


def test_the_pinned_revision_is_asked_for_and_no_token_is_sent(download, hub, monkeypatch):
    seen = []
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(
        "hub.Answer.log_message", lambda self, *_: seen.append(self.headers.get("Authorization"))
    )
    assert download("model").status == 0
    assert all(f"/datasets/someone/all/resolve/{COMMIT}/" in path for _, path, _ in hub.requests)
    assert seen and set(seen) == {None}


def test_a_cut_transfer_goes_on_from_there(download, hub, place):
    hub.cuts["out/a.pth"] = [1_500_000, 1_200_000]
    assert download("model").status == 0
    first, second, third = hub.sent("out/a.pth")
    assert first == "" and 0 < int(second[6:-1]) < int(third[6:-1])
    assert (place / "out/a.pth").read_bytes() == MODEL


def test_what_a_dead_line_left_is_used_by_the_next_call(download, hub, place):
    hub.cuts["out/a.pth"] = [2 << 20, *[0] * 8]
    result = download("model")
    assert (
        result.status == 2 and "is out of reach" in result.errors[0] and "run this again" in result.errors[0]
    )
    (part,) = place.glob("out/*.part")
    kept = part.stat().st_size
    assert kept >= 1 << 20 and not (place / "out/a.pth").exists()
    hub.requests.clear()
    hub.cuts.clear()
    again = download("model")
    assert again.status == 0 and "arrived earlier" in again.out
    assert hub.sent("out/a.pth") == [f"bytes={kept}-"]
    assert (place / "out/a.pth").read_bytes() == MODEL and not part.exists()


def test_a_server_without_ranges_is_no_trap(download, hub, place):
    """Appending its whole answer to the part would make a file that is too long."""
    hub.cuts["out/a.pth"], hub.ignores_ranges = [2 << 20], True
    assert download("model").status == 0 and (place / "out/a.pth").read_bytes() == MODEL


def start(
    table: Path, folder: Path, *names: str, command=("-m", "model.download"), **environment: str
) -> subprocess.Popen:
    """The command as a process of its own."""
    return subprocess.Popen(
        [sys.executable, *command, *names, f"--dir={folder}", f"--table={table}"],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ctrl_c_is_one_line_and_the_next_call_goes_on(table, hub, tmp_path, place, download):
    hub.stalls["out/a.pth"] = 2 << 20
    process = start(table, tmp_path / "place", "model")
    assert hub.stalled.wait(LONG)
    (part,) = place.glob("out/*.part")
    wait_until(lambda: part.stat().st_size >= 1 << 20)  # what was sent is written
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=LONG)
    assert process.returncode == 130 and "Traceback" not in err
    assert [line for line in err.splitlines() if "interrupted: what has arrived is kept" in line]
    hub.stalls.clear()
    hub.requests.clear()
    assert download("model").status == 0
    (begins,) = hub.sent("out/a.pth")
    assert int(begins[6:-1]) >= 1 << 20 and (place / "out/a.pth").read_bytes() == MODEL


def test_two_processes_do_not_bring_the_same_file(table, hub, tmp_path, download):
    hub.stalls["out/a.pth"] = 1 << 20
    process = start(table, tmp_path / "place", "model")
    assert hub.stalled.wait(LONG)
    hub.stalls.clear()
    result = download("model")
    process.kill()
    process.communicate()
    assert result.status == 2 and "is being written by process" in result.errors[0]
    assert download("model").status == 0


def test_the_list_says_what_is_there(download, place):
    assert "model: 3.15 MB; not there" in download("--list").out
    (place / "out").mkdir(parents=True)
    (place / "out/a.pth").write_bytes(MODEL)
    assert "1 of 2 there" in download("--list").out
    assert download("model").out.count("has come") == 1
    assert "model: 3.15 MB; there" in download("--list").out


# ---- what goes wrong ---------------------------------------------------------------------------------------


def test_wrong_bytes_are_kept_aside_and_the_others_come(download, hub, place):
    hub.instead["out/a.pth"] = noise(len(MODEL), seed=1)
    result = download("model")
    (error,) = result.errors
    assert result.status == 2 and "a.pth has the checksum" in error and "a.pth.wrong" in error
    assert "run this again" in error and "HF_ENDPOINT" in error
    assert names_in(place) == {"out/a.pth.wrong", "config.json"}
    hub.instead.clear()
    assert download("model").status == 0 and (place / "out/a.pth").read_bytes() == MODEL


@pytest.mark.parametrize(
    ("content", "words"), [(PAGE, "is a web page"), (POINTER, "is a git-lfs pointer"), (b"", "is empty")]
)
@pytest.mark.parametrize("name", ["out/a.pth", "config.json"])
def test_what_comes_in_place_of_a_file(content, words, name, download, hub, place):
    hub.instead[name] = content
    result = download("model")
    (error,) = result.errors
    assert result.status == 2 and words in error and f"{Path(name).name}.wrong" in error
    assert not (place / name).exists() and names_in(place) >= {f"{name}.wrong"}


def test_a_pointer_that_lies_there_makes_room_for_the_file(download, place):
    (place / "out").mkdir(parents=True)
    (place / "out/a.pth").write_bytes(POINTER)
    result = download("model")
    assert result.status == 0 and "is a git-lfs pointer" in result.out and "a.pth.wrong" in result.out
    assert (place / "out/a.pth").read_bytes() == MODEL


def test_somebodys_own_file_is_not_touched(download, hub, place):
    """out/512_vlm_sft.pth may be what was trained last night."""
    (place / "out").mkdir(parents=True)
    (place / "out/a.pth").write_bytes(b"trained last night")
    result = download("model")
    (error,) = result.errors
    assert result.status == 2 and "has 18 bytes, not 3,145,728" in error and "rename it" in error
    assert (place / "out/a.pth").read_bytes() == b"trained last night" and not hub.sent("out/a.pth")
    assert (place / "config.json").read_bytes() == SMALL


def test_a_missing_file_a_missing_revision_and_a_refusal(download, hub, table):
    store = hub.files["someone/all", COMMIT]
    del store["config.json"]
    result = download("model")
    assert (
        result.status == 2
        and f"does not have config.json of someone/all at {COMMIT[:12]}" in result.errors[0]
    )
    assert "HF_ENDPOINT" in result.errors[0] and "a.pth has come" in result.out
    hub.files.clear()
    assert "does not have config.json" in download("model").errors[0]
    hub.status = 403
    assert "does not give everyone config.json" in download("model").errors[0]
    hub.status = 503
    assert "answers with status 503" in download("model").errors[0]


def test_a_network_that_wants_a_login_first(download, hub, place, tmp_path):
    hub.pages = True
    result = download("model")
    assert result.status == 2 and all("does not answer as a hub does" in error for error in result.errors)
    table = pattern_table(hub, tmp_path / "t.toml", {"photos/a": b"a"}, '{ name = "photos/*" }')
    assert "does not answer as a hub does" in download("all", table=table).errors[0]
    assert not place.exists()


def test_another_file_at_the_hub_is_noticed_before_it_is_transferred(download, hub, place):
    store = hub.files["someone/all", COMMIT]
    store["out/a.pth"] = noise(len(MODEL), seed=1)
    assert "has a file of SHA-256" in download("model").errors[0]
    store["out/a.pth"] = MODEL + b"!"
    assert "has 3,145,729 bytes there, not 3,145,728" in download("model").errors[0]
    assert not hub.sent("out/a.pth") and not (place / "out").exists()
    store["out/a.pth"], hub.commit = MODEL, "b" * 40
    assert "answers with commit bbbbbbbbbbbb" in download("model").errors[0]


def test_no_network_is_one_line_whatever_is_missing(download, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    result = download("model")
    (error,) = result.errors
    assert result.status == 2 and "http://127.0.0.1:9 is out of reach (" in error and "HF_ENDPOINT" in error


def test_HF_ENDPOINT_and_offline_mode_are_those_of_the_process(table, hub, tmp_path):
    """As a process: the library reads its environment when it is loaded."""
    process = start(table, tmp_path / "one", "model")
    assert process.wait(LONG) == 0 and (tmp_path / "one/w/out/a.pth").read_bytes() == MODEL, (
        process.stderr.read()
    )
    process.communicate()
    process = start(table, tmp_path / "two", "model", HF_HUB_OFFLINE="1")
    _, err = process.communicate(timeout=LONG)
    assert process.returncode == 2 and "HF_HUB_OFFLINE" in err and err.count("error: ") == 1


def test_too_little_room_is_said_before_anything_is_transferred(download, hub, place, monkeypatch):
    usage = shutil.disk_usage(place.parent.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3_000_000))
    result = download("model")
    (error,) = result.errors
    assert result.status == 2 and "3.15 MB are needed" in error and "3 MB are free" in error
    assert not any(method == "GET" for method, _, _ in hub.requests) and not place.exists()


def test_a_disk_that_fills_up_on_the_way(table, hub, tmp_path, place, download):
    """RLIMIT_FSIZE stands in for it; the next call goes on from what there was room for."""
    code = (
        "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000)); "
        "runpy.run_module('model.download', run_name='__main__')"
    )
    process = start(table, tmp_path / "place", "model", command=["-c", code])
    _, err = process.communicate(timeout=LONG)
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2 and "File too large; what has arrived is kept: make room" in error
    (part,) = place.glob("out/*.part")
    kept = part.stat().st_size
    assert 1_000_000 <= kept <= 1_500_000
    hub.requests.clear()
    assert download("model").status == 0 and hub.sent("out/a.pth") == [f"bytes={kept}-"]
    assert (place / "out/a.pth").read_bytes() == MODEL


def test_a_wrong_name_and_a_wrong_table(download, table, tmp_path):
    assert "no download is called modle: did you mean model?" in download("modle").errors[0]
    assert "give names, or --list" in download().errors[0].lower()
    good = table.read_text()
    for old, new, words in (
        ("[downloads", "[downloads[", "Expected"),
        ('what = "', 'whta = "', "'what' is missing"),
        ("size = ", "szie = ", "unexpected keyword argument 'szie'"),
        ("size = ", 'size = "1" #', "the size of out/a.pth is no number of bytes"),
        ('sha256 = "', 'sha256 = "x', "is no SHA-256"),
        ("[repositories.all]", "[repositories.other]", "'all' is missing"),
    ):
        (tmp_path / "t.toml").write_text(good.replace(old, new))
        (error,) = download("model", table=tmp_path / "t.toml").errors
        assert "t.toml" in error and words in error
    assert "there is no table" in download("model", table=tmp_path / "none.toml").errors[0]


@pytest.mark.parametrize("name", ["../a", "/a", "x/../../a", "C:/a", "..\\\\a"])
def test_a_table_writes_nothing_outside(name, download, tmp_path, hub):
    table = write_table(tmp_path / "t.toml", hub, {"model": {"files": {"a": SMALL}}})
    table.write_text(table.read_text().replace('name = "a"', f'name = "{name}"'))
    (error,) = download("model", table=table).errors
    assert "leads out of its folder" in error and not (tmp_path / "a").exists()


# ---- folders and zips --------------------------------------------------------------------------------------


def pattern_table(hub: Hub, path: Path, files: dict[str, bytes], source: str) -> Path:
    write_table(path, hub, {"all": {"place": "w", "files": files}})
    head = path.read_text().partition("[[downloads")[0]
    path.write_text(head + f"files = [{source}]\n")
    return path


def test_a_folder_comes_whole_by_what_the_hub_lists(download, hub, tmp_path, place):
    files = {
        "photos/a.png": noise(20_000),
        "photos/b.png": b"small",
        "photos/empty": b"",
        "photos/.hidden": b"x",
        "other/c.png": b"c",
    }
    table = pattern_table(hub, tmp_path / "t.toml", files, '{ name = "photos/*" }')
    assert download("all", table=table).status == 0
    assert names_in(place) == {"photos/a.png", "photos/b.png", "photos/empty"}
    hub.requests.clear()
    assert download("all", table=table).out.count("is there (compared)") == 3
    assert [method for method, _, _ in hub.requests] == ["GET"]  # the list alone
    hub.instead["photos/b.png"] = b"big!!"
    (place / "photos/b.png").unlink()
    (error,) = download("all", table=table).errors
    assert f"has the checksum {git_sha1(b'big!!')[:12]}" in error


def test_a_list_that_leads_outside_writes_nothing(download, hub, tmp_path):
    files = {"photos/../../../evil": b"x", "photos/a\\..\\..\\evil": b"x"}
    table = pattern_table(hub, tmp_path / "t.toml", files, '{ name = "photos/*" }')
    (error,) = download("all", table=table).errors
    assert "someone/all names a file outside of its folder" in error and not list(tmp_path.rglob("*evil"))


def make_zip(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return file.getvalue()


@pytest.fixture
def zipped(hub, tmp_path, download):
    """Download a zip that is called images.zip, and unpack it."""

    def run(content: bytes) -> Result:
        entry = {"place": "w", "files": {"images.zip": content}, "more": {"images.zip": {"unpack": "images"}}}
        return download("data", table=write_table(tmp_path / "t.toml", hub, {"data": entry}))

    return run


def test_a_zip_is_unpacked_once_and_mended(zipped, hub, place):
    content = make_zip(
        {"images/a.jpg": b"a" * 9, "images/b/c.jpg": b"c", "__MACOSX/images/._a": b"", "images/": b""}
    )
    assert "2 files in" in zipped(content).out
    assert names_in(place) == {"images.zip", "images.zip.unpacked", "images/a.jpg", "images/b/c.jpg"}
    before = (place / "images/b/c.jpg").stat().st_mtime_ns
    (place / "images/a.jpg").write_bytes(b"aa")  # as an interrupted unzip leaves it
    again = zipped(content)
    assert again.status == 0 and "1 of them new" in again.out and len(hub.sent("images.zip")) == 1
    assert (place / "images/a.jpg").read_bytes() == b"a" * 9
    assert (place / "images/b/c.jpg").stat().st_mtime_ns == before
    (place / "images.zip").unlink()  # to save the room
    gone = zipped(content)
    assert gone.status == 0 and "is unpacked (2 files" in gone.out and len(hub.sent("images.zip")) == 1
    (place / "images/a.jpg").unlink()
    assert zipped(content).status == 0 and len(hub.sent("images.zip")) == 2
    assert (place / "images/a.jpg").read_bytes() == b"a" * 9


def test_images_without_their_folder_go_into_it(zipped, place):
    assert zipped(make_zip({"a.jpg": b"a", "b.jpg": b"b"})).status == 0
    assert names_in(place) >= {"images/a.jpg", "images/b.jpg"}


@pytest.mark.parametrize(
    "name",
    ["../evil", "images/../../evil", "/tmp/evil-of-a-zip", "C:\\evil", "..\\evil"],
)
def test_a_zip_writes_nothing_outside(name, zipped, tmp_path, place):
    result = zipped(make_zip({"images/a.jpg": b"a", name: b"evil"}))
    (error,) = result.errors
    assert result.status == 2 and "nothing was unpacked" in error and "images.zip" in error
    assert names_in(place) == {"images.zip"}
    assert not list(tmp_path.rglob("*evil*")) and not Path("/tmp/evil-of-a-zip").exists()


def test_a_link_in_a_zip_is_not_followed(zipped, place, tmp_path):
    file, link = io.BytesIO(), zipfile.ZipInfo("images/way")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(link, str(tmp_path))
        archive.writestr("images/way/evil", b"evil")
    (error,) = zipped(file.getvalue()).errors
    assert "images/way is a link" in error and names_in(place) == {"images.zip"}


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "cp437"])
def test_names_in_any_encoding(encoding, zipped, place):
    """Zips of Chinese systems have names in GBK, and do not say so; unzip makes a hash of them."""
    name = "é.jpg" if encoding == "cp437" else "图片和文字.jpg"
    stand_in = "x" * len(name.encode(encoding)[:-4]) + ".jpg"
    content = make_zip({f"images/{stand_in}": b"a"}).replace(stand_in.encode(), name.encode(encoding))
    assert zipped(content).status == 0
    assert names_in(place) >= {f"images/{name}"}


def test_a_damaged_zip_and_one_that_is_none(zipped, place):
    content = make_zip({"images/a.jpg": b"a" * 100})
    result = zipped(content.replace(b"a" * 100, b"b" * 100))
    assert (
        "cannot unpack" in result.errors[0]
        and "Bad CRC-32" in result.errors[0]
        and "delete it" in result.errors[0]
    )
    assert names_in(place) == {"images.zip"}
    (place / "images.zip").unlink()
    assert "not a zip file" in zipped(b"no zip at all" * 9).errors[0]


def test_a_zip_that_the_disk_cannot_hold(zipped, place, tmp_path, monkeypatch):
    content, usage = make_zip({"images/a.jpg": b"a" * 5000}), shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=len(content) * 3 // 2))
        (error,) = zipped(content).errors
    assert "with room to unpack" in error and not place.exists()
    zipped(content)
    shutil.rmtree(place / "images")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    (error,) = zipped(content).errors
    assert "5,000 bytes are to be unpacked, 1,000 are free" in error and names_in(place / "images") == set()


# ---- the table, and who asks it ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (["pretrain"], ["clip", "tokenizer", "llm", "data_pretrain"]),
        (["sft"], ["clip", "tokenizer", "vlm_pretrain", "data_sft"]),
        (["sft", "--multi"], ["clip", "tokenizer", "vlm", "multi"]),
    ],
)
def test_the_check_names_the_download_of_whatever_is_missing(command, names, tmp_path, monkeypatch, capsys):
    """In an empty folder, one line for each; and what they name brings files to where they are looked for."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        check([*command, "--device=cpu"])
    problems = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(problems) == 5, problems
    for name in names:
        matching = [line for line in problems if re.search(rf"python -m model.download {name}\b", line)]
        assert len(matching) == (2 if name in ("data_pretrain", "data_sft", "multi") else 1), (name, problems)


def test_weights_of_v1s_sizes_alone_are_offered():
    assert "model.download llm," in weights_cure("llm", LMConfig(dim=512))
    assert "model.download vlm_768," in weights_cure("vlm_sft", LMConfig(dim=768))
    assert "model.download --list" in weights_cure("llm", LMConfig(dim=64))
    assert "download" not in weights_cure("llm", LMConfig(dim=512, use_moe=True))


def test_chat_and_page_name_their_downloads(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="python -m model.download vlm,"):
        find_weights(tmp_path, ["vlm_sft"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="python -m model.download vlm_pretrain_768"):
        load_chat("out/768_vlm_pretrain.pth")
    flags = argparse.Namespace(load_from=Path("model/minimind-v-v1"))
    with pytest.raises(FileNotFoundError, match="python -m model.download v1 brings it"):
        choose_weights(flags, ["vlm_sft"])
    assert find_download(ROOT / "dataset/eval_images") == f"{COMMAND} eval_images"
    assert find_download("dataset/eval_images/") == f"{COMMAND} eval_images"
    assert find_download("my_images") == find_download(tmp_path) == find_download("dataset") == ""


def test_the_table_knows_v1s_files():
    """Sizes and checksums of the weights, as the hub's pages have them; nothing is said that is not known."""
    table = read_table()
    weights = [table[name][0].files[0] for name in table if name.startswith(("llm", "vlm"))]
    assert len(weights) == 6 and all(source.sha256 for source in weights)
    assert sum(source.size is not None for source in weights) == 5
    assert [source.name for source in table["data_sft"][0].files if source.size or source.sha256] == []


# ---- bash quickstart.sh --real -----------------------------------------------------------------------------


@pytest.fixture
def copy(hub, tmp_path, tokenizer_path, clip_path) -> Path:
    """A copy of the repository whose table names the stand-in's files: a small CLIP, weights as v1's."""
    folder = tmp_path / "copy"
    kept_away = shutil.ignore_patterns(
        "__pycache__", "*.bin", "*.safetensors", "tokenizer*.json", "minimind-v*"
    )
    for name in ("model", "trainer", "serving"):  # without what was downloaded
        shutil.copytree(ROOT / name, folder / name, ignore=kept_away)
    for name in ("quickstart.sh", "requirements.txt", "3-eval_chat.py"):
        shutil.copy(ROOT / name, folder)
    torch.manual_seed(0)
    weights = io.BytesIO()
    torch.save(v1_state_dict(LMConfig(vision_dim=24), bias=True), weights)
    image = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(image, "PNG")

    def contents(source: Path, *names: str) -> dict[str, bytes]:
        return {name: (source / name).read_bytes() for name in names}

    clip = contents(clip_path, "config.json", "preprocessor_config.json", "model.safetensors")
    tokenizer = contents(tokenizer_path, "tokenizer.json", "tokenizer_config.json")
    downloads = {
        "clip": {"place": CLIP_PATH, "files": clip},
        "tokenizer": {"place": TOKENIZER_PATH, "files": tokenizer},
        "vlm": {"files": {"out/512_vlm_sft.pth": weights.getvalue()}},
        "eval_images": {"place": "dataset", "files": {"eval_images/red.png": image.getvalue()}},
    }
    write_table(folder / "model/downloads.toml", hub, downloads)
    environment = folder / ".venv/bin"
    environment.mkdir(parents=True)
    (environment / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (environment / "python").chmod(0o755)
    shutil.copy(ROOT / "requirements.txt", folder / ".venv/requirements.installed")
    return folder


def quickstart(copy: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(copy / "quickstart.sh"), "--real", *arguments],
        cwd=folder,
        timeout=LONG,
        capture_output=True,
        text=True,
    )


def test_quickstart_describes_real_photos(copy, hub, tmp_path):
    """From nothing to the description of a photo, and then of one's own, without another byte."""
    result = quickstart(copy, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    size_first = next(number for number, line in enumerate(lines) if "MB to download" in line)
    assert size_first == 0 and "file(s) to transfer" in result.stdout
    assert "[dataset/eval_images/red.png]" in result.stdout and "web_server.py" in result.stdout
    assert (copy / "out/512_vlm_sft.pth").is_file() and (copy / CLIP_PATH / "config.json").is_file()
    (tmp_path / "mine").mkdir()
    Image.new("RGB", (40, 30), "blue").save(tmp_path / "mine/blue.png")
    hub.requests.clear()
    result = quickstart(copy, "mine", folder=tmp_path)
    assert result.returncode == 0 and f"[{tmp_path}/mine/blue.png]" in result.stdout, result.stderr
    assert not hub.requests


def test_quickstart_stops_with_the_cure(copy, hub, tmp_path):
    result = quickstart(copy, "nowhere", folder=tmp_path)
    assert result.returncode == 1 and "there is no folder nowhere" in result.stderr and not hub.requests
    hub.instead["out/512_vlm_sft.pth"] = PAGE
    result = quickstart(copy, folder=tmp_path)
    assert result.returncode == 1 and "is a web page" in result.stderr and "run this again" in result.stderr
    assert "red.png]" not in result.stdout


def test_quickstart_says_what_it_will_transfer():
    table, text = read_table(), (ROOT / "quickstart.sh").read_text()
    downloads = [download for name in ("clip", "tokenizer", "vlm") for download in table[name]]
    assert f"{describe_size(downloads)} to download" in text and "about a minute at 100 Mbit/s" in text
    assert "names=(clip tokenizer vlm)" in text
    seconds = sum(source.num_bytes for download in downloads for source in download.files) / LINE
    assert 45 < seconds < 75
