# Copyright (c) 2026, the megatron-core gptoss authors.

"""Writes datasets, and the journal from which a killed `gptoss tokenize` resumes.

The files are in `.NAME.partial` next to the output. At intervals they are synced to disk, and the
journal records the length of each file and the position in the input. The next start truncates the
files to these lengths; what follows is written again, with the same bytes.
"""

import hashlib
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy

from megatron.gpt_oss.data.corpus_record import (
    DATASET,
    SKIPPED,
    TOKENIZE,
    dataset_prefix,
    ending,
    output_of,
)
from megatron.gpt_oss.data.indexed_dataset import write_index
from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.json_file import brief, read_json
from megatron.gpt_oss.outputs import (
    files_in,
    lock_file,
    move_file,
    naming,
    remove_files,
    sha256,
    sync_to_disk,
    write_file,
)

_JOURNAL, _LOCK, _SKIPPED, _INDEX = "journal.json", "lock", "skipped.txt", "idx"
# Datasets of any earlier start: '', 'valid', '8k-32k', '32k-up', 'loss', 'valid.loss'.
_MINE = re.compile(
    r"journal\.json(\.new)?|\.journal\.json\.[0-9a-f]{8}\.new|lock|skipped\.txt|idx|"
    r"(valid|\d+k?-(\d+k?|up))?(\.?loss)?\.(bin|lengths)"
)
# Cache of Megatron's sample indices; its key is only the path of the dataset.
_CACHE = Path("cache", "GPTDataset_indices")
_PAIRS = ("skipped", "differences")  # of the journal's state
_CACHED = re.compile(r"[0-9a-f]{32}-\w+-\w+-\w+\.(txt|npy)")


