# Copyright (c) 2026, the megatron-core gptoss authors.

"""The file offset of a tensor that torch.save wrote.

With it a part of a tensor is read directly into its destination. torch.load reads the complete
tensor and copies it three times; export of a checkpoint whose embedding is one shard took 4.4 times
as long with it.
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
_LARGEST_PICKLE = 2**16  # that of a plain tensor has about 200 bytes


def find_tensor(
    fd: int, offset: int, length: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> int | None:
    """Find the file offset of the elements of a saved contiguous tensor.

    Args:
        fd: of a file open for reading.
        offset: first byte of the output of torch.save.
        length: of the output of torch.save, in bytes.
        dtype: expected dtype.
        shape: expected shape.
    Returns:
        The offset. None unless the file holds a single contiguous tensor of that dtype and shape
        without compression; use torch.load then.
    """
    try:
        archive = zipfile.ZipFile(io.BufferedReader(_Slice(fd, offset, length), 2**14))
        (name,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
        # ZipFile.read would check the CRC32, which is 0 if torch.save ran without checksums.
        description = archive.getinfo(name)
        size = min(description.file_size, _LARGEST_PICKLE)
        text = os.pread(fd, size, _place(fd, offset, description))
        found = load_restricted(text, _find_class, lambda pid: (pid[1], pid[2]))
        entry = archive.getinfo(name.removesuffix("data.pkl") + "data/0")
        place = _place(fd, offset, entry)
    except Exception:  # zipfile raises errors of many types for damaged files
        return None
    stride = torch.empty(shape, device="meta").stride()
    size = torch.Size(shape).numel() * dtype.itemsize
    if found != (dtype, 0, tuple(shape), stride, "0") or entry.file_size != size:
        return None
    return place


def _place(fd: int, offset: int, entry: zipfile.ZipInfo) -> int:
    """File offset of the contents of an entry of the archive at `offset`."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise NotImplementedError(f"{entry.filename} is compressed")
    start = offset + entry.header_offset
    header = os.pread(fd, _LOCAL_HEADER, start)
    name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    return start + _LOCAL_HEADER + name + extra


def _find_class(module: str, name: str) -> Any:
    """Map the classes of a plain tensor so that it unpickles to the tuple of `_describe`."""
    if module == "torch" and name in _DTYPES:
        return _DTYPES[name]
    if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
        return _describe
    if (module, name) == ("collections", "OrderedDict"):
        return collections.OrderedDict
    raise RestrictedPickleError(f"{module}.{name} is not of a plain tensor")


def _describe(storage: tuple, offset: int, size: tuple, stride: tuple, *_: Any) -> tuple:
    """(dtype, offset in the storage, size, stride, key of the storage)."""
    return storage[0], offset, tuple(size), tuple(stride), storage[1]


class _Slice(io.RawIOBase):
    """A byte range of a file as a file object."""

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
