# Copyright (c) 2026, the megatron-core gptoss authors.

"""JSON from a file that anybody may have written: a value, or one short sentence on what is wrong.

Python's own reader ends in a RecursionError on deep nesting, and its errors may carry the whole
text. Imports neither torch nor Megatron.
"""

import errno
import json
import os
import reprlib
import stat
from pathlib import Path
from typing import Any

from megatron.gpt_oss.errors import UsageError

# Empty lists written out take 20 times their text in memory. No file of settings or names has a
# tenth of this.
LARGEST_FILE = 16 * 2**20
_LONGEST_SHOWN = 80
_KINDS = {dict: "object", list: "array"}


def parse_json(text: str | bytes, unique: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        text: bytes are UTF-8, with or without a byte order mark.
        unique: refuse an object that has a key twice, of which Python keeps the last value.
    Raises:
        ValueError: a few words on what is wrong and where; never the text itself.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 at byte {error.start}") from None
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates if unique else None)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(str(error)) from None


def read_small_file(path: str | Path) -> bytes:
    """The content of a file of settings or names, at most `LARGEST_FILE` bytes.

    Raises:
        OSError: it cannot be read, or is larger, or a named pipe, in which nobody may write.
    """
    if stat.S_ISFIFO(os.stat(path).st_mode) and not os.fspath(path).startswith("/dev/fd/"):
        raise OSError(errno.EINVAL, "It is a named pipe", str(path))
    with open(path, "rb") as stream:
        data = stream.read(LARGEST_FILE + 1)
    if len(data) > LARGEST_FILE:
        raise OSError(errno.EFBIG, f"It is larger than {LARGEST_FILE >> 20} MB", str(path))
    return data


def read_json(
    path: str | Path,
    kind: type = dict,
    error: type[UsageError] = UsageError,
    hint: str = "Restore it, or recreate it.",
) -> Any:
    """The value that a JSON file holds.

    Args:
        path: the file, which exists.
        kind: dict or list, that the value must be.
        error: the class to raise.
        hint: the last sentence of the message.
    Raises:
        UsageError: of the class `error`; names the file and what is wrong with it.
    """
    try:
        data = read_small_file(path)
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror}. {hint}") from cause
    try:
        value = parse_json(data)
    except ValueError as cause:
        raise error(f"{path} is not valid JSON ({cause}). {hint}") from cause
    if not isinstance(value, kind):
        raise error(f"{path} is not a JSON {_KINDS[kind]} but {brief(value)}. {hint}")
    return value


def brief(value: Any) -> str:
    """A value as a message shows it: one line, at most 80 characters."""
    text = _REPR.repr(value).replace("\n", " ")
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "..."


class _Repr(reprlib.Repr):
    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxlong = 3, 60, 60, 40

    def repr_int(self, value: int, level: int) -> str:
        """Python refuses to write integers of more than 4300 digits."""
        if value.bit_length() > 4096:
            return f"an integer of {value.bit_length()} bits"
        return super().repr_int(value, level)


_REPR = _Repr()


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {brief(twice)} is duplicated")
    return found
