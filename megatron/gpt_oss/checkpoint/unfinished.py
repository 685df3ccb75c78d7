# Copyright (c) 2026, the megatron-core gptoss authors.

"""An output folder that appears when it is whole, and work on it that goes on after a kill.

The work is done in `.NAME.partial` beside the folder, where a journal names what is finished; the
same command finds it there. The folder gets its name in one step, at the end.
"""

import errno
import fcntl
import json
import os
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from megatron.gpt_oss.checkpoint.hf_config import CONFIG_NAME
from megatron.gpt_oss.errors import UsageError

_JOURNAL = "conversion.jsonl"
# What file systems and small files take beyond the bytes of the tensors.
_RESERVE = 64 * 2**20
_MOST_IN_MEMORY = 256 * 2**20


class Unfinished:
    """The folder in work.

    Attributes:
        folder: where to write.
        done: what `finish` recorded, by file name; also by an earlier process.
    """

    def __init__(self, folder: Path, task: dict):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="to-disk")
        self._pending: list[Future] = []
        self._in_memory = 0
        # Opened in append mode, so that a lock held by another process loses nothing.
        self._journal = open(folder / _JOURNAL, "a+", encoding="utf-8")
        try:
            self._lock()
            self.done = self._read(task)
            if not self.done:
                self._remove_remains()
                self._journal.truncate(0)
                self._append({"task": task})
        except BaseException:
            self._journal.close()
            raise

    def finish(self, file: str, record: dict | None = None) -> None:
        """Bring a written file to disk and then record it as done, in a thread.

        The next file is computed meanwhile; `wait` tells of errors.
        """
        self._pending.append(self._thread.submit(self._finish, file, record or {}))

    def written(self, file: str, count: int) -> None:
        """Count bytes of a file that is being written; from time to time they are brought to disk.

        By itself Linux begins with that when a tenth of the memory waits; the disk has nothing to
        do until then.
        """
        self._in_memory += count
        if self._in_memory >= _MOST_IN_MEMORY and (self.folder / file).exists():
            self._in_memory = 0
            self._pending.append(self._thread.submit(_to_disk, self.folder / file))

    def wait(self) -> None:
        """Return when every file of `finish` is on disk and recorded."""
        while self._pending:
            self._pending.pop(0).result()

    def _finish(self, file: str, record: dict) -> None:
        size = _to_disk(self.folder / file)
        record = {"file": file, "size": size, **record}
        self._append(record)
        self.done[file] = record

    def bytes_done(self) -> int:
        """Size of the finished files."""
        return sum(record["size"] for record in self.done.values())

    def close(self, remove_journal: bool = False) -> None:
        """Let another process at the folder."""
        self._thread.shutdown()
        if remove_journal:
            (self.folder / _JOURNAL).unlink()
        self._journal.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"Another process is writing {self.folder}. Wait for it, or give another --out."
            ) from error

    def _read(self, task: dict) -> dict[str, dict]:
        """The finished files of an earlier process that did the same."""
        self._journal.seek(0)
        records = []
        for line in self._journal.read().splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:  # the line that was being written when the process was killed
                break
        if len(records) < 2:
            return {}
        before = records[0]["task"]
        now = json.loads(json.dumps(task))  # tuples as the lists that they become
        if before != now:
            differ = [key for key in {**before, **now} if before.get(key) != now.get(key)]
            raise UsageError(
                f"{self.folder} is an unfinished conversion with another {', '.join(differ)}. "
                "Finish it with the arguments that it was begun with, or remove that folder."
            )
        return {
            record["file"]: record
            for record in records[1:]
            if (self.folder / record["file"]).is_file()
            and (self.folder / record["file"]).stat().st_size == record["size"]
        }

    def _remove_remains(self) -> None:
        """What an earlier process left, perhaps of another task, without finishing one file."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _JOURNAL:
                path.unlink()

    def _append(self, record: dict) -> None:
        self._journal.write(json.dumps(record) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())


def _to_disk(path: Path) -> int:
    """Return the size of a file when all that has been written of it is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        if hasattr(os, "posix_fadvise"):
            # What is on disk takes the place of other files no longer, and its memory is written
            # to again: half of the system's time, where fresh memory has to be fetched from a host.
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        return os.fstat(handle).st_size
    finally:
        os.close(handle)


@contextmanager
def unfinished(out: Path, task: dict, needed: int, overwrite: bool = False) -> Iterator[Unfinished]:
    """Write a folder that does not exist yet, or is empty.

    Args:
        out: the folder.
        task: what makes the result what it is (source, layout, ...); work that another task began
            is not gone on with.
        needed: bytes that the folder will have.
        overwrite: `out` may be a model folder; it is replaced once the new one is whole.
    Raises:
        UsageError: `out` is not empty, the disk has no room, or another process or task has it.
    """
    out = Path(out)
    replaced = overwrite and (out / CONFIG_NAME).is_file()
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not replaced:
        raise UsageError(
            f"{out} exists and is not empty. Name a new folder, or remove this one"
            + (", which is not a model folder." if overwrite else ", or give --overwrite.")
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Unfinished(out.parent / f".{out.name}.partial", task)
    try:
        check_space(out, needed - work.bytes_done())
        yield work
        work.wait()
        work.close(remove_journal=True)
        if replaced:
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
            os.replace(out, old)
            os.replace(work.folder, out)
            shutil.rmtree(old)
        else:
            os.replace(work.folder, out)
    except BaseException as error:
        work.close()  # with what is on its way to disk
        kept = bool(work.done)
        if not kept:
            shutil.rmtree(work.folder, ignore_errors=True)
        if _is_no_space(error):
            raise UsageError(
                f"No space left on the disk of {out} after {len(work.done)} files "
                f"({gigabytes(work.bytes_done())} of {gigabytes(needed)}). "
                + (f"They stay in {work.folder}: make room and run the same again." if kept else "")
            ) from error
        if kept and isinstance(error, UsageError):
            raise type(error)(
                f"{error} What is done stays in {work.folder}: the same command goes on from there."
            ) from error
        raise


def check_space(out: Path, needed: int) -> None:
    """Refuse work that the disk has no room for.

    Raises:
        UsageError: says what is needed and what is free.
    """
    free = free_space(out)
    if free < needed + _RESERVE:
        raise UsageError(
            f"{out} needs {gigabytes(needed + _RESERVE)} on disk, {gigabytes(free)} are free. "
            "Make room, or give an --out on another disk."
        )


def free_space(path: Path) -> int:
    """Bytes free on the disk of a path that need not exist yet."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def gigabytes(count: float) -> str:
    """A number of bytes for the reader."""
    return f"{count / 1e9:.2f} GB"


def fingerprint(files: list[Path]) -> list:
    """Name, size and time of files: what tells that they are still the same."""
    stats = [(path.name, path.stat()) for path in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _is_no_space(error: BaseException | None) -> bool:
    """Whether an error comes of a full disk; torch.save wraps it in one of its own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False
