# Copyright (c) 2026, the megatron-core gptoss authors.

"""Which exchange a call takes.

A windowed layer exchanges its halo, whatever was asked for. So does "auto" for a pack whose
documents are all shorter than a chunk: the longest document is a window. Else "auto" goes by
comm_table.json, which `benchmarks/context_parallel.py --write-table` writes on one machine; where
nothing was measured, by DEFAULT. A group over several machines goes by the plan on paper in
docs/context_parallel.md: the ring, and from 32 ranks on all-to-all, if the heads can be shared out.

    {"cards": {"sm90": [{"min_seqlen": 0, "order": ["all_gather", "a2a", "p2p"]}, ...]}}
"""

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Sequence

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

# The all-to-all first: it merges no partial results, and was the fastest of those right on GPUs.
DEFAULT = ("a2a", "all_gather", "p2p")

# Ranks from which all-to-all between machines is faster than the ring, on paper.
_MANY = 32

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
                "cp_group: is one group, and cp_comm_type 'a2a+p2p' needs two, [a2a, p2p]; Megatron"
                " makes them with --hierarchical-context-parallel-sizes."
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
    if comm_type == "auto":
        members = torch.distributed.get_process_group_ranks(group)
        comm_type = _measured_best(query, key, members)
    return comm_type, None


def _measured_best(query: Tensor, key: Tensor, members: Sequence[int]) -> str:
    tokens, ranks = query.shape[0] * len(members), len(members)
    for name in order(query.device, tokens, members):
        if name != "a2a" or _shareable(query.shape[-2], key.shape[-2], ranks):
            return name
    return "all_gather"


def _shareable(heads: int, kv_heads: int, ranks: int) -> bool:
    """Whether a2a is worth it; with few ranks copies of key heads cost more than they save."""
    if heads % ranks:
        return False
    return ranks >= _MANY or kv_copies(heads, kv_heads, ranks) == 1


def order(device: torch.device, tokens: int, members: Sequence[int]) -> tuple[str, ...]:
    """Exchanges for full layers, the fastest first.

    Args:
        members: the group's ranks in the whole world; torchrun numbers them machine by machine.
    """
    if device.type != "cuda":
        return DEFAULT
    per_machine = int(os.environ.get("LOCAL_WORLD_SIZE") or torch.cuda.device_count())
    if len({rank // per_machine for rank in members}) > 1:
        return ("a2a", "p2p") if len(members) >= _MANY else ("p2p",)
    card = card_family(torch.cuda.get_device_capability(device))
    rows = [row for row in load().get("cards", {}).get(card, []) if row["min_seqlen"] <= tokens]
    return tuple(max(rows, key=lambda row: row["min_seqlen"])["order"]) if rows else DEFAULT


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
