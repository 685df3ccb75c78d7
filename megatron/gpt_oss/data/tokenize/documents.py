# Copyright (c) 2026, the megatron-core gptoss authors.

"""Read documents from jsonl, json, txt and parquet files, also compressed as .gz or .zst.

Only one document is in memory at a time. The slow parts, JSON parsing and UTF-8 decoding, are in
`text_of`, which runs in the worker processes.
"""

import codecs
import gzip
import io
import json
import os
import re
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Iterator

from megatron.gpt_oss.errors import UsageError

LINE_SUFFIXES = (".jsonl", ".ndjson")
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
PACKED_SUFFIXES = (".gz", ".zst")
# Files to read in a directory by default.
TEXT_PATTERNS = tuple(
    f"*{suffix}{packed}"
    for suffix in (*TEXT_SUFFIXES, *LINE_SUFFIXES, ".json")
    for packed in ("", *PACKED_SUFFIXES)
) + ("*.parquet",)
# Files of conversations, and the field that each conversation has.
CHAT_PATTERNS = tuple(
    f"*{suffix}{packed}"
    for suffix in (*LINE_SUFFIXES, ".json")
    for packed in ("", *PACKED_SUFFIXES)
) + ("*.parquet",)
CHAT_KEY = "messages"
CHUNK_BYTES = 1 << 20
PARQUET_ROWS = 128

JSON, TEXT, VALUE, BAD = "json", "text", "value", "bad"


class BadDocument(ValueError):
    """A document that cannot be read; the message says why."""


@dataclass(frozen=True)
class Record:
    """One document of a file.

    Attributes:
        kind: JSON: `raw` is a line of JSON. TEXT: `raw` is the content of a file. VALUE: `raw` is
            the text, or a value that is not a text. BAD: `raw` is the reason why reading failed.
        number: line, or row of a parquet file, from 1; 0 for a complete file.
        position: bytes of the file that were read up to the end of this document.
    """

    kind: str
    raw: object
    number: int
    position: int


def place_of(path: Path, number: int) -> str:
    """File and line of a record, for messages."""
    name = printable(path)
    if not number:
        return name
    return f"{name}, {'row' if format_of(path) == '.parquet' else 'line'} {number}"


def printable(path: str | Path) -> str:
    """A file name, which may be any bytes, as text that UTF-8 can encode."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def read_records(path: Path, key: str, complete: bool = False) -> Iterator[Record]:
    """Yield the records of a file; the extension determines the format.

    Args:
        path: .jsonl or .ndjson: one document per line. .json: lines, an array, or one object.
            .parquet: one document per row. Any other file is one document. .gz and .zst are
            decompressed.
        key: field or column that must exist; it holds the text.
        complete: a VALUE is the complete object or row, not only the field.
    Raises:
        UsageError: a package is missing, or a parquet file has no such column.
    """
    suffix = format_of(path)
    if suffix == ".parquet":
        yield from _parquet_rows(path, key, complete)
        return
    try:
        with _opened(path) as (stream, raw):
            if suffix in LINE_SUFFIXES:
                yield from _lines(stream, raw, 0)
            elif suffix == ".json":
                yield from _json_documents(stream, raw, key, complete)
            else:
                yield Record(TEXT, stream.read(), 0, os.fstat(raw.fileno()).st_size)
    except UnicodeDecodeError:
        yield Record(BAD, "not UTF-8; the rest is skipped", 0, path.stat().st_size)
    except (EOFError, zlib.error, gzip.BadGzipFile, *_zstd_errors()) as error:
        size = path.stat().st_size
        yield Record(BAD, f"incomplete, or not {path.suffix[1:].lower()} ({error})", 0, size)


def format_of(path: Path) -> str:
    """The extension of a file, without .gz or .zst."""
    path = Path(Path(path).name.lower())  # .JSONL is .jsonl
    return Path(path.stem).suffix if path.suffix in PACKED_SUFFIXES else path.suffix


def is_whole_text(path: Path) -> bool:
    """Whether a file is one plain-text document."""
    return format_of(path) not in (*LINE_SUFFIXES, ".json", ".parquet")


def text_of(record: Record, key: str) -> str:
    """The text of a record; '' or white space if the document is empty.

    Raises:
        BadDocument: the record has no valid text; says why.
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
    except UnicodeEncodeError:  # JSON can escape half of a surrogate pair
        raise BadDocument(f"'{key}' is not Unicode text") from None
    return value


