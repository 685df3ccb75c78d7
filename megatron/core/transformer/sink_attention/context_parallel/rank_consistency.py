# Copyright (c) 2026, the megatron-core gptoss authors.

"""Check that all ranks of a group make the same call.

On the CPU in every call. On a GPU, where the check waits for the device, only in the first call of
a kind in a group; a later mismatch ends in the group's timeout.
"""

import hashlib

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.transformer.sink_attention.context_parallel.collectives import gather_tensor

_seen: set[tuple[str, str]] = set()


def check_ranks_match(arguments: dict, device: torch.device, group: ProcessGroup) -> None:
    """Compare arguments (name -> anything with a repr) over the group.

    Raises:
        RuntimeError: they differ; the message has the value of every rank.
    """
    signature = repr(arguments)
    known = (group.group_name, signature)
    if device.type != "cpu" and known in _seen:
        return
    digest = hashlib.blake2b(signature.encode(), digest_size=8).digest()
    own = torch.tensor([int.from_bytes(digest, "little", signed=True)], device=device)
    everyone = own.new_empty(group.size())
    gather_tensor(everyone, own, group=group)
    if (everyone == own).all():  # waits for the device
        if device.type != "cpu":
            _seen.add(known)
        return
    values = [None] * group.size()
    torch.distributed.all_gather_object(values, arguments, group=group)
    lines = []
    for name in arguments:
        found = [value.get(name) for value in values]
        if any(value != found[0] for value in found):
            each = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(found))
            lines.append(f"{name}: {each}")
    raise RuntimeError(
        "Context parallel ranks call attention with different arguments. " + "; ".join(lines) + "."
    )


def contents(x: Tensor | None) -> str | None:
    """Shape and digest of the values of a tensor on the CPU; only the shape on a GPU."""
    if x is None:
        return None
    if x.device.type != "cpu":
        return str(list(x.shape))
    digest = hashlib.blake2b(x.contiguous().numpy().tobytes(), digest_size=4).hexdigest()
    return f"{list(x.shape)} {digest}"
