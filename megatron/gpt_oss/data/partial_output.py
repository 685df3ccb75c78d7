# Copyright (c) 2026, the megatron-core gptoss authors.

"""Datasets that are being written, and the place from which a killed `gptoss tokenize` goes on.

The work lies in `.NAME.partial` beside the output. From time to time what was written is brought
to disk and the journal says how long each file was then and how far the input had been read. A
later start cuts the files to those lengths; what follows is written again, with the same bytes.
"""

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import BinaryIO

import numpy

from megatron.gpt_oss.data.index_file import write_index
from megatron.gpt_oss.errors import UsageError

_JOURNAL, _LOCK, SKIPPED = "journal.json", "lock", "skipped.txt"


class PartialOutput:
    """The files of a run that is not finished.

    Args:
        prefix: of the output.
        names: of its datasets; '' is the prefix itself, 'x' is prefix.x.
        dtype: numpy's name of the tokens' type.
        task: what makes the output what it is; work of another task is not gone on with.
        overwrite: begin anew where an earlier run left the work of another task.
    Attributes:
        state: what the caller gave to the last `save`, of this process or an earlier one.
        complete: every document was written, and only the files' names are missing.
    """

    def __init__(self, prefix: Path, names: list[str], dtype: str, task: dict, overwrite: bool):
        self._prefix, self._names, self._dtype = prefix, names, dtype
        self.folder = prefix.parent / f".{prefix.name}.partial"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder / _LOCK, "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise UsageError(
                f"Another process is writing {prefix}. Wait for it, or give another --output."
            ) from error
        self._files: dict[str, BinaryIO] = {}
        try:
            self._task = json.loads(json.dumps(task))
            journal = self._read_journal(overwrite)
            self.state = journal["state"] if journal else {}
            self.complete = bool(journal) and journal["complete"]
            self.saved = bool(journal)
            if not self.complete:
                self._open(journal["sizes"] if journal else {})
        except BaseException:
            self.close()
            raise

    def append(self, name: str, ids: numpy.ndarray, lengths: numpy.ndarray) -> None:
        """Add documents to a dataset: their ids one after the other, and their lengths."""
        self._files[f"{name}.bin"].write(numpy.ascontiguousarray(ids))
        self._files[f"{name}.lengths"].write(numpy.ascontiguousarray(lengths, dtype=numpy.int32))

    def note_skipped(self, line: str) -> None:
        """Add a line to the list of what was left out."""
        self._files[SKIPPED].write(f"{line}\n".encode())

    def save(self, state: dict, complete: bool = False) -> None:
        """Bring everything to disk and record how far the run is."""
        sizes = {}
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            sizes[name] = file.tell()
        self._write(
            _JOURNAL,
            json.dumps(
                {"task": self._task, "state": state, "sizes": sizes, "complete": complete}
            ).encode(),
        )
        self.state, self.saved, self.complete = state, True, complete

    def lengths(self, name: str) -> numpy.ndarray:
        """[documents] int32 of a dataset, once complete."""
        return numpy.fromfile(self.folder / f"{name}.lengths", dtype=numpy.int32)

    def publish(self) -> list[str]:
        """Give the finished files their names; a kill in between loses nothing.

        Returns:
            The datasets that exist now: those with documents.
        """
        published = []
        for name in self._names:
            target = dataset_prefix(self._prefix, name)
            lengths = self.lengths(name)
            if not len(lengths):
                continue
            published.append(name)
            data = self.folder / f"{name}.bin"
            if not data.exists() and Path(f"{target}.idx").exists():
                continue  # an earlier process came so far
            with open(self.folder / "idx", "wb") as stream:
                write_index(stream, lengths, self._dtype)
                stream.flush()
                os.fsync(stream.fileno())
            # An old index never stands beside new data: without an index there is no dataset.
            Path(f"{target}.idx").unlink(missing_ok=True)
            # Where Megatron keeps the samples that it cut from the old data, by name alone.
            shutil.rmtree(target / "cache" / "GPTDataset_indices", ignore_errors=True)
            if data.exists():
                os.replace(data, f"{target}.bin")
            os.replace(self.folder / "idx", f"{target}.idx")
        skipped = self.folder / SKIPPED
        if skipped.exists() and skipped.stat().st_size:
            os.replace(skipped, f"{self._prefix}.{SKIPPED}")
        return published

    def close(self) -> None:
        """Close the files; what was saved stays for another start."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._lock.close()

    def remove(self) -> None:
        """Close, and leave nothing."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _open(self, sizes: dict[str, int]) -> None:
        wanted = [f"{name}{end}" for name in self._names for end in (".bin", ".lengths")]
        for name in (*wanted, SKIPPED):
            file = open(self.folder / name, "r+b" if name in sizes else "w+b")
            self._files[name] = file
            file.seek(0, os.SEEK_END)
            if file.tell() < sizes.get(name, 0):
                raise UsageError(
                    f"{self.folder / name} is shorter than when it was saved. Remove "
                    f"{self.folder}, or give --overwrite, and begin anew."
                )
            file.truncate(sizes.get(name, 0))
            file.seek(0, os.SEEK_END)

    def _read_journal(self, overwrite: bool) -> dict | None:
        path = self.folder / _JOURNAL
        if not path.exists():
            return None
        journal = json.loads(path.read_text(encoding="utf-8"))
        before = journal["task"]
        differ = [key for key in {**before, **self._task} if before.get(key) != self._task.get(key)]
        if differ and overwrite:
            return None
        if differ:
            raise UsageError(
                f"{self.folder} is an unfinished dataset with other {', '.join(differ)}. Finish it "
                "with the arguments and files that it was begun with, or give --overwrite."
            )
        return journal

    def _write(self, name: str, content: bytes) -> None:
        temporary = self.folder / f"{name}.new"
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / name)


def dataset_prefix(prefix: Path, name: str) -> Path:
    """Path of a dataset of a run, without ending."""
    return prefix.with_name(f"{prefix.name}.{name}") if name else prefix