def object_of(record: Record) -> object:
    """The complete object of a record; None for an empty line.

    Raises:
        BadDocument: the record is not JSON; says why.
    """
    if record.kind == BAD:
        raise BadDocument(record.raw)
    if record.kind == TEXT:
        raise BadDocument("a conversation is a line of .jsonl or .json, or a row of .parquet")
    if record.kind == VALUE:
        return record.raw
    try:
        return json.loads(record.raw) if record.raw.strip() else None
    except (ValueError, RecursionError) as error:
        raise BadDocument(f"not a JSON object ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    """What is wrong with a line, without its content."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return repr(error)[:200]


def _lines(stream: BinaryIO, raw: BinaryIO, start: int) -> Iterator[Record]:
    for number, line in enumerate(stream, start=start + 1):
        yield Record(JSON, line, number, raw.tell())


def _json_documents(stream: BinaryIO, raw: BinaryIO, key: str, complete: bool) -> Iterator[Record]:
    """The records of a .json file: JSON lines, an array of objects, or one object."""
    first = stream.readline()
    start = first.removeprefix(codecs.BOM_UTF8).lstrip(b" \t\r\n")
    if not start.startswith(b"["):
        if _is_json(first):
            yield Record(JSON, first, 1, raw.tell())
            yield from _lines(stream, raw, 1)
        else:
            whole = (first + stream.read()).removeprefix(codecs.BOM_UTF8)
            yield Record(JSON, whole, 1, raw.tell())
        return
    for number, value in _array_elements(_decoded(start[1:], stream)):
        if isinstance(value, BadDocument):
            yield Record(BAD, str(value), number, raw.tell())
        elif isinstance(value, dict) and not complete:
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
    decoder = codecs.getincrementaldecoder("utf-8")()
    yield decoder.decode(first)
    while chunk := stream.read(CHUNK_BYTES):
        yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


def _array_elements(chunks: Iterator[str]) -> Iterator[tuple[int, object]]:
    """Yield (line, value) of each element of an array that may be larger than the memory.

    Args:
        chunks: the text after the opening bracket.

    Reading stops at text that is not JSON, because the start of the next element is unknown.
    """
    text = _ArrayText(chunks)
    while True:
        text.skip_separator()
        if text.starts_with("]"):
            return
        line = text.line
        try:
            value = text.next_value()
        except BadDocument as error:
            yield line, error
            return
        yield line, value


_SEPARATOR = re.compile(r"[ \t\r\n,]*")


class _ArrayText:
    """The text of an array; only the current element and the chunk after it are in memory.

    Attributes:
        line: of the current position, from 1.
    """

    def __init__(self, chunks: Iterator[str]):
        self._chunks = chunks
        self._buffer, self._position, self.line, self._complete = "", 0, 1, False
        self._decoder = json.JSONDecoder()

    def skip_separator(self) -> None:
        """Skip white space and commas."""
        while True:
            self._advance(_SEPARATOR.match(self._buffer, self._position).end())
            if self._position < len(self._buffer) or not self._read(1):
                return

    def starts_with(self, character: str) -> bool:
        """Whether this character comes next."""
        return self._buffer.startswith(character, self._position)

    def next_value(self) -> object:
        """Parse an element.

        Raises:
            BadDocument: it is nested too deeply, not JSON, or the text ends.
        """
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._position)
                if end < len(self._buffer) or self._complete:
                    self._advance(end)
                    return value
                # A number may continue in the next chunk.
            except RecursionError:
                raise BadDocument("nested too deeply; the rest of the array is skipped") from None
            except ValueError:
                if self._complete:
                    raise BadDocument(
                        "the array ends here, without a ']'"
                        if self._position == len(self._buffer)
                        else "not JSON; the rest of the array cannot be read"
                    ) from None
            # Twice the text each time, so that a long element is parsed a few times only.
            self._read(len(self._buffer) - self._position)

    def _advance(self, position: int) -> None:
        self.line += self._buffer.count("\n", self._position, position)
        self._position = position

    def _read(self, count: int) -> bool:
        """Read at least `count` more characters; False at the end of the text."""
        parts = [self._buffer[self._position :]]
        missing = max(count, 1)
        while missing > 0:
            chunk = next(self._chunks, None)
            if chunk is None:
                self._complete = True
                break
            parts.append(chunk)
            missing -= len(chunk)
        self._buffer, self._position = "".join(parts), 0
        return len(parts) > 1


def _parquet_rows(path: Path, key: str, complete: bool) -> Iterator[Record]:
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
            for batch in file.iter_batches(PARQUET_ROWS, columns=None if complete else [key]):
                column = batch.to_struct_array() if complete else batch.column(0)
                for kind, value in _column_values(column):
                    number += 1
                    yield Record(kind, value, number, size * number // rows)
    except UsageError:
        raise
    except Exception as error:  # pyarrow raises errors of many types
        reason = " ".join(str(error).split())[:200]
        yield Record(BAD, f"not a complete parquet file ({reason})", 0, size)


def _column_values(column) -> Iterator[tuple[str, object]]:
    """(kind of record, value) of each row; an Arrow string may be invalid UTF-8."""
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
    """(decompressed stream, file); the position of the file shows the progress."""
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
    """Decompresses zstd frames; zstandard's reader does not detect a truncated file."""

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
