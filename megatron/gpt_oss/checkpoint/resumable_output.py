# Copyright (c) 2026, the megatron-core gptoss authors.

"""An output directory that appears when it is complete and resumes after a kill.

Files are written to `.NAME.partial` next to the directory, or to `.gptoss.partial` inside a
directory that exists (a mount point cannot be renamed). A journal there lists the finished files,
and the same command resumes from it. When all files are finished, a record lists them (see
`outputs.py`). Then the directory is renamed, or its files are moved into the existing directory one
by one, those last without which it is not a checkpoint. If a kill interrupts this, the next start
continues.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Collection, Iterable, Iterator

from megatron.core.dist_checkpointing.checkpoint_names import TRACKER
from megatron.gpt_oss.checkpoint.hf.config import CONFIG_NAME
from megatron.gpt_oss.errors import UsageError, as_os_sentence, os_error_in
from megatron.gpt_oss.json_file import parse_json
from megatron.gpt_oss.outputs import (
    RECORD,
    check_apart,
    files_in,
    foreign_file,
    lock_file,
    move_file,
    naming,
    real_path,
    record_of,
    remove_files,
    sync_to_disk,
    write_record,
)

TO_HF, TO_MEGATRON = "gptoss convert to-hf", "gptoss convert to-megatron"
_JOURNAL = "conversion.jsonl"
_INSIDE = ".gptoss.partial"
# Without these files a directory is not a checkpoint: removed first, moved last.
_MARKER_FILES = (CONFIG_NAME, TRACKER)
# Disk space for small files and the file system, in addition to the tensors.
_RESERVE = 64 * 2**20
_MAX_IN_MEMORY = 256 * 2**20


class ResumableOutput:
    """The partial directory of an output.

    Args:
        directory: the partial directory; it is created if necessary.
        task: everything that determines the output.
        names: relative paths of all files of the task; other files in the directory are an error.
            None: the files in the journal, and nothing is removed.
        made_by: the command.
        out: the final directory, which may have some files already.
    Attributes:
        directory: the partial directory.
        done: {file name: record of `finish`}, including those of an earlier process.
        complete: all files are written; only the final name is missing.
    Raises:
        UsageError: the directory is a link, has files of others, or belongs to another process or
            task.
    """

    def __init__(
        self,
        directory: Path,
        task: dict,
        names: Collection[str] | None = None,
        made_by: str = "gptoss convert",
        out: Path | None = None,
    ):
        self.directory = directory
        self._names = None if names is None else set(names)
        self._made_by = made_by
        self.digest = _digest(task)
        self._check_owned()
        with naming(directory):
            directory.mkdir(parents=True, exist_ok=True)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="to-disk")
        self._pending: list[Future] = []
        self._in_memory = 0
        # Append mode, so that opening does not change the journal of another process.
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        handle = os.open(directory / _JOURNAL, flags, 0o666)
        self._journal = open(handle, "a+", encoding="utf-8")
        locked = False
        try:
            lock_file(
                self._journal,
                f"Another process is writing {directory}. Wait for it, or name another output "
                "directory.",
            )
            locked = True
            self.done = self._read(task)
            self.complete = self._is_complete(out)
            if not self.done and not self.complete:
                self._remove_leftovers()
                self._journal.truncate(0)
                self._append({"task": task, "names": sorted(self._names or ())})
        except BaseException:
            with contextlib.suppress(OSError):  # the disk is full
                self._journal.close()
            if locked and not files_in(directory, (_JOURNAL,)):
                remove_files(directory, [_JOURNAL])
                directory.rmdir()
            raise

    def _is_complete(self, out: Path | None) -> bool:
        """Whether an earlier process wrote all files; some may be in `out` already."""
        record = record_of(self.directory, self._made_by)
        if not record:
            return False
        if record.get("task") != self.digest:
            raise UsageError(
                f"{self.directory} is the complete output of a run with other arguments, but was "
                "not renamed. Rename it, or remove it."
            )
        places = [self.directory] + ([out] if out is not None else [])
        return all(any((p / name).is_file() for p in places) for name in record["files"])

    def _check_owned(self) -> None:
        if self.directory.is_symlink():
            raise UsageError(
                f"{self.directory} is a symbolic link; the unfinished output would go to its "
                "target. Remove the link, or name another output directory."
            )
        if not os.path.lexists(self.directory):
            return
        if not self.directory.is_dir():
            raise UsageError(
                f"{self.directory} is a file, but the unfinished output needs a directory of that "
                "name. Move the file away, or name another output directory."
            )
        found = files_in(self.directory, ())
        allowed = {_JOURNAL, RECORD} | (self._names or set())
        if _JOURNAL in found or RECORD in found:
            allowed |= self._named_by_journal()
        else:
            allowed = set()
        for name in found:
            temporary = name.endswith((".tmp", ".new"))  # of an interrupted write
            if name not in allowed and not (temporary and allowed):
                self._reject(name)
            if (self.directory / name).is_symlink():
                self._reject(name)

    def _reject(self, name: str) -> None:
        raise UsageError(
            f"{self.directory / name} is not a file of an unfinished conversion, and "
            f"{self.directory} is reserved for one. Move it away, or name another output directory."
        )

    def _named_by_journal(self) -> set[str]:
        """The files in the journal of an earlier process; `_read` checks the task later."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            lines = (self.directory / _JOURNAL).read_text(encoding="utf-8").splitlines()
            records = [json.loads(line) for line in lines if line.endswith("}")]
            files = {record["file"] for record in records if "file" in record}
            planned = next(iter(records), {}).get("names", [])
            return {name for name in (*files, *planned) if isinstance(name, str)}
        return set()

    def finish(self, file: str, record: dict | None = None) -> None:
        """Sync a written file to disk and record it as finished, in a background thread.

        `wait` raises its errors.
        """
        self._pending.append(self._thread.submit(self._finish, file, record or {}))

    def written(self, file: str, count: int) -> None:
        """Count bytes that were written to a file; sync it in the background every 256 MB.

        Linux starts the write-back only when a tenth of the memory is dirty.
        """
        self._in_memory += count
        if self._in_memory >= _MAX_IN_MEMORY and (self.directory / file).exists():
            self._in_memory = 0
            self._pending.append(self._thread.submit(_sync_and_release, self.directory / file))

    def wait(self) -> None:
        """Wait until every file of `finish` is on disk and recorded."""
        while self._pending:
            self._pending.pop(0).result()

    def _finish(self, file: str, record: dict) -> None:
        size = _sync_and_release(self.directory / file)
        record = {"file": file, "size": size, **record}
        self._append(record)
        self.done[file] = record

    def bytes_done(self) -> int:
        """Size of the finished files."""
        return sum(record["size"] for record in self.done.values())

    def close(self) -> None:
        """Close the journal, which releases the lock."""
        self._thread.shutdown()
        self._journal.close()

    def remove(self) -> None:
        """Remove the files of this task, and the directory if it is empty then."""
        self._remove_leftovers()
        remove_files(self.directory, [_JOURNAL, RECORD])
        with contextlib.suppress(OSError):
            self.directory.rmdir()

    def complete_with_record(self) -> None:
        """Write the record of all files; only the final name is missing then."""
        if not self.complete:
            write_record(self.directory, self._made_by, self.digest, (_JOURNAL,))
            self.complete = True

    def publish(self, out: Path, replaced: Collection[str] = ()) -> None:
        """Rename the complete directory, or move its files into an existing one.

        Args:
            out: the final directory.
            replaced: files of an earlier output there, which are removed.
        """
        if not out.exists():
            (self.directory / _JOURNAL).unlink()
            try:
                with naming(out):
                    os.rename(self.directory, out)
                return
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EBUSY, errno.ENOTEMPTY, errno.EEXIST):
                    raise
            out.mkdir(exist_ok=True)
        new = files_in(self.directory, (_JOURNAL,))
        remove_files(out, [name for name in _MARKER_FILES if name in replaced])
        remove_files(out, sorted(set(replaced) - set(new) - {RECORD}))
        for name in sorted(new, key=_publish_order):
            with naming(out / name):
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                move_file(self.directory / name, out / name)
        remove_files(self.directory, [_JOURNAL])
        for parent, _, _ in os.walk(self.directory, topdown=False):
            os.rmdir(parent)

    def _read(self, task: dict) -> dict[str, dict]:
        """The finished files of an earlier process with the same task."""
        records = _complete_records(self.directory / _JOURNAL)
        if len(records) < 2:
            return {}
        before = records[0]["task"]
        now = json.loads(json.dumps(task))  # tuples become lists
        if before != now:
            differ = [key for key in {**before, **now} if before.get(key) != now.get(key)]
            raise UsageError(
                f"{self.directory} is an unfinished conversion with another {', '.join(differ)}. "
                "Finish it with its original arguments, or remove that directory."
            )
        return {
            record["file"]: record
            for record in records[1:]
            if (self.directory / record["file"]).is_file()
            and (self.directory / record["file"]).stat().st_size == record["size"]
        }

    def _remove_leftovers(self) -> None:
        """Remove files of an earlier process that finished none; `_check_owned` checked them."""
        remove_files(
            self.directory, [n for n in files_in(self.directory, (RECORD,)) if n != _JOURNAL]
        )
        remove_files(self.directory, [RECORD])

    def _append(self, record: dict) -> None:
        with naming(self.directory / _JOURNAL):
            self._journal.write(json.dumps(record) + "\n")
            sync_to_disk(self._journal)


