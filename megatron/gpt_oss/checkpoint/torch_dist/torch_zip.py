# Copyright (c) 2026, the megatron-core gptoss authors.

"""Where the bytes of a tensor lie in what torch.save wrote.

torch.load copies a tensor three times on its way out of a stream. A zip entry that is stored as it
is can be read to where it is wanted at once.
"""

import collections
import io
import os
import zipfile
from typing import Any

import torch

from megatron.core.dist_checkpointing.restricted_pickle import (
    RestrictedPickleError,
    load_restricted,
)

_DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
}
_LOCAL_HEADER = 30  # bytes of a zip entry's header before its name
_LARGEST_DESCRIPTION = 2**16  # a plain tensor has some 200 bytes


def find_tensor(
    fd: int, offset: int, length: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> int | None:
    """The first byte of a saved tensor's elements, in order and without a gap.

    Args:
        fd: of a file open for reading.
        offset: where in it the saved tensor begins.
        length: of what was saved, in bytes.
        dtype: of the tensor, as the caller knows it.
        shape: of the tensor, as the caller knows it.
    Returns:
        The place in the file. None if this is no single contiguous tensor of that dtype and shape,
        stored without compression: then it is for torch.load to say what it is.
    """
    try:
        archive = zipfile.ZipFile(io.BufferedReader(_Slice(fd, offset, length), 2**14))
        (name,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
        # Not by ZipFile.read: the checksum is 0 where torch.save was told to leave it out.
        description = archive.getinfo(name)
        size = min(description.file_size, _LARGEST_DESCRIPTION)
        text = os.pread(fd, size, _place(fd, offset, description))
        found = load_restricted(text, _find_class, lambda pid: (pid[1], pid[2]))
        entry = archive.getinfo(name.removesuffix("data.pkl") + "data/0")
        place = _place(fd, offset, entry)
    except Exception:  # zipfile has no error of its own for most of what may be wrong
        return None
    stride = torch.empty(shape, device="meta").stride()
    size = torch.Size(shape).numel() * dtype.itemsize
    if found != (dtype, 0, tuple(shape), stride, "0") or entry.file_size != size:
        return None
    return place


def _place(fd: int, offset: int, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of an entry lie in the file, that of the archive being `offset`."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise NotImplementedError(f"{entry.filename} is compressed")
    start = offset + entry.header_offset
    header = os.pread(fd, _LOCAL_HEADER, start)
    name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    return start + _LOCAL_HEADER + name + extra


def _find_class(module: str, name: str) -> Any:
    """What is left of a plain tensor: (dtype, offset, size, stride, storage). See `_describe`."""
    if module == "torch" and name in _DTYPES:
        return _DTYPES[name]
    if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
        return _describe
    if (module, name) == ("collections", "OrderedDict"):
        return collections.OrderedDict
    raise RestrictedPickleError(f"{module}.{name} is not of a plain tensor")


def _describe(storage: tuple, offset: int, size: tuple, stride: tuple, *_: Any) -> tuple:
    return storage[0], offset, tuple(size), tuple(stride), storage[1]


class _Slice(io.RawIOBase):
    """A part of a file as a file, with a position of its own."""

    def __init__(self, fd: int, offset: int, length: int):
        super().__init__()
        self._fd, self._offset, self._length, self._at = fd, offset, length, 0

    def readable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def seekable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """See `io.RawIOBase`."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("before the beginning")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        """See `io.RawIOBase`."""
        return self._at

    def readinto(self, buffer) -> int:
        """See `io.RawIOBase`."""
        count = max(min(len(buffer), self._length - self._at), 0)
        count = os.preadv(self._fd, [memoryview(buffer)[:count]], self._offset + self._at)
        self._at += count
        return count
