# Copyright (c) 2026, the megatron-core gptoss authors.

"""run.json of a run: its path and its arguments. Imports neither torch nor Megatron."""

from pathlib import Path
from typing import Any

from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.json_file import read_json

RUN_FILE = "run.json"
OLD_RUN_FILE = "arguments.json"  # older versions; only the arguments


def find_run_file(directory: Path) -> Path | None:
    """run.json in a run's directory, or arguments.json of an older version."""
    files = (directory / name for name in (RUN_FILE, OLD_RUN_FILE))
    return next((path for path in files if path.is_file()), None)


def recorded_arguments(path: Path) -> dict[str, Any]:
    """The arguments in a run.json, or in the arguments.json of an older version, by name.

    Raises:
        UsageError: the file is damaged.
    """
    record = read_json(path)
    if path.name == OLD_RUN_FILE:
        return record
    arguments = record.get("arguments")
    if not isinstance(arguments, dict):
        raise UsageError(f"{path} has no arguments. Restore it, or remove it.")
    return arguments
