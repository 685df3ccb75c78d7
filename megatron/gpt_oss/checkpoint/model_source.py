# Copyright (c) 2026, the megatron-core gptoss authors.

"""Tensors of a model in memory, for export without a checkpoint on disk."""

import torch

from megatron.gpt_oss.checkpoint.load_hf import sharded_tensors
from megatron.gpt_oss.checkpoint.mapping import locate


class ModelSource:
    """A `MegatronSource` over a complete model on one rank (TP, PP and EP of 1).

    Args:
        model: a GPTModel, unwrapped.
    """

    def __init__(self, model: torch.nn.Module):
        self._global: dict[str, torch.Tensor] = {}
        self._layers: dict[tuple[str, int], torch.Tensor] = {}
        with torch.no_grad():
            for part in sharded_tensors(model.sharded_state_dict()):
                where = locate(part.key, part.global_offset, part.local_shape)
                prepended = part.prepend_axis_num
                shape = part.global_shape[prepended:]
                index = where.index
                if where.layer is None:
                    target = self._global.setdefault(where.key, part.data.new_empty(shape))
                else:
                    if where.expert is not None:
                        shape = (part.global_shape[prepended - 1], *shape)
                        index = (where.expert, *index)
                    at = (where.key, where.layer)
                    target = self._layers.setdefault(at, part.data.new_empty(shape))
                target[index] = part.data

    def global_tensor(self, key: str, rows: slice = slice(None)) -> torch.Tensor:
        """See `MegatronSource`."""
        return self._global[key][rows]

    def layer(self, keys: tuple[str, ...], layer: int, expert: int | None = None) -> torch.Tensor:
        """See `MegatronSource`."""
        tensor = next(self._layers[key, layer] for key in keys if (key, layer) in self._layers)
        return tensor if expert is None else tensor[expert]
