# Copyright (c) 2026, the megatron-core gptoss authors.

"""The documents of text files, one after the other: jsonl, json, txt, parquet; .gz and .zst too.

Nothing but a single document is held in memory. What costs time, parsing a line of JSON and
decoding UTF-8, is left to `text_of`, which runs in the processes that tokenise.
"""

import codecs
import gzip
import io
import json
import os
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Iterator

from megatron.gpt_oss.errors import UsageError

LINE_SUFFIXES = (".jsonl", ".ndjson")
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
PACKED_SUFFIXES = (".gz", ".zst")
# Taken from a folder by default.
TEXT_PATTERNS = tuple(
    f"*{suffix}{packed}"
    for suffix in (*TEXT_SUFFIXES, *LINE_SUFFIXES, ".json")
    for packed in ("", *PACKED_SUFFIXES)
) + ("*.parquet",)
CHUNK_BYTES = 1 << 20
PARQUET_ROWS = 128

JSON, TEXT, VALUE, BAD = "json", "text", "value", "bad"


class BadDocument(ValueError):
    """A document that cannot be read; the message says why."""


@dataclass(frozen=True)
class Record:
    """One document as it lies in its file.

    Attributes:
        kind: JSON: `raw` is a line of JSON. TEXT: `raw` is a whole file. VALUE: `raw` is the text
            itself, or what stands in its place. BAD: `raw` says why there is none.
        number: line, or row of a parquet file, from 1; 0 for a whole file.
        position: bytes of the file that were read when this document had been.
    """

    kind: str
    raw: object
    number: int
    position: int


def place_of(path: Path, number: int) -> str:
    """Where a record lies, for messages."""
    name = printable(path)
    if not number:
        return name
    return f"{name}, {'row' if format_of(path) == '.parquet' else 'line'} {number}"


def printable(path: str | Path) -> str:
    """The name of a file, which Linux lets be any bytes, as text that can be written as UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def read_records(path: Path, key: str) -> Iterator[Record]:
    """The records of a file, by its name's ending.

    Args:
        path: .jsonl or .ndjson: a document a line. .json: lines, an array, or one object.
            .parquet: a document a row. Anything else is one document. .gz and .zst are unpacked.
        key: field or column that holds the text.
    Raises:
        UsageError: a package is missing, or a parquet file has no such column.
    """
    suffix = format_of(path)
    if suffix == ".parquet":
        yield from _parquet_rows(path, key)
        return
    try:
        with _opened(path) as (stream, raw):
            if suffix in LINE_SUFFIXES:
                yield from _lines(stream, raw, 0)
            elif suffix == ".json":
                yield from _json_documents(stream, raw, key)
            else:
                yield Record(TEXT, stream.read(), 0, os.fstat(raw.fileno()).st_size)
    except UnicodeDecodeError:
        yield Record(BAD, "not UTF-8; the rest is skipped", 0, path.stat().st_size)
    except (EOFError, zlib.error, gzip.BadGzipFile, *_zstd_errors()) as error:
        size = path.stat().st_size
        yield Record(BAD, f"incomplete, or not {path.suffix[1:].lower()} ({error})", 0, size)


def format_of(path: Path) -> str:
    """The ending that says what a file holds, under .gz or .zst."""
    path = Path(Path(path).name.lower())  # .JSONL is .jsonl
    return Path(path.stem).suffix if path.suffix in PACKED_SUFFIXES else path.suffix


def is_whole_text(path: Path) -> bool:
    """Whether a file is one document of plain text."""
    return format_of(path) not in (*LINE_SUFFIXES, ".json", ".parquet")


def text_of(record: Record, key: str) -> str:
    """The text of a record; '' or only spaces where the document is empty.

    Raises:
        BadDocument: says what the record has in its place.
    """
    if record.kind == BAD:
        raise BadDocument(record.raw)
    if record.kind == TEXT:
        try:
            return record.raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise BadDocument("not UTF-8") from None
    value = record.raw
    if record.kind == JSON:
        if not value.strip():
            return ""
        try:
            value = json.loads(value)[key]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadDocument(
                f"not a JSON object with a '{key}' ({_reason(error)}). Name the field with "
                "--json-key"
            ) from None
    if not isinstance(value, str):
        raise BadDocument(f"'{key}' is not a string")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can write half of a surrogate pair
        raise BadDocument(f"'{key}' is not Unicode text") from None
    return value


def _reason(error: Exception) -> str:
    """What is wrong with a line, without the line."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return repr(error)[:200]


def _lines(stream: BinaryIO, raw: BinaryIO, start: int) -> Iterator[Record]:
    for number, line in enumerate(stream, start=start + 1):
        yield Record(JSON, line, number, raw.tell())


