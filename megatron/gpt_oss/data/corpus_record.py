# Copyright (c) 2026, the megatron-core gptoss authors.

"""PREFIX.json of `gptoss tokenize`: what was written, and the record of its files.

The record names each file beside PREFIX.json by what follows PREFIX, so that it stays true where
all of them are renamed, and gives size and SHA-256: `gptoss verify-data` reads them, and a file that
is not in it is not replaced.
"""

import json
import os
from pathlib import Path
from typing import Iterable, Sequence

from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.outputs import MADE_BY, check_apart, check_mine, is_unchanged

TOKENIZE = "gptoss tokenize"
VERSION = 1
SUMMARY, HISTOGRAM, SKIPPED = ".json", ".png", ".skipped.txt"
DATASET = (".bin", ".idx")


def dataset_prefix(prefix: Path, name: str) -> Path:
    """Path of a dataset of a run, without ending."""
    return prefix.with_name(f"{prefix.name}.{name}") if name else prefix


def ending(name: str, end: str) -> str:
    """What follows PREFIX in the name of a dataset's file: ('valid', '.bin') -> '.valid.bin'."""
    return f".{name}{end}" if name else end


def output_of(prefix: Path, end: str) -> Path:
    """The file of an output with an ending."""
    return prefix.with_name(prefix.name + end)


def check_prefix(output: str | Path) -> Path:
    """--output as the path of files without ending.

    Raises:
        UsageError: it names a directory, not files in one.
    """
    text = os.fspath(output)
    if not text.strip() or text.endswith(("/", "/.", "/..")) or text in (".", ".."):
        raise UsageError(
            f"--output {text!r} names a directory. Give the path of the .bin and .idx without "
            "extension, such as data/corpus."
        )
    return Path(text)


def read_record(prefix: Path) -> dict | None:
    """The content of PREFIX.json, with the time at which it was `written` in ns; None: not ours."""
    path = output_of(prefix, SUMMARY)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record[MADE_BY] != TOKENIZE or record["version"] != VERSION:
            return None
        if not isinstance(record["outputs"], dict) or not isinstance(record["datasets"], dict):
            return None
        return record | {"written": path.stat().st_mtime_ns}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def owner_of(prefix: Path) -> tuple[Path, dict, str] | None:
    """(PREFIX of the record, record, name) of the dataset at a path, also of a part of a corpus."""
    record = read_record(prefix)
    if record is not None:
        return prefix, record, ""
    start, dot, name = prefix.name.rpartition(".")
    if not dot or not start:
        return None
    whole = prefix.with_name(start)
    record = read_record(whole)
    return (whole, record, name) if record is not None and name in record["datasets"] else None


def check_outputs(
    prefix: Path,
    names: Sequence[str],
    overwrite: bool,
    inputs: Iterable[Path],
    named_already: Iterable[Path] = (),
) -> None:
    """Refuse to write over what is read, and over what `gptoss tokenize` did not make.

    Args:
        prefix: of the output.
        names: of its datasets.
        overwrite: an earlier output may be replaced.
        inputs: the files that are read.
        named_already: files of this very output, from a start that was killed.
    Raises:
        UsageError: names the file and what to do.
    """
    datasets = [ending(name, end) for name in names for end in DATASET]
    outputs = {end: output_of(prefix, end) for end in (*datasets, SUMMARY, HISTOGRAM, SKIPPED)}
    check_apart(outputs.values(), inputs, "--output")
    record = read_record(prefix)
    known = set(named_already)
    for end, path in outputs.items():
        if not os.path.lexists(path) or path in known:
            continue
        if path.is_dir():
            raise UsageError(f"{path} is a directory. Give another --output.")
        if not path.exists():
            continue  # a link that leads to nothing yet: it will
        if end in (SUMMARY, HISTOGRAM):
            if known:  # it may be that of the start before
                check_mine(path, TOKENIZE, "--output")
                continue
            mine = record is not None if end == SUMMARY else _is_mine(path)
        else:
            mine = _is_recorded(path, end, record)
        if not mine and path.stat().st_size:
            raise UsageError(
                f"{path} exists, but {TOKENIZE} did not write it, or it changed since. "
                "Give another --output, or move that file away."
            )
        if not overwrite:
            raise UsageError(f"{path} exists. Give another name, or --overwrite.")


def _is_mine(path: Path) -> bool:
    try:
        check_mine(path, TOKENIZE, "--output")
    except UsageError:
        return False
    return True


def _is_recorded(path: Path, end: str, record: dict | None) -> bool:
    if record is None or end not in record["outputs"]:
        return False
    return is_unchanged(path.resolve(), record["outputs"][end], record["written"])


def former_outputs(prefix: Path, kept: Iterable[str]) -> list[Path]:
    """Files of the output that is replaced, which the new one does not have: to be removed."""
    record = read_record(prefix)
    if record is None:
        return []
    ends = sorted(set(record["outputs"]) - set(kept), reverse=True)  # .idx before .bin
    return [
        output_of(prefix, end)
        for end in ends
        if os.sep not in end
        and end.endswith((*DATASET, SKIPPED))
        and output_of(prefix, end).is_file()
        and _is_recorded(output_of(prefix, end), end, record)
    ]
