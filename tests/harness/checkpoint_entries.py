# Copyright (c) 2026, the megatron-core gptoss authors.

"""Independent reader of torch_dist checkpoints for tests, without Megatron."""

from typing import Any, Dict

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict


def read_checkpoint(folder: str) -> Dict[str, Any]:
    """Every entry of a torch_dist checkpoint: global tensors, and objects as they were pickled."""
    entries: Dict[str, Any] = {}
    _load_state_dict(
        entries,
        storage_reader=FileSystemReader(folder),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    return entries
