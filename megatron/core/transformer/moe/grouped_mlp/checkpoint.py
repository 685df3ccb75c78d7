# Copyright (c) 2026, the megatron-core gptoss authors.

"""Sharded tensors of `GroupedExperts`, under the names and in the layout of SequentialMLP.

A parameter holds all local experts, [g, in, out] or [g, out]; a checkpoint holds each expert
separately, [out, in], gate and up apart. A ShardedTensorFactory converts both ways, and also
applies to the optimizer state of the parameter.
"""

from dataclasses import dataclass
from typing import Sequence

import torch

from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint


@dataclass(frozen=True)
class ExpertSharding:
    """Offsets of this rank's experts in the global tensors.

    Attributes:
        first_expert: global number of the first local expert.
        num_experts: of all ranks.
        sharded_offsets: of the layers, as `sharded_state_dict` is given them.
        tp_rank, tp_size: in the expert tensor parallel group.
        dp_rank: in the expert data parallel group.
        singleton: every expert is a tensor of its own, its number in the key.
    """

    first_expert: int
    num_experts: int
    sharded_offsets: tuple
    tp_rank: int
    tp_size: int
    dp_rank: int
    singleton: bool = False

    def key(self, prefix: str, name: str) -> str:
        """The key of a tensor of the experts; `{expert}` is replaced with a number later."""
        return f"{prefix}experts.{'{expert}.' if self.singleton else ''}{name}"

    def of_expert(self, key: str, index: int) -> tuple[str, tuple]:
        """Key and offsets of a local expert."""
        expert = self.first_expert + index
        if self.singleton:
            return key.replace("{expert}", str(expert)), self.sharded_offsets
        offset = (len(self.sharded_offsets), expert, self.num_experts)
        return key, (*self.sharded_offsets, offset)


def expert_factory(
    parameter: torch.Tensor,
    prefix: str,
    name: str,
    sharding: ExpertSharding,
    tp_axis: int | None,
    num_parts: int = 1,
) -> ShardedTensorFactory:
    """Make the checkpoint entry of one parameter of all local experts.

    Args:
        parameter: [g, in, out] or [g, out].
        prefix: key of the experts; theirs is `<prefix>experts.<name>`.
        name: e.g. "linear_fc1.weight".
        sharding: offsets of this rank's experts.
        tp_axis: axis of one expert's [out, in] or [out] that is split over tensor parallel ranks;
            None if every rank has all of it.
        num_parts: 2 if that axis holds gate and up, each of them split over the ranks.
    """
    replica_id = (0, 0 if tp_axis is not None else sharding.tp_rank, sharding.dp_rank)

    @torch.no_grad()
    def build(key, tensor, replica_id, flattened_range):
        assert flattened_range is None, "flattened parameters have no sharded layout"
        return [
            shard
            for index in range(tensor.shape[0])
            for shard in _expert_shards(
                key, tensor[index], index, replica_id, sharding, tp_axis, num_parts
            )
        ]

    shape = parameter.shape

    @torch.no_grad()
    def merge(shards: Sequence[torch.Tensor]) -> torch.Tensor:
        merged = shards[0].new_empty(shape)
        views = [part for one in merged for part in _parts(one, tp_axis, num_parts)]
        for view, shard in zip(views, shards, strict=True):
            view.copy_(shard)
        return merged

    return ShardedTensorFactory(sharding.key(prefix, name), parameter, build, merge, replica_id)


def expert_extra_states(
    prefix: str, name: str, num_local_experts: int, sharding: ExpertSharding
) -> dict[str, ShardedObject]:
    """The empty extra state that each linear layer of an expert has in a checkpoint.

    SequentialMLP and TEGroupedMLP write and require it. Keys are `<prefix><name>._extra_state<i>`.
    """
    replica_id = (0, sharding.tp_rank, sharding.dp_rank)
    states = {}
    for index in range(num_local_experts):
        key = sharding.key(prefix, f"{name}._extra_state")
        key, offsets = sharding.of_expert(key, index)
        states[f"{prefix}{name}._extra_state{index}"] = make_sharded_object_for_checkpoint(
            None, key, offsets, replica_id
        )
    return states


def _parts(one: torch.Tensor, tp_axis: int | None, num_parts: int) -> Sequence[torch.Tensor]:
    """Views of one expert's parameter in the layout of the checkpoint."""
    one = one.mT if one.dim() == 2 else one
    return one.chunk(num_parts, dim=tp_axis) if num_parts > 1 else (one,)


def _expert_shards(key, one, index, replica_id, sharding, tp_axis, num_parts):
    key, offsets = sharding.of_expert(key, index)
    prepended = len(offsets)
    for part, view in enumerate(_parts(one, tp_axis, num_parts)):
        part_key, fragments = key, sharding.tp_size * num_parts
        place = part * sharding.tp_size + sharding.tp_rank
        if sharding.singleton and num_parts > 1:
            part_key, fragments, place = f"{key}_{'wv'[part]}", sharding.tp_size, sharding.tp_rank
        split = [] if tp_axis is None else [(prepended + tp_axis, place, fragments)]
        yield ShardedTensor.from_rank_offsets(
            part_key, view, *offsets, *split, replica_id=replica_id, prepend_axis_num=prepended
        )


def check_optimizer_layout(args, saved_args, sharding_type: str) -> None:
    """Reject optimizer state in the parameter order of another experts module.

    GroupedExperts, SequentialMLP and TEGroupedMLP have the same number of parameters in a
    different order. Formats with the flat buffers of the distributed optimizer would load without
    an error (in sizes that are multiples of 64, where no parameter is padded), and give each
    parameter of the experts the state of another one.

    Args:
        args: of this run.
        saved_args: of the run that wrote the checkpoint.
        sharding_type: `distrib_optim_sharding_type` of the checkpoint.
    Raises:
        RuntimeError: a setting differs.
    """
    in_model_space = ("fully_reshardable", "fully_sharded_model_space")
    if sharding_type in in_model_space or getattr(args, "num_experts", None) is None:
        return
    for name in ("moe_grouped_gemm", "transformer_impl"):
        ours, saved = getattr(args, name, None), getattr(saved_args, name, None)
        if saved is not None and saved != ours:
            raise RuntimeError(
                f"The checkpoint's optimizer state ({sharding_type}) follows the order of the "
                f"parameters of a run with {name} = {saved}; here it is {ours}. Resume with "
                f"{saved}, save with --dist-ckpt-optim-fully-reshardable there, or begin with a "
                "fresh optimizer (--no-load-optim)."
            )
