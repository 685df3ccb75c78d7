# Copyright (c) 2026, the megatron-core gptoss authors.

"""Hashes of the bytes of a shard, computed during the write and checked during the read.

NAME.distcp.xxh3 holds the hashes of the shard NAME.distcp: one XXH3 (128 bits) of each BLOCK bytes.
Hashes are of blocks, not of tensors: a rank of another layout and a conversion read parts of
tensors, and check only the blocks that hold these parts. manifest.json has the SHA-256 of the small
file of hashes.
"""

import contextlib
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Dict, Iterator, List, Optional, Set, Tuple

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import FileSystem

try:
    import xxhash
except ImportError:  # without it shards get no hashes and are not checked
    xxhash = None

SUFFIX = ".xxh3"
BLOCK = 4 * 2**20
VERSION = 1
# Bytes that are read and then hashed; small enough to stay in the cache of a core.
_CHUNK = 2**19
# Smaller writes are hashed without a thread, whose start would cost more than the hash.
_MIN_SIZE_FOR_THREAD = 2**20
_buffers = threading.local()


class DamagedShard(RuntimeError):
    """The bytes of a shard differ from those that were written.

    Args:
        directory: directory of the checkpoint.
        what: a sentence about the shard.
    """

    def __init__(self, directory: str, what: str):
        super().__init__(directory, what)  # both arguments: other ranks receive it pickled
        self.directory, self.what = directory, what

    def __str__(self) -> str:
        return self.what


