"""Rows of a data file without its dicts in memory: spans, errors, and an index that is never stale, torn or
in the way."""

import json
import multiprocessing
import os
import pickle
import re
import signal
import time

import pandas
import pytest
from conftest import LONG, make_rows

from model.data import rows as rows_module
from model.data import spans
from model.data.rows import Rows
from model.data.steady import LostFile
from model.files import atomic_write

AWKWARD = [
    {"id": 'quotes " and \\ and ] and } and , in text', "value": '[{"a": 1}, ]'},
    {"value": "中文 \u2028 é 😀"},
    {"escaped": "\u0001\n\r\t\\u4e2d"},
    [1, [2, [3]]],
    "text ] , [",
    7,
    -1.5e-3,
    1e300,
    None,
    True,
    False,
    {},
    [],
    "",
    {"nested": {"deep": [{"x": [[]]}]}},
    {"long": "长" * 5000},
]


@pytest.fixture(params=[4, 7, 1 << 20])
def window(request, monkeypatch) -> None:
    """Windows that cut rows, escapes and characters everywhere, and one that cuts nothing."""
    monkeypatch.setattr(spans, "WINDOW", request.param)


@pytest.fixture
def indexed(monkeypatch, tmp_path) -> None:
    """Every file counts as large, and nothing is left in the user's own cache."""
    monkeypatch.setattr(rows_module, "SMALL", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def json_texts(rows: list) -> dict[str, bytes]:
    """One list of rows as different programs would write it."""
    plain = json.dumps(rows, ensure_ascii=False).encode()
    return {
        "one line": plain,
        "escaped": json.dumps(rows).encode(),
        "indented": json.dumps(rows, ensure_ascii=False, indent=2).encode(),
        "crlf": json.dumps(rows, ensure_ascii=False, indent=1).replace("\n", "\r\n").encode() + b"\r\n",
        "byte order mark": b"\xef\xbb\xbf" + plain,
        "spaces": b" \n\t" + plain.replace(b", {", b"\n ,\t{") + b" \n ",
    }


@pytest.mark.parametrize("form", json_texts([]))
def test_rows_of_a_json_list_equal_json_load(tmp_path, window, form):
    (tmp_path / "a.json").write_bytes(json_texts(AWKWARD)[form])
    rows = Rows(tmp_path / "a.json")
    assert len(rows) == len(AWKWARD) and list(rows) == AWKWARD and rows[-1] == AWKWARD[-1]
    with pytest.raises(IndexError):
        rows[len(rows)]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n  \n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_rows_of_a_jsonl_file(tmp_path, end, mark):
    lines = end.join(json.dumps(row, ensure_ascii=False) for row in AWKWARD)
    for last in ("", end):
        (tmp_path / "a.jsonl").write_bytes(mark + (lines + last).encode())
        assert list(Rows(tmp_path / "a.jsonl")) == AWKWARD


@pytest.mark.parametrize(
    "bad",
    [
        b'{"a": 1}, {"b": }]',
        b'{"a": 1} {"b": 2}]',
        b"1, 2",
        b"1,]",
        b"",
        b"{",
        b'{"a": "\xe4\xb8\xad\n"}]',
        b"1] x",
        b"[" * 100_000,
        b"9" * 5000 + b"]",
        b'\n\n{"a"\xe4\xb8\xad}]',
        b"tru]",
        b"1..2]",
    ],
)
def test_an_error_is_where_json_says_it_is(tmp_path, window, bad):
    (tmp_path / "a.json").write_bytes(b"[" + bad)
    with pytest.raises(ValueError) as expected:
        try:
            json.loads(b"[" + bad)
        except RecursionError:
            raise ValueError("nested too deeply") from None
    place = re.search(r"line \d+ column \d+|$", str(expected.value))[0]
    with pytest.raises(ValueError, match="a.json is not valid JSON: line .* column") as found:
        Rows(tmp_path / "a.json")
    assert place in str(found.value) and "\n" not in str(found.value)
    assert getattr(expected.value, "msg", "") in str(found.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"\xef\xbb\xbf", "not valid JSON: line 1 column 1: Expecting value"),
        ("a.json", b'{"id": 1}\n{"id": 2}', "line 2 column 1: Extra data; one object per line is .jsonl"),
        ("a.json", b"[1]\n\n [2]", "line 3 column 2: Extra data"),
        ("a.json", b" [ ] ", "holds no rows"),
        ("a.jsonl", b"\n \n", "holds no rows"),
        ("a.jsonl", b"", "holds no rows"),
        ("a.json", '["中'.encode("gb18030") + b'"]', "not UTF-8 text: byte 2, in line 1"),
        ("a.jsonl", b'"a"\n"\xff"\n', "not UTF-8 text: byte 5, in line 2"),
        ("a.json", b'["\xed\xa0\x80"]', "not UTF-8 text"),
        ("a.jsonl", b'{"a": 1}\n{"a": 1} 2\n', "line 2 column 10: Extra data"),
        ("a.jsonl", '{"a": 1}\n\n{"中": 文}\n'.encode(), "line 3 column 7: Expecting value"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, window, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as found:
        Rows(tmp_path / name)
    assert "\n" not in str(found.value) and name in str(found.value)


def test_parquet_of_any_column_type(tmp_path, indexed):
    rows = make_rows(50)
    table = pandas.DataFrame(rows)
    table["when"], table["bytes"], table["none"] = pandas.Timestamp("2026-11-24"), b"\xff\xd8", None
    table.to_parquet(tmp_path / "a.parquet")
    for _ in range(2):  # converted, and read from the index
        read = Rows(tmp_path / "a.parquet")
        assert [{key: row[key] for key in rows[0]} for row in read] == rows
        assert read[0]["when"].startswith("2026-11-24") and read[0]["none"] is None
    table.iloc[:0].to_parquet(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="b.parquet holds no rows"):
        Rows(tmp_path / "b.parquet")


# ---- the index ----


def write_rows(path, count: int = 30, seed: int = 0) -> list[dict]:
    rows = [{"id": n + seed} for n in range(count)]
    if path.suffix == ".parquet":
        pandas.DataFrame(rows).to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        path.write_text(json.dumps(rows))
    return rows


def no_build(self, folder):
    raise AssertionError("the index is built again")


@pytest.fixture(params=["a.json", "a.jsonl", "a.parquet"])
def data(request, tmp_path, indexed):
    return tmp_path / request.param


def test_a_small_file_leaves_nothing_beside_it(tmp_path):
    write_rows(tmp_path / "a.json")
    assert Rows(tmp_path / "a.json").index_seconds == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_large_file_is_indexed_once(data, monkeypatch):
    rows = write_rows(data)
    first = Rows(data)
    assert first.index_seconds > 0 and list(first) == rows
    monkeypatch.setattr(Rows, "build", no_build)
    again = Rows(data)
    assert again.index_seconds == 0 and list(again) == rows and again.fingerprint == first.fingerprint
    assert list(pickle.loads(pickle.dumps(again))) == rows  # as a spawned loader worker gets it


def test_a_changed_file_is_never_read_by_a_stale_index(data):
    write_rows(data)
    before = Rows(data)
    kept = before.remember("count", lambda: len(before))
    rows = write_rows(data, 31, seed=500)
    after = Rows(data)
    assert list(after) == rows and after.fingerprint != before.fingerprint
    assert after.remember("count", lambda: len(after)) == 31 == kept + 1
    files = [path.name for path in after.folder.iterdir()]
    assert all(name.startswith(after.key) or name == "lock" for name in files), files
    # Same size, another time: touched, or rewritten.
    status = data.stat()
    os.utime(data, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert Rows(data).index_seconds > 0
    gone = pickle.loads(pickle.dumps(before))  # in a worker that is spawned now
    with pytest.raises(LostFile, match="was changed while it was in use"):
        gone[3]


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.unlink(),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-9]),
        lambda file: file.write_bytes(b"x" * 500),
    ],
)
def test_a_torn_index_is_built_again(data, damage):
    rows = write_rows(data)
    for file in sorted(Rows(data).folder.glob("*-v*")):
        damage(file)
        again = Rows(data)
        assert again.index_seconds > 0 and list(again) == rows, file
        assert Rows(data).index_seconds == 0


