# Copyright (c) 2026, the megatron-core gptoss authors.

"""metrics.jsonl: one JSON object a line, in the order in which a run logged them."""

import json
from pathlib import Path
from typing import Any

from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.outputs import naming, write_file


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl.

    A last line that a killed run left half-written is dropped.

    Raises:
        UsageError: no such file, or a line that is not JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"No file {path}. Give the metrics.jsonl of a run.")
    lines = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise UsageError(f"{path}, line {number}: not JSON ({error}).") from error
    return records


def append_metrics(path: Path, record: dict[str, Any]) -> None:
    """Add one record."""
    with naming(path), open(path, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")


def drop_from(path: Path, step: int, evaluations_only: bool = False) -> None:
    """Keep what was logged before `step`: the steps from there on will be recomputed.

    Args:
        evaluations_only: of records of validation and test sets; all others stay.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return
    kept = [
        record
        for record in read_metrics(path)
        if record.get("step", 0) < step or (evaluations_only and "set" not in record)
    ]
    write_file(path, "".join(json.dumps(record) + "\n" for record in kept))