def _publish_order(name: str) -> tuple[bool, bool, str]:
    """Sort key: marker files after all others, the record last."""
    return (name == RECORD, name in _MARKER_FILES, name)


def _digest(task: dict) -> str:
    return hashlib.sha256(json.dumps(task, sort_keys=True).encode()).hexdigest()


def _complete_records(path: Path) -> list[dict]:
    """The records of a journal up to the first invalid line, which a kill may have truncated."""
    records: list[dict] = []
    for line in path.read_bytes().split(b"\n"):
        try:
            record = parse_json(line)
        except ValueError:
            break
        kinds = {"file": str, "size": int} if records else {"task": dict}
        if not isinstance(record, dict) or any(
            type(record.get(name)) is not kind for name, kind in kinds.items()
        ):
            break
        if records and (".." in Path(record["file"]).parts or os.path.isabs(record["file"])):
            break
        records.append(record)
    return records


def _sync_and_release(path: Path) -> int:
    """Sync a file to disk and return its size."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        if hasattr(os, "posix_fadvise"):
            # Free its page cache for other files and for the next writes. Where a hypervisor has to
            # provide fresh pages, this halves the system time.
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        return os.fstat(handle).st_size
    finally:
        os.close(handle)


@contextmanager
def open_output(
    out: Path,
    task: dict,
    needed: int,
    overwrite: bool = False,
    names: Collection[str] | None = None,
    made_by: str = "gptoss convert",
    inputs: Iterable[str | Path] = (),
) -> Iterator[ResumableOutput]:
    """Write an output directory that does not exist or is empty; a link to one is followed.

    Args:
        out: the final directory.
        task: everything that determines the output (source, layout, ...); the files of another task
            are not resumed.
        needed: size of the output in bytes.
        overwrite: replace an earlier output of `made_by` once the new one is complete. `out` must
            not have other files.
        names: see `ResumableOutput`.
        made_by: the command.
        inputs: files and directories that the command reads.
    Yields:
        The output; if it is `complete`, an earlier process wrote all files.
    Raises:
        UsageError: `out` is not empty or not writable, the disk has not enough space, or another
            process or task uses it.
    """
    shown, out = Path(out), real_path(out, "The output directory")
    check_apart([out], inputs, "The output directory")
    place = _place(out)
    _check_out(shown, out, place, overwrite, made_by, task)
    work = ResumableOutput(place, task, names, made_by, out)
    try:
        if not work.complete:
            check_space(place, needed - work.bytes_done(), shown)
        yield work
        work.wait()
        work.complete_with_record()
        # Check again: another process may have written there during the conversion.
        work.publish(out, _check_out(shown, out, place, overwrite, made_by, task))
        work.close()
    except BaseException as error:
        work.close()  # waits for the background thread
        kept = bool(work.done) or work.complete
        if not kept and names is not None:
            with contextlib.suppress(OSError):
                work.remove()
        stay = f"They are kept in {work.directory}: free disk space and rerun." if kept else ""
        if _is_no_space(error):
            raise UsageError(
                f"No space left on the disk of {shown} after {len(work.done)} files "
                f"({gigabytes(work.bytes_done())} of {gigabytes(needed)}). {stay}".rstrip()
            ) from error
        stay = f" Finished files are kept in {work.directory}: the same command resumes from there."
        sentence = as_os_sentence(error, shown)
        if sentence is not None:
            raise UsageError(sentence + (stay if kept else "")) from error
        if kept and isinstance(error, UsageError):
            raise type(error)(f"{error}{stay}") from error
        raise


def _place(out: Path) -> Path:
    """The partial directory of an output; that of an earlier process comes first."""
    beside, inside = out.parent / f".{out.name}.partial", out / _INSIDE
    begun = any((beside / name).is_file() for name in (_JOURNAL, RECORD))
    return inside if out.is_dir() and not begun else beside


def _check_out(
    shown: Path, out: Path, place: Path, overwrite: bool, made_by: str, task: dict
) -> list[str]:
    """Reject a directory with files that this command did not write.

    Returns:
        The files of an earlier output, which are to be removed.
    """
    if not os.path.lexists(out):
        return []
    hint = "Name a new directory, or move this one away."
    if not out.is_dir():
        raise UsageError(f"{shown} exists and is a file. {hint}")
    former = record_of(out, made_by)
    now = {} if place.is_symlink() else record_of(place, made_by)
    if now.get("task") != _digest(task):
        now = {}
    if former and not overwrite and not now:
        raise UsageError(
            f"{shown} exists and is not empty. Name a new directory, or remove this one"
            + (", or give --overwrite." if made_by == TO_HF else ".")
        )
    # A kill during `publish` leaves some files of the new output there.
    foreign = foreign_file(out, [former, now], (_INSIDE,))
    if foreign is not None:
        why = ""
        if overwrite:
            why = (
                f" {foreign} was not written by {made_by}, or changed since."
                if former
                else (f" {made_by} did not create it: it contains {foreign}.")
            )
        raise UsageError(f"{shown} exists and is not empty.{why} {hint}")
    return list(former.get("files", {}))


def check_space(out: Path, needed: int, shown: Path | None = None) -> None:
    """Reject an output that is larger than the free disk space.

    Args:
        out: a path on the disk.
        needed: bytes.
        shown: path in the message; `out` by default.
    Raises:
        UsageError: names the needed and the free space.
    """
    free = free_space(out)
    if free < needed + _RESERVE:
        raise UsageError(
            f"{shown or out} needs {gigabytes(needed + _RESERVE)} on disk, {gigabytes(free)} are "
            "free. Free disk space, or name a path on another disk."
        )


def free_space(path: Path) -> int:
    """Free bytes on the disk of a path, which need not exist."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def gigabytes(count: float) -> str:
    """A number of bytes as text in GB."""
    return f"{count / 1e9:.2f} GB"


def fingerprint(files: list[Path]) -> list:
    """Name, size and modification time of files, to detect that one changed."""
    stats = [(path.name, path.stat()) for path in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _is_no_space(error: BaseException) -> bool:
    """Whether a full disk caused an error, which torch.save wraps in its own."""
    found = os_error_in(error)
    return found is not None and found.errno in (errno.ENOSPC, errno.EDQUOT)
