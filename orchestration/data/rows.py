"""Rows of files, one at a time: JSON lines, JSON arrays, plain text and tables, plain or gzipped.

No file is held in memory as a whole. What cannot be read comes out as a `BadRow` in its place; nothing is raised. Where the rest of a
file cannot be read either (a gzip stream that breaks off, an array that is no JSON), the bad row is the file's last.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

CHUNK = 1 << 16
BLANK = " \t\r\n"


@dataclass(frozen=True)
class Row:
    """One value of a file."""

    file: str
    line: int
    """From 1: the line, or the entry of a JSON array, or the row of a table."""
    value: Any


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.reason}"


class _Unreadable(Exception):
    """The rest of a file cannot be read; says why."""


def rows_of(file: Path, longest: int, plain_text: bool = False) -> Iterator[Row | BadRow]:
    """The rows of one file, read by its name: `.parquet`, `.arrow`, `.txt` (paragraphs), anything else JSON.

    Args:
        longest: bytes of the longest row that is read.
        plain_text: the rows of a JSON file may be strings as well as objects.
    """
    number = 0
    try:
        for row in _reader(file, longest):
            number = row.line  # where the next row's error is, if there is one
            if isinstance(row, Row) and not isinstance(row.value, dict) and not (plain_text and isinstance(row.value, str)):
                row = BadRow(row.file, row.line, f"an object is expected, not {_kind(row.value)}")
            yield row
        if number == 0:
            yield BadRow(str(file), 1, "the file holds no rows")
    except _Unreadable as cause:
        yield BadRow(str(file), number + 1, str(cause))
    except (EOFError, zlib.error, gzip.BadGzipFile) as cause:
        yield BadRow(str(file), number + 1, f"the gzip stream is damaged or breaks off here, what follows is lost ({cause})")
    except OSError as cause:
        yield BadRow(str(file), number + 1, f"cannot be read ({cause})")


def _reader(file: Path, longest: int) -> Iterator[Row | BadRow]:
    if file.suffix == ".parquet":
        return _table(file, _parquet_batches(file))
    if file.suffix == ".arrow":
        return _table(file, _arrow_batches(file))
    return _text_file(file, longest)


def _text_file(file: Path, longest: int) -> Iterator[Row | BadRow]:
    packed = file.suffix == ".gz"
    suffix = Path(file.stem).suffix if packed else file.suffix
    with gzip.open(file) if packed else open(file, "rb") as opened:
        if suffix == ".txt":
            yield from _paragraphs(file, opened, longest)  # type: ignore[arg-type]
        elif _first_byte(opened) == b"[":  # type: ignore[arg-type]
            yield from _array(file, opened, longest)  # type: ignore[arg-type]
        else:
            yield from _json_lines(file, opened, longest)  # type: ignore[arg-type]


def _first_byte(opened: BinaryIO) -> bytes:
    """The first byte that is not blank (a byte-order mark counts as blank); the file is back at its start afterwards."""
    head = opened.read(CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()
    opened.seek(0)
    return head[:1]


def _lines(file: Path, opened: BinaryIO, longest: int) -> Iterator[Row | BadRow]:
    """Every line as text without its end; the value of an empty line is empty."""
    number = 0
    while line := opened.readline(longest + 1):
        number += 1
        if len(line) > longest and not line.endswith(b"\n"):
            size = len(line)
            while (more := opened.readline(CHUNK)) and not more.endswith(b"\n"):
                size += len(more)
            yield BadRow(str(file), number, f"longer than data.longest_row_mb allows ({(size + len(more)) / 2**20:.1f} MiB)")
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as cause:
            yield BadRow(str(file), number, f"not UTF-8: byte 0x{line[cause.start]:02x} at position {cause.start + 1}")
            continue
        yield Row(str(file), number, text.rstrip("\r\n"))


def _json_lines(file: Path, opened: BinaryIO, longest: int) -> Iterator[Row | BadRow]:
    for row in _lines(file, opened, longest):
        if isinstance(row, BadRow):
            yield row
        elif row.value.strip():
            yield _parsed(row)


def _parsed(row: Row) -> Row | BadRow:
    try:
        return Row(row.file, row.line, json.loads(row.value))
    except RecursionError:
        return BadRow(row.file, row.line, "not JSON that can be read: nested too deeply")
    except ValueError as cause:
        return BadRow(row.file, row.line, f"not JSON ({cause})")


def _paragraphs(file: Path, opened: BinaryIO, longest: int) -> Iterator[Row | BadRow]:
    """Texts between empty lines; a bad line makes its paragraph end before it."""
    found: list[str] = []
    start = size = 0
    for row in _lines(file, opened, longest):
        if isinstance(row, Row) and row.value.strip():
            start = start if found else row.line
            size += len(row.value) + 1
            found.append(row.value)
        if found and (isinstance(row, BadRow) or not row.value.strip() or size > longest):
            yield Row(str(file), start, "\n".join(found)) if size <= longest else _too_long(file, start)
            found, size = [], 0
        if isinstance(row, BadRow):
            yield row
    if found:
        yield Row(str(file), start, "\n".join(found))


def _too_long(file: Path, number: int) -> BadRow:
    return BadRow(str(file), number, "longer than data.longest_row_mb allows")


def _array(file: Path, opened: BinaryIO, longest: int) -> Iterator[Row | BadRow]:
    """The entries of a JSON array, read piece by piece; `line` counts entries. What is no JSON ends the file."""
    text = _Buffer(opened)
    text.skip("[")
    number = 0
    while text.skip_blank() != "]":
        number += 1
        if number > 1:
            text.skip(",")
        value = text.value(longest)
        yield _too_long(file, number) if value is _TOO_LONG else Row(str(file), number, value)
    text.skip("]")
    if text.skip_blank():
        raise _Unreadable("not JSON: something follows the end of the array")


_TOO_LONG = object()


class _Buffer:
    """The text of a file from where it was read last; grows only while a value is incomplete."""

    def __init__(self, opened: BinaryIO) -> None:
        self.opened, self.text, self.at, self.ended = opened, "", 0, False
        self.decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self.decoder = json.JSONDecoder()

    def more(self, size: int = CHUNK) -> bool:
        """Read on, and forget what is behind; False at the end of the file."""
        data = self.opened.read(size)
        try:
            self.text = self.text[self.at :] + self.decode(data, not data)
        except UnicodeDecodeError as cause:
            raise _Unreadable(f"not UTF-8 (byte 0x{cause.object[cause.start]:02x}), what follows is lost") from cause
        self.at, self.ended = 0, not data
        return not self.ended

    def skip_blank(self) -> str:
        """The next character that is not blank, left in place; empty at the end of the file."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in BLANK:
                self.at += 1
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def skip(self, wanted: str) -> None:
        found = self.skip_blank()
        if found != wanted:
            raise _Unreadable(f"not JSON: {wanted!r} is expected, not {found or 'the end of the file'!r}; what follows is lost")
        self.at += 1

    def value(self, longest: int) -> Any:
        """The next value; `_TOO_LONG` when it takes more than about `longest` bytes.

        Each attempt at an incomplete value reads as much again as is there, so that a long value is parsed few times.
        """
        self.skip_blank()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
                if end < len(self.text) or self.ended:  # a number could go on
                    short, self.at = end - self.at <= longest, end
                    return value if short else _TOO_LONG
            except RecursionError as cause:
                raise _Unreadable("not JSON that can be read: nested too deeply; what follows is lost") from cause
            except ValueError as cause:
                if self.ended:
                    raise _Unreadable(f"not JSON ({cause}); what follows is lost") from cause
            if len(self.text) - self.at > 2 * longest + CHUNK:
                raise _Unreadable("longer than data.longest_row_mb allows, or not JSON; what follows is lost")
            self.more(max(CHUNK, len(self.text) - self.at))


def _table(file: Path, batches: Iterator[Any]) -> Iterator[Row | BadRow]:
    """Rows of a parquet or arrow file."""
    import pyarrow

    number = 0
    try:
        for batch in batches:
            for value in batch.to_pylist():
                number += 1
                yield Row(str(file), number, value)
    except (pyarrow.ArrowException, ValueError) as cause:  # UnicodeDecodeError is a ValueError
        raise _Unreadable(f"not a readable {file.suffix[1:]} file ({str(cause).splitlines()[0][:200]})") from cause


def _parquet_batches(file: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as opened:
        yield from opened.iter_batches(batch_size=1024)


def _arrow_batches(file: Path) -> Iterator[Any]:
    """The stream form that the library datasets writes, or the file form."""
    import pyarrow

    with pyarrow.memory_map(str(file)) as mapped:
        try:
            yield from pyarrow.ipc.open_stream(mapped)
        except pyarrow.ArrowInvalid:
            opened = pyarrow.ipc.open_file(mapped)
            yield from (opened.get_batch(number) for number in range(opened.num_record_batches))


def _kind(value: Any) -> str:
    names = {str: "text", list: "a list", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)
