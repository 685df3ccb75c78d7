# Copyright (c) 2026, the megatron-core gptoss authors.

"""Which scheme of context parallelism a call takes.

A layer with a window exchanges its halo, whatever cp_comm_type is. So does "auto" for packed
documents that are all shorter than a chunk: the longest document bounds what a query sees.
Otherwise "auto" takes the measured order of the GPU, or DEFAULT without a measurement. A group over
several nodes takes the estimate of docs/context_parallel.md: the ring, and from 32 ranks on
all-to-all, if the ranks divide the heads.
"""

import os
from typing import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.kernel_selection import KernelChoice
from megatron.core.transformer.sink_attention.attention_params import AttentionParams
from megatron.core.transformer.sink_attention.context_parallel.layout import (
    Group,
    chunk_length,
    group_size,
)
from megatron.core.transformer.sink_attention.context_parallel.ulysses import kv_copies
from megatron.core.transformer.sink_attention.measured_order import measured_order

# All-to-all first: it merges no partial results, and was the fastest of those right on GPUs.
DEFAULT = ("a2a", "all_gather", "p2p")

# From this number of ranks on all-to-all between nodes is faster than the ring, by estimate.
_MANY_RANKS = 32

COMM_TYPES = ("auto", "p2p", "all_gather", "a2a", "a2a+p2p")


def check_comm_type(comm_type: str, group: Group | None) -> None:
    """Check the type, and that the group is of the kind that it needs.

    Raises:
        ValueError: the type is unknown, or needs the other kind of group.
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


def halo_size(params: AttentionParams, documents_bound_halo: bool, length: int) -> int | None:
    """Keys before a chunk that its queries see; None if there is no scheme for so many.

    Args:
        params: of the complete sequence.
        documents_bound_halo: documents that fit into a chunk count as a window.
        length: tokens of a chunk.
    """
    if params.has_window:
        return params.window_size[0]
    if documents_bound_halo and params.packed and params.max_seqlen_q <= length:
        return params.max_seqlen_q - 1
    return None


def choose_scheme(
    query: Tensor, key: Tensor, params: AttentionParams, group: Group, comm_type: str
) -> tuple[str, int | None]:
    """The scheme of a call.

    Args:
        query, key: tokens of this rank.
        params: cu_seqlens and max_seqlen describe the complete sequence.
    Returns:
        "halo", "all_gather", "p2p", "a2a" or "a2a+p2p"; and the keys of the halo before each chunk,
        None without a halo. With "a2a+p2p" the halo replaces the ring.
    """
    ranks = group_size(group)
    length = chunk_length(query.shape[0] * ranks, ranks)
    left = halo_size(params, comm_type == "auto", length)
    if not isinstance(group, ProcessGroup):
        return "a2a+p2p", left
    if left is not None:
        return "halo", left
    if comm_type == "auto":
        members = torch.distributed.get_process_group_ranks(group)
        comm_type = SCHEMES.select(query, key, members).name
    return comm_type, None


class _AnyCall:
    """A scheme that supports every call."""

    def __init__(self, name: str):
        self.name = name

    def unsupported_reason(self, query: Tensor, key: Tensor, members: Sequence[int]) -> None:
        return None


class _AllToAll:
    """Needs heads divisible by the ranks; copies of key heads pay off with many ranks only."""

    name = "a2a"

    def unsupported_reason(self, query: Tensor, key: Tensor, members: Sequence[int]) -> str | None:
        ranks, heads = len(members), query.shape[-2]
        if heads % ranks:
            return f"{heads} query heads are not divisible by {ranks} ranks"
        if ranks < _MANY_RANKS and kv_copies(heads, key.shape[-2], ranks) > 1:
            return f"{key.shape[-2]} key heads would be copied for {ranks} ranks"
        return None


def order(device: torch.device, tokens: int, members: Sequence[int]) -> list[str]:
    """Schemes for layers without a window, the fastest first.

    Args:
        tokens: of the complete sequence.
        members: global ranks of the group; torchrun numbers them node by node.
    """
    if device.type != "cuda":
        return [*DEFAULT]
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE") or torch.cuda.device_count())
    if len({rank // per_node for rank in members}) > 1:
        return ["a2a", "p2p"] if len(members) >= _MANY_RANKS else ["p2p"]
    return measured_order(torch.cuda.get_device_capability(device), "context_parallel", tokens) or [
        *DEFAULT
    ]


SCHEMES = KernelChoice(
    "cp_comm_type",
    (_AllToAll(), _AnyCall("all_gather"), _AnyCall("p2p")),
    order=lambda query, key, members: order(query.device, len(query) * len(members), members),
)
