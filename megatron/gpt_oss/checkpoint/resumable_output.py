# Copyright (c) 2026, the megatron-core gptoss authors.

"""An output directory that appears when it is complete, and work on it that resumes after a kill.

The work is done in `.NAME.partial` beside the directory, or in `.gptoss.partial` within one that
exists already (a mount point cannot be renamed into place). A journal there names the files that
are finished; the same command finds it. What is complete has a record of its files (see
`outputs.py`), and then its name: in one step, or, within a directory, file by file, where a reader
looks first at last. A kill in between leaves the rest to the next start.
"""

import contextlib
import errno
import fcntl
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
    NO_LOCKS,
    RECORD,
    check_apart,
    files_in,
    foreign_file,
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
# Without these a directory is no model and no checkpoint to anybody: removed first, moved last.
_LOOKED_AT_FIRST = (CONFIG_NAME, TRACKER)
# What file systems and small files take beyond the bytes of the tensors.
_RESERVE = 64 * 2**20
_MOST_IN_MEMORY = 256 * 2**20


class Unfinished:
    """The directory in work.

    Args:
        folder: the directory; made if it is not there.
        task: what makes the result what it is.
        names: paths of all files that the task writes, from `folder`; anything else there is
            somebody else's. None: what the journal names, and nothing is removed.
        made_by: the command.
        out: the name of the result, where some files may be already.
    Attributes:
        folder: where to write.
        done: what `finish` recorded, by file name; also by an earlier process.
        complete: an earlier process wrote every file, and only the directory's name is missing.
    Raises:
        UsageError: the directory is a link, holds somebody else's files, or belongs to another
            process or task.
    """

    def __init__(
        self,
        folder: Path,
        task: dict,
        names: Collection[str] | None = None,
        made_by: str = "gptoss convert",
        out: Path | None = None,
    ):
        self.folder = folder
        self._names = None if names is None else set(names)
        self._made_by = made_by
        self.digest = _digest(task)
        self._check_mine()
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="to-disk")
        self._pending: list[Future] = []
        self._in_memory = 0
        # Opened in append mode, so that a lock held by another process loses nothing.
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        handle = os.open(folder / _JOURNAL, flags, 0o666)
        self._journal = open(handle, "a+", encoding="utf-8")
        locked = False
        try:
            self._lock()
            locked = True
            self.done = self._read(task)
            self.complete = self._is_complete(out)
            if not self.done and not self.complete:
                self._remove_remains()
                self._journal.truncate(0)
                self._append({"task": task, "names": sorted(self._names or ())})
        except BaseException:
            with contextlib.suppress(OSError):  # of a full disk, a second time
                self._journal.close()
            if locked and not files_in(folder, (_JOURNAL,)):
                remove_files(folder, [_JOURNAL])
                folder.rmdir()
            raise

    def _is_complete(self, out: Path | None) -> bool:
        """Whether an earlier process wrote everything; some of it may lie in `out` already."""
        record = record_of(self.folder, self._made_by)
        if not record:
            return False
        if record.get("task") != self.digest:
            raise UsageError(
                f"{self.folder} is the complete output of a run with other arguments, but was not "
                "renamed. Rename it, or remove it."
            )
        places = [self.folder] + ([out] if out is not None else [])
        return all(any((p / name).is_file() for p in places) for name in record["files"])

    def _check_mine(self) -> None:
        if self.folder.is_symlink():
            raise UsageError(
                f"{self.folder} is a symbolic link; the unfinished output would go to its target. "
                "Remove the link, or name another output directory."
            )
        if not os.path.lexists(self.folder):
            return
        if not self.folder.is_dir():
            raise UsageError(
                f"{self.folder} is a file, but the unfinished output needs a directory of that "
                "name. Move the file away, or name another output directory."
            )
        found = files_in(self.folder, ())
        allowed = {_JOURNAL, RECORD} | (self._names or set())
        if _JOURNAL in found or RECORD in found:
            allowed |= self._named_by_journal()
        else:
            allowed = set()
        for name in found:
            temporary = name.endswith((".tmp", ".new"))  # of a file that was being written
            if name not in allowed and not (temporary and allowed):
                self._refuse(name)
            if (self.folder / name).is_symlink():
                self._refuse(name)

    def _refuse(self, name: str) -> None:
        raise UsageError(
            f"{self.folder / name} is not a file of an unfinished conversion, and {self.folder} is "
            "reserved for one. Move it away, or name another output directory."
        )

    def _named_by_journal(self) -> set[str]:
        """The files that an earlier process finished, of whatever task; it is told of that later."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            lines = (self.folder / _JOURNAL).read_text(encoding="utf-8").splitlines()
            records = [json.loads(line) for line in lines if line.endswith("}")]
            files = {record["file"] for record in records if "file" in record}
            planned = next(iter(records), {}).get("names", [])
            return {name for name in (*files, *planned) if isinstance(name, str)}
        return set()

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

    def close(self) -> None:
        """Let another process at the folder."""
        self._thread.shutdown()
        self._journal.close()

    def remove(self) -> None:
        """Remove what this task wrote, and the directory if nothing else is in it."""
        self._remove_remains()
        remove_files(self.folder, [_JOURNAL, RECORD])
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def complete_with_record(self) -> None:
        """List the files; from here on only the name of the directory is missing."""
        if not self.complete:
            write_record(self.folder, self._made_by, self.digest, (_JOURNAL,))
            self.complete = True

    def publish(self, out: Path, replaced: Collection[str] = ()) -> None:
        """Give the complete directory its name.

        Args:
            out: the name; may be a directory that exists.
            replaced: files of an earlier output there, which are removed.
        """
        if not out.exists():
            (self.folder / _JOURNAL).unlink()
            try:
                with naming(out):
                    os.rename(self.folder, out)
                return
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EBUSY, errno.ENOTEMPTY, errno.EEXIST):
                    raise
            out.mkdir(exist_ok=True)
        new = files_in(self.folder, (_JOURNAL,))
        remove_files(out, [name for name in _LOOKED_AT_FIRST if name in replaced])
        remove_files(out, sorted(set(replaced) - set(new) - {RECORD}))
        for name in sorted(new, key=_moved_last):
            with naming(out / name):
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                move_file(self.folder / name, out / name)
        remove_files(self.folder, [_JOURNAL])
        for parent, _, _ in os.walk(self.folder, topdown=False):
            os.rmdir(parent)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"Another process is writing {self.folder}. Wait for it, or name another output directory."
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise

    def _read(self, task: dict) -> dict[str, dict]:
        """The finished files of an earlier process that did the same."""
        records = _whole_records(self.folder / _JOURNAL)
        if len(records) < 2:
            return {}
        before = records[0]["task"]
        now = json.loads(json.dumps(task))  # tuples as the lists that they become
        if before != now:
            differ = [key for key in {**before, **now} if before.get(key) != now.get(key)]
            raise UsageError(
                f"{self.folder} is an unfinished conversion with another {', '.join(differ)}. "
                "Finish it with its original arguments, or remove that directory."
            )
        return {
            record["file"]: record
            for record in records[1:]
            if (self.folder / record["file"]).is_file()
            and (self.folder / record["file"]).stat().st_size == record["size"]
        }

    def _remove_remains(self) -> None:
        """What an earlier process left, perhaps of another task, without finishing one file.

        All of it is ours: see `_check_mine`.
        """
        remove_files(self.folder, [n for n in files_in(self.folder, (RECORD,)) if n != _JOURNAL])
        remove_files(self.folder, [RECORD])

    def _append(self, record: dict) -> None:
        with naming(self.folder / _JOURNAL):
            self._journal.write(json.dumps(record) + "\n")
            sync_to_disk(self._journal)


def _moved_last(name: str) -> tuple[bool, bool, str]:
    """The record of all files is the last one."""
    return (name == RECORD, name in _LOOKED_AT_FIRST, name)


def _digest(task: dict) -> str:
    return hashlib.sha256(json.dumps(task, sort_keys=True).encode()).hexdigest()


def _whole_records(path: Path) -> list[dict]:
    """The records of a journal up to the first line that is none: a kill may have cut it."""
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
def unfinished(
    out: Path,
    task: dict,
    needed: int,
    overwrite: bool = False,
    names: Collection[str] | None = None,
    made_by: str = "gptoss convert",
    inputs: Iterable[str | Path] = (),
) -> Iterator[Unfinished]:
    """Write a directory that does not exist yet, or is empty; a link to one is followed.

    Args:
        out: the directory.
        task: what makes the result what it is (source, layout, ...); work that another task began
            does not go on.
        needed: bytes that the directory will have.
        overwrite: `out` may be what `made_by` wrote earlier, with no file besides; it is replaced
            once the new one is complete.
        names: see `Unfinished`.
        made_by: the command.
        inputs: files and directories that are read.
    Yields:
        The work; where it is `complete`, an earlier process has written everything.
    Raises:
        UsageError: `out` is not empty, or cannot be written, the disk has no room, or another
            process or task has it.
    """
    shown, out = Path(out), real_path(out, "The output directory")
    check_apart([out], inputs, "The output directory")
    place = _place(out)
    _check_out(shown, out, place, overwrite, made_by, task)
    work = Unfinished(place, task, names, made_by, out)
    try:
        if not work.complete:
            check_space(place, needed - work.bytes_done(), shown)
        yield work
        work.wait()
        work.complete_with_record()
        # Hours may have passed, and somebody may have written there.
        work.publish(out, _check_out(shown, out, place, overwrite, made_by, task))
        work.close()
    except BaseException as error:
        work.close()  # with what is on its way to disk
        kept = bool(work.done) or work.complete
        if not kept and names is not None:
            with contextlib.suppress(OSError):
                work.remove()
        stay = f"They are kept in {work.folder}: free disk space and rerun." if kept else ""
        if _is_no_space(error):
            raise UsageError(
                f"No space left on the disk of {shown} after {len(work.done)} files "
                f"({gigabytes(work.bytes_done())} of {gigabytes(needed)}). {stay}".rstrip()
            ) from error
        stay = f" Finished files are kept in {work.folder}: the same command resumes from there."
        sentence = as_os_sentence(error, shown)
        if sentence is not None:
            raise UsageError(sentence + (stay if kept else "")) from error
        if kept and isinstance(error, UsageError):
            raise type(error)(f"{error}{stay}") from error
        raise


def _place(out: Path) -> Path:
    """Where the work is done: what an earlier process began comes first."""
    beside, inside = out.parent / f".{out.name}.partial", out / _INSIDE
    begun = any((beside / name).is_file() for name in (_JOURNAL, RECORD))
    return inside if out.is_dir() and not begun else beside


def _check_out(
    shown: Path, out: Path, place: Path, overwrite: bool, made_by: str, task: dict
) -> list[str]:
    """Refuse a directory with files that this command did not make.

    Returns:
        The files of an earlier output, to be removed.
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
    # Of a start that was killed while files got their names, some have them already.
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
    """Refuse work that the disk has no room for.

    Args:
        out: on whose disk.
        needed: bytes.
        shown: named in the message; `out` by default.
    Raises:
        UsageError: says what is needed and what is free.
    """
    free = free_space(out)
    if free < needed + _RESERVE:
        raise UsageError(
            f"{shown or out} needs {gigabytes(needed + _RESERVE)} on disk, {gigabytes(free)} are free. "
            "Free disk space, or name a path on another disk."
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


def _is_no_space(error: BaseException) -> bool:
    """Whether an error comes of a full disk; torch.save wraps it in one of its own."""
    found = os_error_in(error)
    return found is not None and found.errno in (errno.ENOSPC, errno.EDQUOT)
