# Copyright (c) 2026, the megatron-core gptoss authors.

"""Rules for files that commands write (docs/outputs.md).

A command replaces or deletes only what the same command created: a file with its mark, or a
directory whose record lists every file in it. Symbolic links are followed. Writes are atomic. A
path that cannot be written is rejected before the work starts.
"""

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Iterable, Iterator, Mapping

from megatron.gpt_oss.errors import UsageError

RECORD = ".gptoss.json"
VERSION = 1
MADE_BY = "made_by"
# The root directory of an ext file system contains it.
_FILE_SYSTEM_ENTRIES = ("lost+found",)
_MAX_HASHED_SIZE = 64 * 2**20  # a tokenizer.json has about 30 MB
# Bytes at the start of a file that contain its mark.
_MARK_WITHIN = 4096
# Errors of flock on a file system without locks.
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
# Errors of rename for a mount point and for a target on another file system.
_RENAME_UNSUPPORTED = (errno.EXDEV, errno.EBUSY)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Add the path to an OSError that has none, such as those of write() and fsync()."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def sync_to_disk(stream: IO) -> None:
    """Flush a stream, and wait until the file is on disk."""
    stream.flush()
    os.fsync(stream.fileno())


def lock_file(stream: IO, busy: str) -> None:
    """Lock a file until it is closed; a file system without locks is accepted.

    Raises:
        UsageError: `busy`, if another process holds the lock.
    """
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(busy) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


def real_path(path: str | Path, what: str = "The output") -> Path:
    """The absolute output path with symbolic links resolved; the last part need not exist.

    Args:
        path: the path.
        what: names the flag in messages.
    Raises:
        UsageError: the path is empty, or its links form a loop.
    """
    text = os.fspath(path)
    if not text.strip() or "\0" in text:
        raise UsageError(f"{what} {text!r} is not a path. Give the path to write.")
    try:
        return Path(text).expanduser().resolve() if text.startswith("~") else Path(text).resolve()
    except RuntimeError as error:  # pathlib raises it for a loop of links in Python 3.11 and 3.12
        raise UsageError(f"{what} {text}: its symbolic links form a loop. Remove them.") from error


def check_apart(outputs: Iterable[Path], inputs: Iterable[str | Path], what: str) -> None:
    """Reject outputs that are also inputs.

    Args:
        outputs: files or directories that will be written.
        inputs: files or directories that are read.
        what: names the flag in the message.
    Raises:
        UsageError: an output is an input, also through symbolic or hard links.
    """
    read = [Path(path) for path in inputs]
    by_path = {os.path.realpath(path) for path in read}
    by_inode = {(info.st_dev, info.st_ino) for info in map(_stat, read) if info}
    for output in outputs:
        info = _stat(output)
        same = info is not None and (info.st_dev, info.st_ino) in by_inode
        if same or os.path.realpath(output) in by_path:
            raise UsageError(
                f"{what}: {output} is an input and would be overwritten. Give another path."
            )


def check_file(
    path: str | Path, made_by: str, what: str, inputs: Iterable[str | Path] = ()
) -> None:
    """Reject a file that cannot or must not be written, before the work starts.

    Args:
        path: the file.
        made_by: the command, as in its mark.
        what: names the flag in messages.
        inputs: files that the command reads.
    Raises:
        UsageError: the path is a directory, an input, or a file that `made_by` did not create.
        OSError: the file cannot be written.
    """
    target = real_path(path, what)
    if _is_stream(path):
        return
    if target.is_dir():
        raise UsageError(f"{what} {path} is a directory. Give the name of a file.")
    check_apart([target], inputs, what)
    check_mine(path, made_by, what)
    _probe(target)


def check_mine(path: str | Path, made_by: str, what: str) -> None:
    """Reject a file that exists, is not empty and lacks the mark of `made_by`.

    Raises:
        UsageError: names the file.
    """
    if not _is_stream(path) and os.path.lexists(path) and os.path.exists(path):
        if os.path.getsize(path) and mark_of(Path(path)) != made_by:
            raise UsageError(
                f"{what}: {path} exists, but {made_by} did not create it. Give another name, or "
                "move that file away."
            )


