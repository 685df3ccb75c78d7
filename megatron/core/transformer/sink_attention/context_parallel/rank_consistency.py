# Copyright (c) 2026, the megatron-core gptoss authors.

"""Do all ranks call with the same shapes? If not, an error on every rank that names them.

On the CPU in every call. On a GPU, where reading the answer waits for the device, the first time
that a rank's group sees a call of this kind; a mismatch in a later one ends in the group's timeout.
"""

import hashlib

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.transformer.sink_attention.context_parallel.collectives import gather_tensor

_seen: set[tuple[str, str]] = set()


def check_ranks_match(facts: dict, device: torch.device, group: ProcessGroup) -> None:
    """Compare facts (name -> anything with a repr) over the group.

    Raises:
        RuntimeError: they differ; names each rank's value of what does.
    """
    signature = repr(facts)
    known = (group.group_name, signature)
    if device.type != "cpu" and known in _seen:
        return
    digest = hashlib.blake2b(signature.encode(), digest_size=8).digest()
    own = torch.tensor([int.from_bytes(digest, "little", signed=True)], device=device)
    everyone = own.new_empty(group.size())
    gather_tensor(everyone, own, group=group)
    if (everyone == own).all():  # the one wait for the device
        if device.type != "cpu":
            _seen.add(known)
        return
    values = [None] * group.size()
    torch.distributed.all_gather_object(values, facts, group=group)
    lines = []
    for name in facts:
        found = [value.get(name) for value in values]
        if any(value != found[0] for value in found):
            each = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(found))
            lines.append(f"{name}: {each}")
    raise RuntimeError(
        "Context parallel ranks call attention with different arguments. " + "; ".join(lines) + "."
    )


def contents(x: Tensor | None) -> str | None:
    """A short name for the values of a tensor on the CPU; for one on a GPU, of its shape."""
    if x is None:
        return None
    if x.device.type != "cpu":
        return str(list(x.shape))
    digest = hashlib.blake2b(x.contiguous().numpy().tobytes(), digest_size=4).hexdigest()
    return f"{list(x.shape)} {digest}"