def test_where_nothing_can_be_written_beside_it_the_index_goes_to_the_cache(data, tmp_path, monkeypatch):
    rows = write_rows(data)
    data.with_name(f".{data.name}.index").write_text("a file, so that no folder can be made here")
    read = Rows(data)
    assert list(read) == rows and read.folder.is_relative_to(tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(Rows, "build", no_build)
        assert list(Rows(data)) == rows
    # Another file of the same name has an index of its own.
    other = tmp_path / "other" / data.name
    other.parent.mkdir()
    other.with_name(f".{data.name}.index").write_text("")
    assert write_rows(other, 7) == list(Rows(other))
    assert Rows(data).index_seconds == 0


def test_where_nothing_can_be_written_at_all_the_index_stays_in_memory(data, tmp_path, monkeypatch):
    rows = write_rows(data)
    data.with_name(f".{data.name}.index").write_text("")
    (tmp_path / "cache").write_text("")
    read = Rows(data)
    assert list(read) == rows and read.folder is None and read.remember("x", lambda: 5) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".{data.name}.index", data.name, "cache"]


def test_a_full_disk_does_no_harm(data, monkeypatch):
    def full(path, write):
        raise OSError("No space left on device")

    rows = write_rows(data)
    monkeypatch.setattr(rows_module, "atomic_write", full)
    read = Rows(data)
    assert list(read) == rows and read.remember("x", lambda: 5) == 5
    monkeypatch.undo()


