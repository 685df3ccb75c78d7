# Copyright (c) 2026, the megatron-core gptoss authors.

"""The order in which "auto" tries the backends: measured, kept in autotable.json.

    {"cards": {"sm90": {"causal": [{"min_seqlen": 0, "order": ["fa4", ...]}, ...]}}}

The kinds are causal, window, packed_causal and packed_window. `benchmarks/attention.py
--write-table` replaces the rows that it measured. Backends that a row does not name come after it,
in the order of DEFAULT.
"""

import json
import os
from functools import lru_cache
from pathlib import Path

import torch

from megatron.core.transformer.sink_attention.attention_params import Case

PATH = Path(__file__).with_name("autotable.json")

DEFAULT = ("fa4", "fa4_native", "fa3", "cudnn", "fa2", "aten_fa2", "flex", "math")

# Without tensor cores' types there is no flash kernel; compiling flex for a test's shape costs a
# minute, tiles of plain products cost none.
_FULL_PRECISION = ("math", "flex")


def card_family(capability: tuple[int, int]) -> str:
    """What a row of the table is for: sm90 for an H100."""
    return f"sm{capability[0]}{capability[1]}"


def order(case: Case) -> list[str]:
    """Names of all backends, the fastest of this kind of case on this card first."""
    if case.dtype in (torch.float32, torch.float64):
        preferred = _FULL_PRECISION
    else:
        preferred = _measured(card_family(case.capability), case.kind, case.seqlen_q)
    return [*preferred, *(name for name in DEFAULT if name not in preferred)]


def _measured(card: str, kind: str, seqlen: int) -> list[str]:
    rows = load().get("cards", {}).get(card, {}).get(kind, [])
    fitting = [row for row in rows if row["min_seqlen"] <= seqlen]
    if not fitting:
        return []
    return [n for n in max(fitting, key=lambda row: row["min_seqlen"])["order"] if n in DEFAULT]


@lru_cache(maxsize=1)
def load() -> dict:
    """The table as it is on the disk."""
    return json.loads(PATH.read_text()) if PATH.exists() else {}


def write(card: str, rows: dict[str, list[dict]], measured_by: dict) -> None:
    """Replace the rows of one card, and say how they were measured."""
    table = json.loads(PATH.read_text()) if PATH.exists() else {}
    table.setdefault("cards", {}).setdefault(card, {}).update(rows)
    table.setdefault("measured_by", {})[card] = measured_by
    temporary = PATH.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(table, indent=1) + "\n")
    temporary.replace(PATH)
    load.cache_clear()
