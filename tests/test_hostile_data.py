"""Data files that unpack to far more than they are: refused in one line, before they fill memory or disk."""

import gzip
import io
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, make_rows

from model.data import parquet
from model.data.rows import Rows

WORDS = "bomb.*: its .* bytes unpack to more than 200 times as many"


def test_a_gzip_bomb_is_refused(tmp_path):
    """While it is unpacked: what its end says of its size can be wrong."""
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 30_000_000))
    with pytest.raises(ValueError, match=WORDS):
        Rows(tmp_path / "bomb.jsonl.gz")
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress(json.dumps(make_rows(2000)).encode()))
    assert len(Rows(tmp_path / "rows.json.gz")) == 2000  # 70 times its size


@pytest.mark.parametrize("use_dictionary", [True, False])
def test_a_parquet_bomb_is_refused(tmp_path, use_dictionary):
    """1.7 kB became 4.3 GB: one long value stood in all rows."""
    rows = pa.table({"image": ["a" * 200_000] * 500, "conversations": ["[]"] * 500})
    pq.write_table(rows, tmp_path / "bomb.parquet", compression="zstd", use_dictionary=use_dictionary)
    assert (tmp_path / "bomb.parquet").stat().st_size < 60_000
    with pytest.raises(ValueError, match=WORDS):
        Rows(tmp_path / "bomb.parquet")


def test_a_parquet_file_is_refused_by_its_description(tmp_path):
    """Before its rows are read: with many columns, or with sizes that no rows have."""
    pq.write_table(pa.table({f"c{number}": [1] for number in range(1001)}), tmp_path / "wide.parquet")
    with pytest.raises(ValueError, match="wide.parquet: it has 1,001 columns: at most 1,000 are read"):
        Rows(tmp_path / "wide.parquet")


def read_here(path) -> list[dict]:
    """In this process, where a test can change the bounds."""
    output = io.BytesIO()
    with open(path, "rb") as file:
        parquet.write_rows(pq, file, parquet.Bound(path), output)
    return [json.loads(line) for line in output.getvalue().splitlines()]


def test_a_parquet_file_with_too_long_a_description_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "MAX_FOOTER", 100)
    pq.write_table(pa.table({"image": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="the description of its columns has .* bytes: at most 100 are read"):
        read_here(tmp_path / "a.parquet")


@pytest.mark.parametrize("batch_bytes", [1, 512 << 20])
def test_rows_come_out_whole_however_few_are_read_at_a_time(tmp_path, monkeypatch, batch_bytes):
    monkeypatch.setattr(parquet, "BATCH_BYTES", batch_bytes)
    rows = make_rows(50)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=20)
    assert read_here(tmp_path / "a.parquet") == rows == list(Rows(tmp_path / "a.parquet"))


def test_few_rows_are_read_at_a_time_where_all_may_hold_the_longest_value(tmp_path):
    rows = pa.table({"image": ["a" * 3_000_000] * 9})
    pq.write_table(rows, tmp_path / "a.parquet", row_group_size=3)
    metadata = pq.read_metadata(tmp_path / "a.parquet")
    assert 100 < parquet.batch_size_of(metadata, parquet.Bound(tmp_path / "a.parquet")) < 180


def test_a_library_that_crashes_is_one_line(tmp_path, monkeypatch):
    """A byte of the description was wrong, and the interpreter was gone: no line, no status of ours."""
    pq.write_table(pa.Table.from_pylist(make_rows(50)), tmp_path / "a.parquet")
    monkeypatch.setattr(parquet, "ROOT", tmp_path)  # another program in the place of ours
    (tmp_path / "model" / "data").mkdir(parents=True)
    program = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n"
    (tmp_path / "model" / "data" / "parquet.py").write_text(program)
    with pytest.raises(ValueError, match="cannot read .*a.parquet: it is damaged, or needs too much memory"):
        Rows(tmp_path / "a.parquet")


def test_memory_has_a_bound_while_a_parquet_file_is_read(tmp_path):
    """A value of 4.5 GB, which a file of few kB can hold."""
    pytest.importorskip("resource")
    code = "from model.data import parquet as p; p.bound_memory(p.MAX_MEMORY); bytes(4_500_000_000)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "MemoryError" in result.stderr


def test_damaged_parquet_files_are_one_line(tmp_path):
    pq.write_table(pa.Table.from_pylist(make_rows(50)), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    for number in range(6):
        place = len(content) - 9 - number * 60
        damaged = content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :]
        (tmp_path / "a.parquet").write_bytes(damaged)
        try:
            assert len(Rows(tmp_path / "a.parquet")) <= 50
        except ValueError as error:
            assert "a.parquet" in str(error) and "\n" not in str(error)