class HashingFile:
    """A shard that is written sequentially; `close` writes the file of its hashes.

    Args:
        path: path of the shard.
    """

    def __init__(self, path: str):
        self._path = path
        self._hashes: List[str] = []
        self._block = xxhash.xxh3_128()
        self._filled = 0
        self._file = open(path, "wb")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hashes")

    def write(self, data) -> int:
        """See `io.BufferedWriter`; `data` is any contiguous buffer."""
        view = memoryview(data).cast("B")
        if len(view) < _MIN_SIZE_FOR_THREAD:
            self._update(view)
            self._file.write(view)
        else:  # both release the GIL
            hashed = self._thread.submit(self._update, view)
            try:
                self._file.write(view)
            finally:
                hashed.result()
        return len(view)

    def _update(self, view: memoryview) -> None:
        for start, stop in _split_at_blocks(len(view), BLOCK - self._filled):
            self._block.update(view[start:stop])
            self._filled += stop - start
            if self._filled == BLOCK:
                self._end_block()

    def tell(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def flush(self) -> None:
        """See `io.BufferedWriter`."""
        self._file.flush()

    def fileno(self) -> int:
        """File descriptor of the shard."""
        return self._file.fileno()

    def close(self) -> None:
        """Close the shard, and write its hashes to disk."""
        if self._file.closed:
            return
        self._thread.shutdown()
        self._file.close()
        if self._filled:
            self._end_block()
        text = json.dumps({"version": VERSION, "block": BLOCK, "xxh3_128": self._hashes})
        with open(self._path + SUFFIX, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def __enter__(self) -> "HashingFile":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.close()
        else:
            self._thread.shutdown()
            self._file.close()

    def _end_block(self) -> None:
        self._hashes.append(self._block.hexdigest())
        self._block = xxhash.xxh3_128()
        self._filled = 0


def open_shard(path: str, mode: str = "wb") -> IO[bytes]:
    """Open a shard for writing; with hashes if xxhash is installed."""
    return open(path, mode) if xxhash is None else HashingFile(os.fspath(path))


class HashingFileSystem(FileSystem):
    """File system of torch's FileSystemWriter that writes shards (.distcp) with hashes."""

    def create_stream(self, path, mode):
        """See `FileSystem`."""
        if mode == "wb" and str(path).endswith(".distcp"):
            return open_shard(path)
        return super().create_stream(path, mode)


class BlockHashes:
    """Hashes of the shards of a checkpoint; each block is checked once. Thread-safe.

    Args:
        directory: directory of one iteration.
    """

    def __init__(self, directory):
        self._directory = Path(directory)
        self._lock = threading.Lock()
        self._known: Dict[str, Tuple[int, Optional[List[str]]]] = {}
        self._checked: Set[Tuple[str, int]] = set()

    def check(self, name: str, offset: int, length: int) -> None:
        """Check the blocks that hold a part of a shard. A shard without hashes is not checked.

        Args:
            name: path of the shard, relative to the directory.
            offset: offset of the part, in bytes.
            length: length of the part, in bytes.
        Raises:
            DamagedShard: the hash of a block differs; names the shard and the bytes.
        """
        with self._lock:
            if name not in self._known:
                self._known[name] = _read_hashes(self._directory, name + SUFFIX)
        block, hashes = self._known[name]
        if hashes is None or length <= 0:
            return
        numbers = range(offset // block, (offset + length - 1) // block + 1)
        with self._lock:
            numbers = [number for number in numbers if (name, number) not in self._checked]
            self._checked.update((name, number) for number in numbers)
        if not numbers:
            return
        with open(self._directory / name, "rb", buffering=0) as file:
            for number in numbers:
                size, found = _hash_of(file.fileno(), number * block, block)
                wanted = hashes[number] if number < len(hashes) else None
                if wanted != found:
                    with self._lock:
                        self._checked.discard((name, number))
                    last = number * block + max(size, 1) - 1
                    raise DamagedShard(
                        str(self._directory),
                        f"bytes {number * block} to {last} of {name} differ from what was saved "
                        "(XXH3).",
                    )


def _hash_of(file: int, offset: int, length: int) -> Tuple[int, str]:
    """Number of bytes at `offset`, at most `length`, and their hash.

    Each thread keeps its buffer: for a new one the kernel would clear as many pages.
    """
    if not hasattr(_buffers, "chunk"):
        _buffers.chunk = memoryview(bytearray(_CHUNK))
    block, done = xxhash.xxh3_128(), 0
    while done < length:
        count = os.preadv(file, [_buffers.chunk[: length - done]], offset + done)
        if not count:
            break
        block.update(_buffers.chunk[:count])
        done += count
    return done, block.hexdigest()


def _read_hashes(directory: Path, name: str) -> Tuple[int, Optional[List[str]]]:
    """Block size and hashes; None if the shard has no hashes, or xxhash is not installed."""
    try:
        text = (directory / name).read_text()
    except FileNotFoundError:
        return BLOCK, None
    if xxhash is None:
        return BLOCK, None
    try:
        found = json.loads(text)
        version, block, hashes = found["version"], found["block"], found["xxh3_128"]
        valid = isinstance(block, int) and block > 0 and isinstance(hashes, list)
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedShard(
            str(directory), f"{name} is damaged ({type(error).__name__})."
        ) from error
    if version != VERSION:
        what = f"{name} has the unsupported version {version}."
        raise DamagedShard(str(directory), what)
    if not valid:
        raise DamagedShard(str(directory), f"{name} is damaged.")
    return block, hashes


class CheckedFileSystemReader(FileSystemReader):
    """Reads the items of a rank's plan, and checks their blocks in another thread.

    `read_data` raises DamagedShard if a block differs from the one that was written.
    """

    def __init__(self, path, *args, **kwargs):
        super().__init__(path, *args, **kwargs)
        self.hashes = BlockHashes(self.path)

    def reset(self, checkpoint_id=None) -> None:
        """See `StorageReader`."""
        super().reset(checkpoint_id)
        self.hashes = BlockHashes(self.path)

    def read_data(self, plan, planner):
        """See `StorageReader`."""
        places = [self.storage_data[item.storage_index] for item in plan.items]
        places.sort(key=lambda place: (place.relative_path, place.offset))
        # One: it is faster than the load, and more would take cores from it.
        with ThreadPoolExecutor(1, thread_name_prefix="hashes") as thread:
            checks = [
                thread.submit(self.hashes.check, place.relative_path, place.offset, place.length)
                for place in places
            ]
            found, failure = None, None
            try:
                found = super().read_data(plan, planner)
            except Exception as error:
                failure = error
            # A failed check names the cause; the error of torch.load is a consequence.
            failure = next(filter(None, (check.exception() for check in checks)), failure)
        if _collective_reads:
            failure = _failure_of_any_rank(failure)
        if failure is not None:
            raise failure
        return found


_collective_reads = False


@contextlib.contextmanager
def collective_reads() -> Iterator[None]:
    """Context in which every rank makes the same reads, and a read that fails on one fails on all.

    Megatron reads without collectives (no_dist=True): a rank whose read succeeds would wait in the
    next collective while another rank restarts the load.
    """
    global _collective_reads
    before, _collective_reads = _collective_reads, True
    try:
        yield
    finally:
        _collective_reads = before


def _failure_of_any_rank(failure: Optional[Exception]) -> Optional[Exception]:
    """The failure of any rank; DamagedShard before other errors, so that all ranks do the same."""
    if not torch.distributed.is_initialized():
        return failure
    mine = failure
    if not isinstance(failure, (DamagedShard, type(None))):
        mine = " ".join(f"{type(failure).__name__}: {failure}".split())[:500]
    failures: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(failures, mine)
    if damages := [found for found in failures if isinstance(found, DamagedShard)]:
        return damages[0]
    others = [f"rank {rank}: {found}" for rank, found in enumerate(failures) if found]
    return failure or (RuntimeError("; ".join(others[:4])) if others else None)


def _split_at_blocks(length: int, first: int) -> List[Tuple[int, int]]:
    """(start, stop) of the parts of a buffer: the first has `first` bytes, the others BLOCK."""
    edges = [0, *range(min(first, length), length, BLOCK), length]
    return [(start, stop) for start, stop in zip(edges, edges[1:]) if stop > start]
