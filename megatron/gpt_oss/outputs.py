# Copyright (c) 2026, the megatron-core gptoss authors.

"""The rule by which every command writes files (docs/outputs.md).

A command replaces or deletes only what the same command made: a file with its mark, or a directory
whose record names every file in it. Links are followed, a file appears complete or not at all, and
what cannot be written is refused before the work begins.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Iterable, Iterator, Mapping

from megatron.gpt_oss.errors import UsageError

RECORD = ".gptoss.json"
VERSION = 1
MADE_BY = "made_by"
# The root of an ext file system that was just mounted.
_OF_THE_FILE_SYSTEM = ("lost+found",)
_LARGEST_HASHED = 16 * 2**20
_MARK_WITHIN = 4096
# What flock says where a file system has no locks.
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
# What rename says of a mount point and of a target on another file system.
_NOT_BY_RENAME = (errno.EXDEV, errno.EBUSY)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Give an OSError the path that it lacks; write() and fsync() name none."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def sync_to_disk(stream: IO) -> None:
    """Write what a stream has buffered, and wait until the file is on disk."""
    stream.flush()
    os.fsync(stream.fileno())


def real_path(path: str | Path, what: str = "The output") -> Path:
    """An output path as an absolute one, links followed; the last part need not exist.

    Args:
        what: names the flag in messages.
    Raises:
        UsageError: it is empty, or its links form a loop.
    """
    text = os.fspath(path)
    if not text.strip() or "\0" in text:
        raise UsageError(f"{what} {text!r} is not a path. Give the path to write.")
    try:
        return Path(text).expanduser().resolve() if text.startswith("~") else Path(text).resolve()
    except RuntimeError as error:  # pathlib's word for a loop of links in Python 3.11 and 3.12
        raise UsageError(f"{what} {text}: its symbolic links form a loop. Remove them.") from error


def check_apart(outputs: Iterable[Path], inputs: Iterable[str | Path], what: str) -> None:
    """Refuse to write what is also read.

    Args:
        outputs: files or directories that will be written.
        inputs: files or directories that are read.
        what: names the flag in the message.
    Raises:
        UsageError: an output is an input by any name, links and hard links included.
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


# ---------------------------------------------------------------------------------------------
# Single files
# ---------------------------------------------------------------------------------------------


def check_file(
    path: str | Path, made_by: str, what: str, inputs: Iterable[str | Path] = ()
) -> None:
    """Refuse a file that cannot or must not be written, before the work for it begins.

    Args:
        path: the file.
        made_by: the command, as `mark` says it.
        what: names the flag in messages.
        inputs: files that the command reads.
    Raises:
        UsageError: the path is a directory, an input, or a file that `made_by` did not make.
        OSError: it cannot be written.
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
    """Refuse to replace a file without the mark of `made_by`; an empty one holds nothing to lose.

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
    """The command that made a PNG, an HTML page or a JSON file, by the mark in it."""
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
    """'gptoss' and its subcommand, at the beginning of a text."""
    letters = bytearray()
    for byte in text[:40]:
        if not (97 <= byte <= 122 or byte in b" -"):
            break
        letters.append(byte)
    return letters.decode() or None


