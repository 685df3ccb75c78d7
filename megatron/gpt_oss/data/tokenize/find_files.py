# Copyright (c) 2026, the megatron-core gptoss authors.

"""Find the input files of `gptoss tokenize`."""

import fnmatch
import glob
import os
from pathlib import Path
from typing import Sequence

from megatron.gpt_oss.errors import UsageError


def find_files(
    inputs: Sequence[str | Path], patterns: Sequence[str], exclude: Sequence[str] = ()
) -> list[Path]:
    """Find the files of files, directories and glob patterns, sorted and without duplicates.

    Args:
        inputs: files, directories, or glob patterns.
        patterns: file names to read in a directory.
        exclude: patterns of paths to skip.
    Raises:
        UsageError: an input matches nothing.
    """
    found: set[Path] = set()
    for item in map(str, inputs):
        if os.path.isdir(item):
            tree = (p for p in Path(item).rglob("*") if p.is_file())
            matches = [p for p in tree if any(_matches(p.name, n) for n in patterns)]
            hint = f" with a name like {', '.join(patterns)} (change it with --pattern)"
        else:
            matches = [Path(p) for p in glob.glob(item, recursive=True) if os.path.isfile(p)]
            matches = [Path(item)] if os.path.isfile(item) else matches
            hint = ""
        matches = [p for p in matches if not any(fnmatch.fnmatch(str(p), n) for n in exclude)]
        if not matches:
            raise UsageError(f"{item}: no file{hint}. Give files, directories or glob patterns.")
        found.update(matches)
    return sorted(found)


def _matches(name: str, pattern: str) -> bool:
    """Whether a name matches; a lower-case pattern also matches upper case ('*.jsonl', A.JSONL)."""
    name = name.lower() if pattern == pattern.lower() else name
    return fnmatch.fnmatchcase(name, pattern)