class ResumableDatasets:
    """The partial datasets of `tokenize_files`; a killed process resumes them.

    Args:
        prefix: of the output.
        dtypes: {dataset: numpy dtype name}; '' is the prefix itself, 'x' is prefix.x.
        task: everything that determines the output; files of another task are not resumed.
        overwrite: discard the files of another task.
    Attributes:
        state: argument of the last `save`, of this process or an earlier one.
        complete: all documents are written; only the final names are missing.
    """

    def __init__(self, prefix: Path, dtypes: dict[str, str], task: dict, overwrite: bool):
        self._prefix, self._names, self._dtypes = prefix, list(dtypes), dtypes
        self.directory = prefix.parent / f".{prefix.name}.partial"
        self._check_owned()
        with naming(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW
        self._lock = open(os.open(self.directory / _LOCK, flags, 0o666), "w")
        busy = f"Another process is writing {prefix}. Wait for it, or give another --output."
        try:
            lock_file(self._lock, busy)
        except BaseException:
            self._lock.close()
            raise
        self._files: dict[str, BinaryIO] = {}
        self.complete = self.saved = False
        try:
            with naming(self.directory / _LOCK):  # detects a full disk before the work starts
                os.truncate(self._lock.fileno(), 0)
                os.write(self._lock.fileno(), f"{TOKENIZE}\n".encode())
                os.fsync(self._lock.fileno())
            self._task = json.loads(json.dumps(task))
            journal = self._read_journal(overwrite)
            self.state = journal["state"] if journal else {}
            self.complete = bool(journal) and journal["complete"]
            self.saved = bool(journal)
            # SHA-256 of the files, updated during writing.
            self._digests = {name: hashlib.sha256() for name in self._names}
            self._recorded = journal.get("digests", {}) if journal else {}
            if not self.complete:
                self._open(journal["sizes"] if journal else {})
        except BaseException:
            self.close()
            if set(files_in(self.directory, ())) <= {_LOCK}:
                self.remove()
            raise

    def append(self, name: str, ids: numpy.ndarray, lengths: numpy.ndarray) -> None:
        """Append documents to a dataset: concatenated ids, and lengths."""
        ids = numpy.ascontiguousarray(ids)
        with naming(self.directory / f"{name}.bin"):
            self._files[f"{name}.bin"].write(ids)
        self._digests[name].update(ids)
        with naming(self.directory / f"{name}.lengths"):
            lengths = numpy.ascontiguousarray(lengths, dtype=numpy.int32)
            self._files[f"{name}.lengths"].write(lengths)

    def note_skipped(self, line: str) -> None:
        """Append a line to the list of skipped documents."""
        with naming(self.directory / _SKIPPED):
            self._files[_SKIPPED].write(f"{line}\n".encode("utf-8", "surrogateescape"))

    def save(self, state: dict, complete: bool = False) -> None:
        """Sync all files to disk and record the state in the journal."""
        sizes = {}
        for name, file in self._files.items():
            with naming(self.directory / name):
                sync_to_disk(file)
            sizes[name] = file.tell()
        journal = {"task": self._task, "state": state, "sizes": sizes, "complete": complete}
        if complete:
            self._recorded = {name: digest.hexdigest() for name, digest in self._digests.items()}
            journal["digests"] = self._recorded
        write_file(self.directory / _JOURNAL, json.dumps(journal))
        self.state, self.saved, self.complete = state, True, complete

    def lengths(self, name: str) -> numpy.ndarray:
        """[documents] int32, the lengths of a complete dataset."""
        return numpy.fromfile(self.directory / f"{name}.lengths", dtype=numpy.int32)

    def named_already(self) -> list[Path]:
        """Files that a killed process of this output has renamed already."""
        if not self.complete:
            return []
        named = [name for name in self._names if not (self.directory / f"{name}.bin").exists()]
        files = [output_of(self._prefix, ending(name, end)) for name in named for end in DATASET]
        skipped = self.directory / _SKIPPED
        return files + ([] if skipped.exists() else [output_of(self._prefix, SKIPPED)])

    def publish(self) -> tuple[list[str], dict[str, dict]]:
        """Rename the finished files; after a kill the next start continues.

        Returns:
            Names of the datasets with documents, and {file name without PREFIX: size and SHA-256}.
        """
        published, outputs = [], {}
        for name in self._names:
            target = dataset_prefix(self._prefix, name)
            lengths = self.lengths(name)
            if not len(lengths):
                continue
            published.append(name)
            data, index = (output_of(target, end) for end in DATASET)
            source = self.directory / f"{name}.bin"
            if source.exists() or not index.exists():  # else an earlier process moved it
                with naming(self.directory / _INDEX), open(self.directory / _INDEX, "wb") as stream:
                    write_index(stream, lengths, self._dtypes[name])
                    sync_to_disk(stream)
                # Remove the old index first, so that it is never combined with new data.
                with naming(index):
                    index.resolve().unlink(missing_ok=True)
                _empty_cache(target)
                if source.exists():
                    move_file(source, data)
                move_file(self.directory / _INDEX, index)
            outputs[ending(name, ".bin")] = {
                "size": data.stat().st_size,
                "sha256": self._recorded.get(name) or sha256(data),
            }
            outputs[ending(name, ".idx")] = {"size": index.stat().st_size, "sha256": sha256(index)}
        skipped, target = self.directory / _SKIPPED, output_of(self._prefix, SKIPPED)
        if skipped.exists() and skipped.stat().st_size:
            move_file(skipped, target)
        if not skipped.exists() and target.exists():
            outputs[SKIPPED] = {"size": target.stat().st_size, "sha256": sha256(target)}
        return published, outputs

    def close(self) -> None:
        """Close the files; a later start resumes from the last `save`."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._lock.close()

    def remove(self) -> None:
        """Close, and remove all files."""
        self.close()
        with suppress(OSError):
            remove_files(self.directory, filter(_MINE.fullmatch, files_in(self.directory, ())))
            self.directory.rmdir()

    def _check_owned(self) -> None:
        """Reject a directory that is a link, or has files of others."""
        if self.directory.is_symlink() or (self.directory.exists() and not self.directory.is_dir()):
            what = "a symbolic link" if self.directory.is_symlink() else "a file"
            raise UsageError(
                f"{self.directory} is {what}, but the unfinished dataset needs a directory of that "
                "name. Move it away, or give another --output."
            )
        if not self.directory.exists():
            return
        found = files_in(self.directory, ())
        known = _LOCK in found or _JOURNAL in found
        for name in found:
            is_link = (self.directory / name).is_symlink()
            if not known or is_link or not _MINE.fullmatch(name):
                raise UsageError(
                    f"{self.directory / name} is not a file of an unfinished dataset, and "
                    f"{self.directory} is reserved for one. Move it away, or give another --output."
                )

    def _open(self, sizes: dict[str, int]) -> None:
        wanted = [f"{name}{end}" for name in self._names for end in (".bin", ".lengths")]
        for name in (*wanted, _SKIPPED):
            file = open(self.directory / name, "r+b" if name in sizes else "w+b")
            self._files[name] = file
            file.seek(0, os.SEEK_END)
            if file.tell() < sizes.get(name, 0):
                raise UsageError(
                    f"{self.directory / name} is shorter than when it was saved. Remove "
                    f"{self.directory}, or give --overwrite, to start over."
                )
            file.truncate(sizes.get(name, 0))
            if name.endswith(".bin"):
                file.seek(0)
                while piece := file.read(2**20):
                    self._digests[name[: -len(".bin")]].update(piece)
            file.seek(0, os.SEEK_END)

    def _read_journal(self, overwrite: bool) -> dict | None:
        path = self.directory / _JOURNAL
        if not path.exists():
            return None
        remedy = f"Remove {self.directory}, or give --overwrite, to start over."
        try:
            journal = read_json(path, hint=remedy)
            _check_journal(journal, f"{path} {{}}. {remedy}")
        except UsageError:
            if overwrite:
                return None
            raise
        before = journal["task"]
        differ = [key for key in {**before, **self._task} if before.get(key) != self._task.get(key)]
        if differ and overwrite:
            return None
        if differ:
            raise UsageError(
                f"{self.directory} is an unfinished dataset with different {', '.join(differ)}. "
                "Finish it with its original arguments and files, or give --overwrite."
            )
        return journal


def _empty_cache(target: Path) -> None:
    """Remove Megatron's sample indices of the old data."""
    directory = target / _CACHE
    if not directory.is_dir() or directory.is_symlink():
        return
    with suppress(OSError):
        remove_files(directory, filter(_CACHED.fullmatch, files_in(directory)))
        directory.rmdir()


def _check_journal(journal: dict, message: str) -> None:
    """Reject a journal whose fields have wrong types."""
    kinds = {"task": dict, "state": dict, "sizes": dict, "complete": bool}
    for name, kind in kinds.items():
        if type(journal.get(name)) is not kind:
            raise UsageError(message.format(f"has {name} = {brief(journal.get(name))}"))
    state = journal["state"]
    if not isinstance(state.get("counts", {}), dict):
        raise UsageError(message.format(f"has counts = {brief(state['counts'])}"))
    counts = {name: value for name, value in state.items() if name not in (*_PAIRS, "counts")}
    for name, value in {**counts, **state.get("counts", {}), **journal["sizes"]}.items():
        if type(value) is not int or not 0 <= value < 2**63:
            raise UsageError(message.format(f"has {brief(name)} = {brief(value)}"))
    for name in _PAIRS:
        if not _is_pairs(state.get(name, [])):
            raise UsageError(message.format(f"has {name} = {brief(state[name])}"))


def _is_pairs(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, list) and len(item) == 2 and all(isinstance(word, str) for word in item)
        for item in value
    )