def mark_of(path: Path) -> str | None:
    """The command that created a PNG, an HTML or a JSON file, from the mark in it; None: no mark."""
    with open(path, "rb") as file:
        start = file.read(_MARK_WITHIN)
        if start.startswith(b"\x89PNG\r\n"):
            _, found, rest = start.partition(b"tEXtSoftware\0")
            return _command(rest) if found else None
        if start.startswith(b"<!doctype html>"):
            _, found, rest = start.partition(b'<meta name="generator" content="')
            return _command(rest) if found else None
        if not start.lstrip().startswith(b"{"):
            return None
        try:
            content = json.loads(start + file.read())
        except (ValueError, RecursionError):
            return None
    found = content.get(MADE_BY) if isinstance(content, dict) else None
    return found if isinstance(found, str) else None


def _command(text: bytes) -> str | None:
    """'gptoss' and its subcommand, from the start of a text."""
    letters = bytearray()
    for byte in text[:40]:
        if not (97 <= byte <= 122 or byte in b" -"):
            break
        letters.append(byte)
    return letters.decode() or None


def write_file(path: str | Path, content: str | bytes) -> None:
    """Write a file atomically. A symbolic link stays, and its target is written.

    Args:
        path: the file; missing parent directories are created. May be a device or a pipe.
        content: text is written as UTF-8.
    Raises:
        OSError: names the path; an existing file is unchanged.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    target = real_path(path)
    with naming(path):
        if _is_stream(path):
            with open(path, "wb") as stream:
                stream.write(data)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary = _write_temporary(target, data)
        except PermissionError:
            # The directory is read-only; the file itself may be writable.
            if not target.is_file():
                raise
            _write_in_place(target, data)
            return
        try:
            move_file(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def move_file(source: Path, target: str | Path) -> None:
    """Move a complete file to `target`, which may be on another file system or a mount point.

    A symbolic link at `target` stays, and its target is replaced.
    """
    final = real_path(target)
    try:
        os.replace(source, final)
        return
    except OSError as error:
        if error.errno not in _RENAME_UNSUPPORTED:
            raise
    temporary = _new_name(final)
    try:
        _copy(source, temporary, os.O_CREAT | os.O_EXCL)
        os.replace(temporary, final)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno not in _RENAME_UNSUPPORTED:
            raise
        # The file itself is a mount point, as in containers.
        _copy(source, final, os.O_CREAT | os.O_TRUNC)
    source.unlink()


def _copy(source: Path, target: Path, flags: int) -> None:
    with naming(target), open(source, "rb") as reader:
        handle = os.open(target, os.O_WRONLY | flags, 0o666)
        with open(handle, "wb") as writer:
            shutil.copyfileobj(reader, writer, 2**20)
            sync_to_disk(writer)


def _write_in_place(target: Path, data: bytes) -> None:
    with open(target, "r+b") as file:
        file.truncate()
        file.write(data)
        sync_to_disk(file)


def _write_temporary(target: Path, data: bytes) -> Path:
    """Write a temporary file in the directory of `target`, with mode and owner of `target`."""
    temporary = _new_name(target)
    before = _stat(target)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(handle, "wb") as file:
            if before is not None:
                os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode))
                with suppress(OSError):  # needs root
                    os.fchown(file.fileno(), before.st_uid, before.st_gid)
            file.write(data)
            sync_to_disk(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _new_name(target: Path) -> Path:
    """Name of a temporary file in the same directory, within the limit of 255 bytes."""
    start = f".{target.name}" if len(os.fsencode(target.name)) < 200 else ".gptoss"
    return target.parent / f"{start}.{secrets.token_hex(4)}.new"


def _probe(target: Path) -> None:
    """Check that a file can be written, without changing existing files."""
    with naming(target):
        place = target
        while not place.parent.exists():
            place = place.parent
        try:
            _write_temporary(place, b"\0" * 4096).unlink()
        except PermissionError:
            if not target.is_file():
                raise
            os.close(os.open(target, os.O_WRONLY))


def _is_stream(path: str | Path) -> bool:
    """Whether a path is a device, a pipe, a socket or an open file (/dev/stdout)."""
    info = _stat(path)
    if info is not None and stat.S_ISREG(info.st_mode):
        return os.path.abspath(path).startswith(("/dev/fd/", "/dev/std", "/proc/"))
    return info is not None and not stat.S_ISDIR(info.st_mode)


def _stat(path: str | Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def describe(path: Path) -> dict:
    """Size of a file in bytes, and SHA-256 if it is at most 64 MiB."""
    size = path.stat().st_size
    return {"size": size} | ({"sha256": sha256(path)} if size <= _MAX_HASHED_SIZE else {})


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with naming(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_of(directory: Path, made_by: str) -> dict:
    """The record of a directory that `made_by` created, with its modification time `written` in ns.

    {} for any other directory.
    """
    path = directory / RECORD
    if path.is_symlink() or not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        known = record[MADE_BY] == made_by and record["version"] == VERSION
        if not known or not isinstance(record["files"], dict):
            return {}
        return record | {"written": path.stat().st_mtime_ns}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def write_record(directory: Path, made_by: str, task: str = "", but: Iterable[str] = ()) -> dict:
    """Write the record of a complete directory, which lists every file; written last.

    Args:
        directory: the directory.
        made_by: the command.
        task: digest of the arguments and inputs that determine the files.
        but: names at the top level to exclude.
    """
    files = {name: describe(directory / name) for name in files_in(directory, {RECORD, *but})}
    record = {MADE_BY: made_by, "version": VERSION, "task": task, "files": files}
    write_file(directory / RECORD, json.dumps(record, indent=1, sort_keys=True) + "\n")
    return record


def files_in(directory: Path, but: Iterable[str] = (RECORD,)) -> list[str]:
    """Relative paths of all files below a directory; links are not followed.

    Args:
        directory: the directory.
        but: names at the top level to exclude.
    """
    leave_out = {*but, *_FILE_SYSTEM_ENTRIES}
    names = []
    for parent, directories, files in os.walk(directory, onerror=_raise):
        if parent == str(directory):
            directories[:] = [name for name in directories if name not in leave_out]
            files = [name for name in files if name not in leave_out]
        links = [name for name in directories if os.path.islink(os.path.join(parent, name))]
        names += [os.path.relpath(os.path.join(parent, name), directory) for name in files + links]
    return sorted(names)


def foreign_file(
    directory: Path, records: Iterable[Mapping], but: Iterable[str] = ()
) -> str | None:
    """The first file that is in no record or was changed since; None if there is none.

    Args:
        directory: the directory.
        records: see `record_of`. Size and, if recorded, hash of a file must match one of them.
        but: names at the top level to exclude.
    """
    known = [record for record in records if record]
    for name in files_in(directory, {RECORD, *but}):
        path = directory / name
        mine = any(
            is_unchanged(path, record["files"][name], record["written"])
            for record in known
            if name in record["files"]
        )
        if path.is_symlink() or not mine:
            return name
    return None


def is_unchanged(path: Path, entry: object, written: int) -> bool:
    """Whether a file is the one that a record describes.

    Args:
        path: the file.
        entry: see `describe`.
        written: time of the record in ns. The record is written last, so a large file that is
            newer was changed later.
    """
    info = path.lstat()
    if not isinstance(entry, dict) or info.st_size != entry.get("size"):
        return False
    if info.st_size <= _MAX_HASHED_SIZE and "sha256" in entry:
        return sha256(path) == entry["sha256"]
    return info.st_mtime_ns <= written


def changed_file(directory: Path, record: Mapping, below: str) -> str | None:
    """The first recorded file of a subdirectory that is missing or has other bytes; None if none.

    Args:
        directory: the directory of the record.
        record: see `record_of`.
        below: name of the subdirectory.
    """
    for name, entry in sorted(record.get("files", {}).items()):
        if Path(name).parts[0] != below or not isinstance(entry, dict):
            continue
        path = (directory / name).resolve()
        # A copied directory has other times, so any time is accepted.
        if not path.is_file() or not is_unchanged(path, entry, written=sys.maxsize):
            return name
    return None


def remove_files(directory: Path, names: Iterable[str]) -> None:
    """Delete files of a directory by name, and subdirectories that become empty."""
    parents = set()
    for name in names:
        path = directory / name
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
        while (path := path.parent) != directory:
            parents.add(path)
    for parent in sorted(parents, key=lambda path: -len(path.parts)):
        with suppress(OSError):  # not empty: it has other files
            parent.rmdir()


def _raise(error: OSError) -> None:
    raise error
