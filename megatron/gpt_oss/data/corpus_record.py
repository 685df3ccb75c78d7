# Copyright (c) 2026, the megatron-core gptoss authors.

"""PREFIX.json of `gptoss tokenize`: a summary, and the record of the output files.

The record has size and SHA-256 of each file under the name without PREFIX, so that it stays valid
if all files are renamed. `gptoss verify-data` checks it, and only files in it are replaced.
"""

import json
import os
from pathlib import Path
from typing import Iterable, Sequence

from megatron.gpt_oss.data.indexed_dataset import LOSS
from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.outputs import MADE_BY, check_apart, check_mine, is_unchanged

TOKENIZE = "gptoss tokenize"
VERSION = 1
SUMMARY, HISTOGRAM, SKIPPED = ".json", ".png", ".skipped.txt"
DATASET = (".bin", ".idx")


def dataset_prefix(prefix: Path, name: str) -> Path:
    """Path of a dataset of a run, without extension."""
    return prefix.with_name(f"{prefix.name}.{name}") if name else prefix


def loss_name(name: str) -> str:
    """The dataset with the loss weights of a dataset: 'valid' -> 'valid.loss'."""
    return f"{name}.{LOSS}" if name else LOSS


def ending(name: str, end: str) -> str:
    """The name of a dataset's file without PREFIX: ('valid', '.bin') -> '.valid.bin'."""
    return f".{name}{end}" if name else end


def output_of(prefix: Path, end: str) -> Path:
    """The file of an output with an extension."""
    return prefix.with_name(prefix.name + end)


def check_prefix(output: str | Path) -> Path:
    """--output as a path without extension.

    Raises:
        UsageError: it names a directory.
    """
    text = os.fspath(output)
    if not text.strip() or text.endswith(("/", "/.", "/..")) or text in (".", ".."):
        raise UsageError(
            f"--output {text!r} names a directory. Give the path of the .bin and .idx without "
            "extension, such as data/corpus."
        )
    return Path(text)


def read_record(prefix: Path) -> dict | None:
    """PREFIX.json with its modification time in ns as `written`.

    None if `gptoss tokenize` did not write it.
    """
    path = output_of(prefix, SUMMARY)
    if not path.is_file():
        return None
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
    """(PREFIX of the record, record, name) of a dataset, which may be a part of a corpus."""
    record = read_record(prefix)
    if record is not None:
        return prefix, record, ""
    start, dot, name = prefix.name.rpartition(".")
    if not dot or not start:
        return None
    corpus = prefix.with_name(start)
    record = read_record(corpus)
    return (corpus, record, name) if record is not None and name in record["datasets"] else None


def check_outputs(
    prefix: Path,
    names: Sequence[str],
    overwrite: bool,
    inputs: Iterable[Path],
    named_already: Iterable[Path] = (),
) -> None:
    """Reject an output that would replace an input, or a file of another command.

    Args:
        prefix: of the output.
        names: of its datasets.
        overwrite: an earlier output may be replaced.
        inputs: the files that are read.
        named_already: files that a killed process of this output has renamed already.
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
            continue  # a link whose target will be created
        if end in (SUMMARY, HISTOGRAM):
            if known:  # a killed process may have written it
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
    """Files of the replaced output that the new one does not have; they are to be removed."""
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