def write_file(path: str | Path, content: str | bytes) -> None:
    """Write a file that appears complete or not at all; a link stays, and its target is written.

    Args:
        path: the file; directories above it are made. A device or a pipe is written to.
        content: text is written as UTF-8.
    Raises:
        OSError: names the path; what was there before is as it was.
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
            temporary = _write_beside(target, data)
        except PermissionError:
            # A directory that takes no new files; the file itself may be writable.
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
    """Give a complete file its name, on another file system and at a mount point too.

    A link at `target` stays, and what it leads to is replaced.
    """
    final = real_path(target)
    try:
        os.replace(source, final)
        return
    except OSError as error:
        if error.errno not in _NOT_BY_RENAME:
            raise
    temporary = _new_name(final)
    try:
        _copy(source, temporary, os.O_CREAT | os.O_EXCL)
        os.replace(temporary, final)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno not in _NOT_BY_RENAME:
            raise
        # A file that is a mount point by itself, as containers have them.
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


def _write_beside(target: Path, data: bytes) -> Path:
    """A new complete file next to `target`, with the mode and owner of an older one."""
    temporary = _new_name(target)
    before = _stat(target)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(handle, "wb") as file:
            if before is not None:
                os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode))
                with suppress(OSError):  # only root may
                    os.fchown(file.fileno(), before.st_uid, before.st_gid)
            file.write(data)
            sync_to_disk(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _new_name(target: Path) -> Path:
    """In the same directory; short where the name itself is near the limit of 255 bytes."""
    start = f".{target.name}" if len(os.fsencode(target.name)) < 200 else ".gptoss"
    return target.parent / f"{start}.{secrets.token_hex(4)}.new"


def _probe(target: Path) -> None:
    """See that a file can be written there; nothing that exists is touched, nothing stays."""
    with naming(target):
        place = target
        while not place.parent.exists():
            place = place.parent
        try:
            _write_beside(place, b"\0" * 4096).unlink()
        except PermissionError:
            if not target.is_file():
                raise
            os.close(os.open(target, os.O_WRONLY))


def _is_stream(path: str | Path) -> bool:
    """A device, a pipe or a socket, or a name for an open one (/dev/stdout)."""
    info = _stat(path)
    if info is not None and stat.S_ISREG(info.st_mode):
        return os.path.abspath(path).startswith(("/dev/fd/", "/dev/std", "/proc/"))
    return info is not None and not stat.S_ISDIR(info.st_mode)


def _stat(path: str | Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


# ---------------------------------------------------------------------------------------------
# Directories
# ---------------------------------------------------------------------------------------------


def describe(path: Path) -> dict:
    """Size of a file, and SHA-256 of a small one."""
    size = path.stat().st_size
    return {"size": size} | ({"sha256": sha256(path)} if size <= _LARGEST_HASHED else {})


def sha256(path: Path) -> str:
    """Of all of a file, in pieces."""
    with naming(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_of(directory: Path, made_by: str) -> dict:
    """The record of a directory that `made_by` made, with the time at which it was `written`, in ns.

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
    """List every file of a directory that is complete; the last file that is written into it.

    Args:
        directory: the directory.
        made_by: the command.
        task: digest of what makes the files what they are.
        but: names at the top that are left out.
    """
    files = {name: describe(directory / name) for name in files_in(directory, {RECORD, *but})}
    record = {MADE_BY: made_by, "version": VERSION, "task": task, "files": files}
    write_file(directory / RECORD, json.dumps(record, indent=1, sort_keys=True) + "\n")
    return record


def files_in(directory: Path, but: Iterable[str] = (RECORD,)) -> list[str]:
    """Paths, from `directory`, of all below it that is not a directory; links are not followed.

    Args:
        but: names at the top that are left out.
    """
    leave_out = {*but, *_OF_THE_FILE_SYSTEM}
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
    """The first file of a directory that is in no record, or was changed since; None: all are known.

    Args:
        records: see `record_of`; of one a file must have the size, and the hash where it has one.
        but: names at the top that are left out.
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
        entry: see `describe`.
        written: time of the record in ns. It is written after all files: a large file that is
            newer was written by somebody else.
    """
    info = path.lstat()
    if not isinstance(entry, dict) or info.st_size != entry.get("size"):
        return False
    if info.st_size <= _LARGEST_HASHED and "sha256" in entry:
        return sha256(path) == entry["sha256"]
    return info.st_mtime_ns <= written


def remove_files(directory: Path, names: Iterable[str]) -> None:
    """Delete files of a directory by name, and the directories that are empty then."""
    parents = set()
    for name in names:
        path = directory / name
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
        while (path := path.parent) != directory:
            parents.add(path)
    for parent in sorted(parents, key=lambda path: -len(path.parts)):
        with suppress(OSError):  # not empty: something of somebody else's is in it
            parent.rmdir()


def _raise(error: OSError) -> None:
    raise error
