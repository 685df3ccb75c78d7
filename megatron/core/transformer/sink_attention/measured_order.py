# Copyright (c) 2026, the megatron-core gptoss authors.

"""Measured orders: which backend, and which exchange of context parallelism, "auto" tries first.

measured_order.json holds, for each GPU family and kind of call, rows that apply from a number of
tokens on:

    {"cards": {"sm90": {"causal": [{"min_seqlen": 0, "order": ["fa4", ...]}, ...]}}}

Kinds: causal, window, packed_causal and packed_window (`benchmarks/kernels/attention.py --write-table`),
context_parallel (`benchmarks/kernels/context_parallel.py --write-table`).
"""

import json
import os
from functools import lru_cache
from pathlib import Path

import torch

from megatron.core.transformer.sink_attention.attention_params import AttentionParams

PATH = Path(__file__).with_name("measured_order.json")

# Order of the backends that no row names.
DEFAULT = ("fa4", "fa4_native", "fa3", "cudnn", "fa2", "aten_fa2", "flex", "math")

# The flash kernels take bf16 and fp16 only. math comes first: flex compiles for a minute per shape.
_FULL_PRECISION = ("math", "flex")


def card_family(capability: tuple[int, int]) -> str:
    """Key of a GPU in the table: sm90 for an H100."""
    return f"sm{capability[0]}{capability[1]}"


def kind_of_mask(has_window: bool, packed: bool) -> str:
    """Key of a call of attention in the table."""
    mask = "window" if has_window else "causal"
    return f"packed_{mask}" if packed else mask


def backend_order(params: AttentionParams) -> list[str]:
    """Names of all backends, the fastest for this kind of call on this GPU first."""
    if params.dtype in (torch.float32, torch.float64):
        preferred = _FULL_PRECISION
    else:
        kind = kind_of_mask(params.has_window, params.packed)
        measured = measured_order(params.capability, kind, params.num_tokens_q)
        preferred = [name for name in measured if name in DEFAULT]
    return [*preferred, *(name for name in DEFAULT if name not in preferred)]


def measured_order(capability: tuple[int, int], kind: str, tokens: int) -> list[str]:
    """The order in the row for this many tokens; empty without a measurement."""
    rows = load().get("cards", {}).get(card_family(capability), {}).get(kind, [])
    rows = [row for row in rows if row["min_seqlen"] <= tokens]
    return max(rows, key=lambda row: row["min_seqlen"])["order"] if rows else []


@lru_cache(maxsize=1)
def load() -> dict:
    """The table in the file."""
    return json.loads(PATH.read_text()) if PATH.exists() else {}


def write(card: str, rows: dict[str, list[dict]], measured_by: dict) -> None:
    """Replace the rows of some kinds of one card.

    Args:
        rows: by kind.
        measured_by: machine and versions that the rows were measured with.
    """
    table = json.loads(PATH.read_text()) if PATH.exists() else {}
    table.setdefault("cards", {}).setdefault(card, {}).update(rows)
    sources = table.setdefault("measured_by", {}).setdefault(card, {})
    sources.update(dict.fromkeys(rows, measured_by))
    temporary = PATH.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(table, indent=1) + "\n")
    temporary.replace(PATH)
    load.cache_clear()