def _json_documents(stream: BinaryIO, raw: BinaryIO, key: str) -> Iterator[Record]:
    """A .json file: JSON lines as many publish them, an array of objects, or one object."""
    first = stream.readline()
    if not first.lstrip(codecs.BOM_UTF8 + b" \t\r\n").startswith(b"["):
        if _is_json(first):
            yield Record(JSON, first, 1, raw.tell())
            yield from _lines(stream, raw, 1)
        else:
            whole = (first + stream.read()).removeprefix(codecs.BOM_UTF8)
            yield Record(JSON, whole, 1, raw.tell())
        return
    for number, value in _array_elements(_decoded(first, stream)):
        if isinstance(value, BadDocument):
            yield Record(BAD, str(value), number, raw.tell())
        elif isinstance(value, dict):
            yield Record(VALUE, value.get(key), number, raw.tell())
        else:
            yield Record(VALUE, value, number, raw.tell())


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _decoded(first: bytes, stream: BinaryIO) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    yield decoder.decode(first)
    while chunk := stream.read(CHUNK_BYTES):
        yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


def _array_elements(chunks: Iterator[str]) -> Iterator[tuple[int, object]]:
    """(line, value) of each element of an array that may be larger than the memory.

    After what is not JSON there is no telling where the next element begins: it ends there.
    """
    decoder = json.JSONDecoder()
    buffer, position, line, opened = "", 0, 1, False
    wanted = 0  # a long element is tried again only when the buffer has doubled
    for last, chunk in _with_last(chunks):
        buffer += chunk
        if len(buffer) < wanted and not last:
            continue
        while True:
            start = position
            while (
                start < len(buffer)
                and buffer[start] in " \t\r\n,["
                and (buffer[start] != "[" or not opened)
            ):
                opened = opened or buffer[start] == "["
                start += 1
            line += buffer.count("\n", position, start)
            position = start
            if position < len(buffer) and buffer[position] == "]":
                return
            try:
                value, end = decoder.raw_decode(buffer, position)
                if end == len(buffer) and not last:
                    raise ValueError  # a number may go on in the next chunk
            except RecursionError:
                yield line, BadDocument("nested too deeply; the rest of the array is skipped")
                return
            except ValueError:
                if last:
                    yield line, BadDocument(
                        "the array ends here, without a ']'"
                        if position == len(buffer)
                        else "not JSON; the rest of the array cannot be read"
                    )
                    return
                wanted = 2 * (len(buffer) - position)
                break
            yield line, value
            line += buffer.count("\n", position, end)
            position = end
        buffer, position = buffer[position:], 0


def _with_last(items: Iterator[str]) -> Iterator[tuple[bool, str]]:
    previous = None
    for item in items:
        if previous is not None:
            yield False, previous
        previous = item
    yield True, previous or ""


def _parquet_rows(path: Path, key: str) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(
            f"{path}: reading parquet needs pyarrow, which is not installed: "
            "pip install 'megatron-core[data]'."
        ) from error
    size = path.stat().st_size
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if key not in file.schema_arrow.names:
                raise UsageError(
                    f"{path} has no column '{key}'; it has {', '.join(file.schema_arrow.names)}. "
                    "Choose one with --json-key."
                )
            number, rows = 0, max(1, file.metadata.num_rows)
            for batch in file.iter_batches(PARQUET_ROWS, columns=[key]):
                for kind, value in _column_values(batch.column(0)):
                    number += 1
                    yield Record(kind, value, number, size * number // rows)
    except UsageError:
        raise
    except Exception as error:  # pyarrow has its own, and those of C++ and Python by turns
        reason = " ".join(str(error).split())[:200]
        yield Record(BAD, f"not a complete parquet file ({reason})", 0, size)


def _column_values(column) -> Iterator[tuple[str, object]]:
    """(kind of record, value) of each row; Arrow's strings need not be UTF-8."""
    try:
        for value in column.to_pylist():
            yield VALUE, value
        return
    except UnicodeDecodeError:
        pass  # raised before the first value
    for scalar in column:
        try:
            yield VALUE, scalar.as_py()
        except UnicodeDecodeError:
            yield BAD, "not UTF-8"


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A file's content unpacked, and the file itself, whose place says how far reading is."""
    with open(path, "rb") as raw:
        if path.suffix.lower() == ".gz":
            with gzip.open(raw) as stream:
                yield stream, raw
        elif path.suffix.lower() == ".zst":
            with io.BufferedReader(_ZstdFrames(raw, _zstandard(path)), CHUNK_BYTES) as stream:
                yield stream, raw
        else:
            yield raw, raw


class _ZstdFrames(io.RawIOBase):
    """The content of a file of zstd frames; zstandard's own reader takes a cut file for whole."""

    def __init__(self, raw: BinaryIO, zstandard):
        self._raw, self._new_frame = raw, zstandard.ZstdDecompressor().decompressobj
        self._frame, self._packed, self._content = None, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._content:
            self._packed = self._packed or self._raw.read(CHUNK_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ends inside a frame")
                return 0
            self._frame = self._frame or self._new_frame()
            self._content = self._frame.decompress(self._packed)
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count


def _zstandard(path: Path):
    try:
        import zstandard
    except ImportError as error:
        raise UsageError(
            f"{path}: unpacking .zst needs zstandard, which is not installed: "
            "pip install 'megatron-core[data]'."
        ) from error
    return zstandard


def _zstd_errors() -> tuple[type[Exception], ...]:
    try:
        import zstandard
    except ImportError:
        return ()
    return (zstandard.ZstdError,)
