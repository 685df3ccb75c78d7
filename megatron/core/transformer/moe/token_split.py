# Copyright (c) 2026, the megatron-core gptoss authors.

"""Experts under tensor parallelism without sequence parallelism.

Without sequence parallelism every tensor-parallel rank holds all tokens. Router, token dispatchers
and balancing losses of Megatron expect different tokens on each rank; otherwise an expert would see
each token once per rank. A training step therefore splits the sequence over the TP group before the
router and gathers it after the combine, as under sequence parallelism.

[s, b, h] = tokens, micro batch, hidden size.
"""

from typing import Optional

import torch

from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)


def check_tokens_can_be_split(config) -> None:
    """Reject modules that would treat the split sequence as the complete one.

    Raises:
        ValueError: for shared experts and latent projections, which are not summed over the TP
            group as the router is, and for a partly captured MoE layer.
    """
    unsupported = {
        "moe_shared_expert_intermediate_size": config.moe_shared_expert_intermediate_size,
        "moe_latent_size": getattr(config, "moe_latent_size", None),  # since 0.16
    }
    for name, value in unsupported.items():
        if value is not None:
            raise ValueError(
                f"{name} = {value} with tensor_model_parallel_size = "
                f"{config.tensor_model_parallel_size} needs sequence parallelism for training: "
                "set sequence_parallel=True (--sequence-parallel)."
            )
    modules = getattr(config, "cuda_graph_modules", None)  # since 0.18
    if config.cuda_graph_impl != "none" and modules:
        raise ValueError(
            f"cuda_graph_modules = {modules} of a model with experts under "
            "tensor parallelism needs sequence parallelism for training: set "
            "sequence_parallel=True (--sequence-parallel)."
        )


def mark_router(router: torch.nn.Module) -> None:
    """Make finalize_model_grads sum the router's gradients: TP ranks route different tokens."""
    for param in router.parameters():
        param.sum_gradients_across_tp_domain = True


def split_tokens(
    hidden_states: torch.Tensor, padding_mask: Optional[torch.Tensor], tp_group
) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
    """This rank's part of the sequence.

    Args:
        hidden_states: [s, b, h], the same on all ranks of tp_group.
        padding_mask: [s, b] bool, or None.
        tp_group: the tensor-parallel group of the attention.
    Returns:
        hidden_states [s / tp, b, h], whose gradient is gathered from all ranks, and the mask
        [s / tp, b].
    Raises:
        ValueError: if the sequence cannot be split evenly.
    """
    length, size = hidden_states.size(0), tp_group.size()
    if length % size:
        raise ValueError(
            f"Sequence length {length} is not a multiple of the tensor parallel size {size}, over "
            f"which experts split it. Pad it to {length + size - length % size}."
        )
    if padding_mask is not None:
        padding_mask = padding_mask.chunk(size)[tp_group.rank()]
    return scatter_to_sequence_parallel_region(hidden_states, group=tp_group), padding_mask


def join_tokens(hidden_states: torch.Tensor, tp_group) -> torch.Tensor:
    """Gather the complete sequence [s, b, h] from every rank's [s / tp, b, h].

    Its gradient is the same on all ranks; each takes its own part.
    """
    return gather_from_sequence_parallel_region(
        hidden_states, tensor_parallel_output_grad=False, group=tp_group
    )