def test_a_file_that_changes_under_a_running_program_is_reported(tmp_path):
    path = tmp_path / "a.jsonl"
    write_rows(path)
    rows = Rows(path)
    path.write_text("x" * path.stat().st_size)
    with pytest.raises(LostFile, match="a.jsonl was changed while it was in use"):
        rows[3]


def test_what_is_worked_out_once_is_remembered(tmp_path, indexed):
    write_rows(tmp_path / "a.json")
    calls = []
    for _ in range(3):
        assert Rows(tmp_path / "a.json").remember("n", lambda: calls.append(1) or {"found": [1, None]}) == {
            "found": [1, None]
        }
    assert len(calls) == 1


def in_processes(count: int, target) -> list[int | None]:
    """Exit codes of forked processes that all do the same at once."""
    processes = [multiprocessing.get_context("fork").Process(target=target) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LONG)
    return [process.exitcode for process in processes]


def test_of_processes_that_open_a_file_at_once_one_builds(data, tmp_path, monkeypatch):
    rows, build = write_rows(data), Rows.build

    def slow_build(self, folder):
        (tmp_path / f"built by {os.getpid()}").touch()
        time.sleep(0.3)
        build(self, folder)

    def check():
        assert list(Rows(data)) == rows

    monkeypatch.setattr(Rows, "build", slow_build)
    assert in_processes(4, check) == [0, 0, 0, 0]
    assert len(list(tmp_path.glob("built by *"))) == 1


def test_a_builder_that_is_killed_leaves_nothing_that_is_used(data, monkeypatch):
    rows = write_rows(data)

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    for place in ("spans.npy", "json"):  # while it saves the one or the other
        with monkeypatch.context() as patch:
            patch.setattr(
                rows_module,
                "atomic_write",
                lambda path, write, place=place: (
                    die() if path.name.endswith(f".{place}") else atomic_write(path, write)
                ),
            )
            assert in_processes(1, lambda: Rows(data)) == [-signal.SIGKILL]
    read = Rows(data)  # its lock is gone with it
    assert read.index_seconds > 0 and list(read) == rows
