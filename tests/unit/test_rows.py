"""Readers never raise: whatever is in a file comes out as rows and bad rows, with file and line."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestration.data.rows import BadRow, Row, rows_of

MIB = 2**20
quickly = settings(
    derandomize=True, deadline=None, max_examples=60, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=8
)
objects = st.dictionaries(st.text(max_size=4), values, max_size=3)


def written(folder: Path, name: str, content: bytes) -> Path:
    file = folder / name
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return file


def read(file: Path, longest: int = MIB, plain_text: bool = False) -> list[Row | BadRow]:
    return list(rows_of(file, longest, plain_text))


def good(rows: list[Row | BadRow]) -> list[Any]:
    return [row.value for row in rows if isinstance(row, Row)]


def bad(rows: list[Row | BadRow]) -> list[BadRow]:
    return [row for row in rows if isinstance(row, BadRow)]


@quickly
@given(some=st.lists(objects, min_size=1, max_size=6), packed=st.booleans(), indent=st.sampled_from([None, 1]), array=st.booleans())
def test_what_was_written_is_read(tmp_path: Path, some: list[dict], packed: bool, indent: int | None, array: bool) -> None:
    text = json.dumps(some, indent=indent) if array else "\n".join(map(json.dumps, some))
    name = ("a.json" if array else "a.jsonl") + (".gz" if packed else "")
    rows = read(written(tmp_path, name, text.encode()))
    assert good(rows) == some
    assert [row.line for row in rows] == list(range(1, len(some) + 1))


@quickly
@given(content=st.binary(max_size=400), name=st.sampled_from(["a.jsonl", "a.json", "a.txt", "a.jsonl.gz", "a.parquet", "a.arrow"]))
def test_any_bytes_at_all_give_rows_or_bad_rows(tmp_path: Path, content: bytes, name: str) -> None:
    rows = read(written(tmp_path, name, content), longest=100, plain_text=True)
    assert rows
    assert all(row.line >= 1 and row.file == str(tmp_path / name) for row in rows)


@quickly
@given(content=st.binary(max_size=200), stop=st.integers(0, 300))
def test_a_damaged_or_truncated_gzip_stream_ends_in_a_bad_row(tmp_path: Path, content: bytes, stop: int) -> None:
    whole = gzip.compress(b'{"a": 1}\n' * 400)
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(whole[: min(stop, len(whole) - 1)] + content)
    rows = read(file)
    assert isinstance(rows[-1], BadRow)
    assert all(value == {"a": 1} for value in good(rows))


@quickly
@given(some=st.lists(objects, min_size=1, max_size=5), spoilt=st.binary(min_size=1, max_size=6), at=st.integers(0, 80))
def test_an_array_spoilt_anywhere_gives_what_stands_before(tmp_path: Path, some: list[dict], spoilt: bytes, at: int) -> None:
    text = json.dumps(some).encode()
    rows = read(written(tmp_path, "a.json", text[:at] + spoilt + text[at:]))
    assert rows
    assert len(bad(rows)) <= len(some) + len(spoilt) + 1


def test_a_long_array_is_read_entry_by_entry_across_chunks(tmp_path: Path) -> None:
    some = [{"n": n, "text": "é" * (n % 997)} for n in range(3000)] + [{"text": "x" * 900_000}] + [{"n": n} for n in range(500)]
    assert good(read(written(tmp_path, "a.json.gz", json.dumps(some).encode()))) == some


def test_a_file_is_not_held_in_memory(tmp_path: Path) -> None:
    line = json.dumps({"text": "x" * 1000})
    for name, text in (("a.jsonl", f"{line}\n" * 20_000), ("a.json", "[" + f"{line}," * 20_000 + line + "]")):
        file = written(tmp_path, name, text.encode())
        tracemalloc.start()
        assert sum(1 for _ in rows_of(file, MIB)) >= 20_000
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt"])
def test_a_line_of_10_mb_is_a_bad_row_and_the_next_is_read(tmp_path: Path, name: str) -> None:
    line = b'{"text": "' + b"x" * (10 * MIB) + b'"}'
    rows = read(written(tmp_path, name, line + b'\n\n{"a": 1}\n'), plain_text=True)
    assert len(rows) == 2
    assert bad(rows)[0].line == 1
    assert "longer than data.longest_row_mb allows" in bad(rows)[0].reason
    assert good(rows) == ['{"a": 1}' if name == "a.txt" else {"a": 1}]


def test_a_long_entry_of_an_array_is_a_bad_row(tmp_path: Path) -> None:
    rows = read(written(tmp_path, "a.json", json.dumps([{"a": "x" * 1500}, {"b": 2}, {"c": "x" * (10 * MIB)}]).encode()), longest=1000)
    assert good(rows) == [{"b": 2}]
    assert [row.line for row in bad(rows)] == [1, 3]


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        (b'{"a": 1}\n\xff\xfe\n', 2, "not UTF-8: byte 0xff at position 1"),
        (b'{"a": 1}\n{"a": \n', 2, "not JSON"),
        (b'{"a": 1}\n3\n', 2, "an object is expected, not a number"),
        (b'\n\n"text"\n', 3, "an object is expected, not text"),
        (b"null", 1, "not null"),
        (b"", 1, "the file holds no rows"),
        (b"\n \n", 1, "the file holds no rows"),
        (b"[]", 1, "the file holds no rows"),
        (b'{"a": ' + b"[" * 200_000 + b"\n", 1, "not JSON"),
        (b"[" * 200_000, 1, "not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", 1, "not JSON"),
        (b'[{"a": 1}, {"a" 2}]', 2, "not JSON"),
        (b'[{"a": 1} {"a": 2}]', 2, "not JSON: ',' is expected"),
        (b'[{"a": 1}', 2, "not JSON: ',' is expected, not 'the end of the file'"),
        (b'[{"a": 1}] {}', 2, "not JSON: something follows the end of the array"),
        (b'[{"a": 1}, "\xff"]', 1, "not UTF-8"),
    ],
)
def test_a_bad_row_says_where_and_why(tmp_path: Path, content: bytes, line: int, reason: str) -> None:
    found = bad(read(written(tmp_path, "a.json", content)))[0]
    assert (found.file, found.line) == (str(tmp_path / "a.json"), line)
    assert reason in found.reason
    assert str(found).startswith(f"{tmp_path / 'a.json'}, line {line}: ")


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    for name, text in (("a.jsonl", '{"a": 1}'), ("a.json", '[{"a": 1}]')):
        assert good(read(written(tmp_path, name, b"\xef\xbb\xbf" + text.encode()))) == [{"a": 1}]


def test_plain_text_is_read_by_paragraphs_with_the_line_they_begin_on(tmp_path: Path) -> None:
    rows = read(written(tmp_path, "a.txt", b"one\ntwo\n\n\nthree\n\xff\nfour"), plain_text=True)
    assert [(row.line, row.value) for row in rows if isinstance(row, Row)] == [(1, "one\ntwo"), (5, "three"), (7, "four")]
    assert [row.line for row in bad(rows)] == [6]


def test_a_file_that_cannot_be_opened_is_a_bad_row(tmp_path: Path) -> None:
    assert "cannot be read" in bad(read(tmp_path / "none.jsonl"))[0].reason


def test_tables_are_read_by_rows(tmp_path: Path) -> None:
    some = [{"prompt": f"p{n}", "ranks": [n, 1]} for n in range(5)]
    table = pyarrow.Table.from_pylist(some)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for name, new in (("stream.arrow", pyarrow.ipc.new_stream), ("file.arrow", pyarrow.ipc.new_file)):
        with new(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    for name in ("a.parquet", "stream.arrow", "file.arrow"):
        assert good(read(tmp_path / name)) == some
    spoilt = (tmp_path / "a.parquet").read_bytes()[:-20]
    assert "not a readable parquet file" in bad(read(written(tmp_path, "b.parquet", spoilt)))[0].reason
