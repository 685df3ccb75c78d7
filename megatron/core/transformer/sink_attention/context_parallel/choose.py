# Copyright (c) 2026, the megatron-core gptoss authors.

"""Which exchange a call takes.

A windowed layer exchanges its halo, whatever was asked for. So does "auto" for a pack whose
documents are all shorter than a chunk: the longest document is a window. Else "auto" goes by
comm_table.json, which `benchmarks/context_parallel.py --write-table` writes; where nothing was
measured, by DEFAULT.

    {"cards": {"sm90": [{"min_seqlen": 0, "order": ["all_gather", "a2a", "p2p"]}, ...]}}
"""

import json
import os
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.transformer.sink_attention.autotable import card_family
from megatron.core.transformer.sink_attention.context_parallel.layout import (
    Group,
    chunk_length,
    group_size,
)
from megatron.core.transformer.sink_attention.context_parallel.ulysses import kv_copies

PATH = Path(__file__).with_name("comm_table.json")

DEFAULT = ("all_gather", "a2a", "p2p")

COMM_TYPES = ("auto", "p2p", "all_gather", "a2a", "a2a+p2p")


def check_comm_type(comm_type: str, group: Group | None) -> None:
    """Names, and the kind of group that they need.

    Raises:
        ValueError: the type is unknown, or the group is of the other kind.
    """
    if comm_type not in COMM_TYPES:
        raise ValueError(
            f"cp_comm_type: '{comm_type}' is unknown; wanted one of {', '.join(COMM_TYPES)}."
        )
    if group is None or isinstance(group, ProcessGroup):
        if comm_type == "a2a+p2p" and group_size(group) > 1:
            raise ValueError(
                "cp_group: is one group, and cp_comm_type 'a2a+p2p' needs two, [a2a, p2p]; Megatron "
                "makes them with --hierarchical-context-parallel-sizes."
            )
        return
    if len(group) != 2:
        raise ValueError(f"cp_group: is {len(group)} groups; wanted one, or two, [a2a, p2p].")
    if comm_type not in ("auto", "a2a+p2p"):
        raise ValueError(
            f"cp_comm_type: is '{comm_type}' with two groups in cp_group; wanted 'a2a+p2p' or "
            "'auto', or one group."
        )


def halo_window(window: int | None, packed: bool, max_seqlen: int, length: int) -> int | None:
    """The window that makes every key that is seen a halo's; None if a halo is not worth it.

    Args:
        length: of a chunk.
    """
    if window is not None and window < max_seqlen:
        return window
    return max_seqlen if packed and max_seqlen <= length else None


def choose_exchange(
    query: Tensor,
    key: Tensor,
    group: Group,
    comm_type: str,
    *,
    window: int | None,
    packed: bool,
    max_seqlen: int,
) -> tuple[str, int | None]:
    """What a call with this rank's query and key does.

    Args:
        max_seqlen: of the longest document, or the whole sequence.
    Returns:
        The exchange: "halo", "all_gather", "p2p", "a2a" or "a2a+p2p"; and the window of the halo,
        which is None without one. With "a2a+p2p" it stands in for the ring.
    """
    ranks = group_size(group)
    length = chunk_length(query.shape[0] * ranks, ranks)
    reach = halo_window(window, packed and comm_type == "auto", max_seqlen, length)
    if not isinstance(group, ProcessGroup):
        return "a2a+p2p", reach
    if reach is not None:
        return "halo", reach
    return (_measured_best(query, key, ranks) if comm_type == "auto" else comm_type), None


def _measured_best(query: Tensor, key: Tensor, ranks: int) -> str:
    for name in _order(query.device, query.shape[0] * ranks):
        if name != "a2a" or _shareable(query.shape[-2], key.shape[-2], ranks):
            return name
    return DEFAULT[0]


def _shareable(heads: int, kv_heads: int, ranks: int) -> bool:
    """Whether a2a needs no copies of key heads."""
    return heads % ranks == 0 and kv_copies(heads, kv_heads, ranks) == 1


def _order(device: torch.device, tokens: int) -> list[str]:
    if device.type != "cuda":
        return list(DEFAULT)
    card = card_family(torch.cuda.get_device_capability(device))
    rows = [row for row in load().get("cards", {}).get(card, []) if row["min_seqlen"] <= tokens]
    return max(rows, key=lambda row: row["min_seqlen"])["order"] if rows else list(DEFAULT)


@lru_cache(maxsize=1)
def load() -> dict:
    """The table as it is on the disk."""
    return json.loads(PATH.read_text()) if PATH.exists() else {}


def write(card: str, rows: list[dict], measured_by: dict) -> None:
    """Replace the rows of one card, and say how they were measured."""
    table = json.loads(PATH.read_text()) if PATH.exists() else {}
    table.setdefault("cards", {})[card] = rows
    table.setdefault("measured_by", {})[card] = measured_by
    temporary = PATH.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(table, indent=1) + "\n")
    temporary.replace(PATH)
    load.cache_clear()
