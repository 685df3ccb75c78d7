# Copyright (c) 2026, the megatron-core gptoss authors.

"""metrics.jsonl: one JSON object per line, in the order in which a run logged them."""

import json
import math
import sys
from pathlib import Path
from typing import Any, Iterator

from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.json_file import brief, parse_json
from megatron.gpt_oss.outputs import naming, write_file

# Fields that hold one number, or null.
_NUMBERS = frozenset(
    """loss valid_loss test_loss learning_rate grad_norm tokens tokens_per_second_per_gpu
    tflops_per_gpu mfu load_balancing_loss global_load_balancing_loss z_loss""".split()
)
# Records with one of these need a step.
_STEP_FIELDS = ("loss", "valid_loss", "test_loss", "experts", "norms", "sample")
# Keys within a field that the previous version named differently.
_RENAMED = {
    "checkpoint": {
        "seconds_held_up": "blocking_seconds",
        "seconds_in_background": "background_seconds",
    },
    "experts": {"busiest_share": "max_expert_share", "busiest_rank": "ep_load_imbalance"},
    "norms": {"lowest": "min", "highest": "max"},
}


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl.

    A truncated last line of a killed run is dropped. Keys of the previous version get their new
    names.

    Raises:
        UsageError: no such file, or a line that is no record; names line and field.
    """
    records = []
    for number, is_last, found in _records(Path(path)):
        if isinstance(found, dict):
            records.append(found)
        elif not is_last:
            raise UsageError(f"{path}, line {number}: {found}. Fix the line, or remove it.")
    return records


def _records(path: Path) -> Iterator[tuple[int, bool, dict[str, Any] | str]]:
    """(line number, whether it is the truncated last line, record or what is wrong with it)."""
    if not path.is_file():
        what = f"{path} is not a file" if path.exists() else f"No file {path}"
        raise UsageError(f"{what}. Give the metrics.jsonl of a run.")
    try:
        with open(path, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                is_last = not line.endswith(b"\n")
                try:
                    record = parse_json(line)
                except ValueError as error:
                    yield number, is_last, f"not JSON ({error})"
                else:
                    yield number, False, _problem(record) or _with_current_keys(record)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error


def _problem(record: Any) -> str | None:
    """What is wrong with a record, with the name of the field; None if it is valid."""
    if not isinstance(record, dict):
        return f"not a record but {brief(record)}"
    step = record.get("step")
    if "step" in record and not (type(step) is int and 0 <= step < 2**53):
        return f"step is {brief(step)}, not a step number"
    for name in _STEP_FIELDS:
        if name in record and step is None:
            return f"it has {name} but no step"
    for name in _NUMBERS & record.keys():
        if record[name] is not None and not _is_number(record[name]):
            return f"{name} is {brief(record[name])}, not a number"
    if not isinstance(record.get("set", ""), str):
        return f"set is {brief(record['set'])}, not a name"
    sample = record.get("sample", {"text": ""})
    if not isinstance(sample, dict) or not isinstance(sample.get("text"), str):
        return f"sample is {brief(sample)}, which has no text"
    experts, norms = record.get("experts", {}), record.get("norms", {})
    if not isinstance(experts, dict) or not all(map(_is_list_of_numbers, experts.values())):
        return f"experts is {brief(experts)}, not lists of numbers"
    if not isinstance(norms, dict) or not all(
        isinstance(part, dict) and _is_list_of_numbers(list(part.values()))
        for part in norms.values()
    ):
        return f"norms is {brief(norms)}, not tables of numbers"
    return None


def _with_current_keys(record: dict[str, Any]) -> dict[str, Any]:
    """A valid record without key names of the previous version."""
    for field, names in _RENAMED.items():
        if isinstance(found := record.get(field), dict):
            record[field] = _renamed(found, names)
    return record


def _renamed(value: Any, names: dict[str, str]) -> Any:
    if not isinstance(value, dict):
        return value
    return {names.get(key, key): _renamed(inner, names) for key, inner in value.items()}


def _is_list_of_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(item is None or _is_number(item) for item in value)


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def append_metrics(path: Path, record: dict[str, Any]) -> None:
    """Append one record; NaN and infinity become null."""
    with naming(path), open(path, "a", encoding="utf-8") as stream:
        stream.write(_line(record))


def _line(record: dict[str, Any]) -> str:
    """A record as JSON, which has neither NaN nor infinity."""
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def drop_from(path: Path, step: int, evaluations_only: bool = False) -> None:
    """Remove the records from `step` on, because the run resumes before it.

    An invalid line is reported and removed; it must not prevent a resume.

    Args:
        evaluations_only: remove only records of validation and test sets.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return
    kept = []
    for number, is_last, record in _records(path):
        if isinstance(record, str):
            if not is_last:
                print(f"note: {path}, line {number}: {record}; line skipped", file=sys.stderr)
        elif record.get("step", 0) < step or (evaluations_only and "set" not in record):
            kept.append(record)
    write_file(path, "".join(map(_line, kept)))
