# Copyright (c) 2026, the megatron-core gptoss authors.
"""Weight and gradient norms by kind of module; each weight counts once in every parallel layout."""

import math
from typing import Iterator

import torch
from torch import Tensor

from megatron.core import mpu
from megatron.core.device_utils import current_device
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate

# The first match in a parameter's name; 'norm' comes before 'attention', which contains norms.
KINDS = (
    ("embedding", "embedding."),
    ("norms", "norm"),
    ("sinks", "softmax_offset"),
    ("attention", "self_attention."),
    ("router", ".router."),
    ("experts", ".experts."),
    ("head", "output_layer."),
)
OTHER = "other"
NAMES = tuple(name for name, _ in KINDS) + (OTHER,)


def kind_of(parameter_name: str) -> str:
    """The kind of module that a parameter belongs to, by its name in Megatron."""
    return next((kind for kind, part in KINDS if part in parameter_name), OTHER)


def module_norms(model_chunks: list[torch.nn.Module]) -> dict[str, dict[str, float]]:
    """Norms over all ranks, between backward and update. Collective.

    Args:
        model_chunks: of this rank, wrapped by DistributedDataParallel; gradients are reduced.
    Returns:
        'grad_norm' and 'weight_norm', each by kind, for kinds with (trained) parameters;
        'sinks': 'min' and 'max' sink of the model.
    """
    squares = torch.zeros(4, len(NAMES), dtype=torch.float64, device=current_device())
    # Minimum and maximum with one all-reduce: the maximum of -sinks and of sinks.
    extremes = squares.new_full((2,), -math.inf)
    names = {
        parameter: name for chunk in model_chunks for name, parameter in chunk.named_parameters()
    }
    for parameter, gradient in owned_gradients(model_chunks):
        squares[0, NAMES.index(kind_of(names[parameter]))] += _square_sum(gradient)
    for parameter, name in names.items():
        kind = kind_of(name)
        if kind == "sinks":
            sinks = parameter.detach().double()
            extremes = torch.maximum(extremes, torch.stack([(-sinks).amax(), sinks.amax()]))
        if _is_first_copy(parameter) and _is_first_replica(parameter):
            squares[1, NAMES.index(kind)] += _square_sum(parameter)
            squares[2, NAMES.index(kind)] += parameter.requires_grad
            squares[3, NAMES.index(kind)] += 1
    torch.distributed.all_reduce(squares)
    torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MAX)
    gradient_squares, weight_squares, num_trained, num_all = squares.tolist()
    norms = {
        "grad_norm": _by_kind(gradient_squares, num_trained),
        "weight_norm": _by_kind(weight_squares, num_all),
    }
    low, high = extremes.tolist()
    if math.isfinite(high):
        norms["sinks"] = {"min": -low, "max": high}
    return norms


def _by_kind(squares: list[float], numbers: list[float]) -> dict[str, float]:
    return {
        kind: math.sqrt(value) for kind, value, number in zip(NAMES, squares, numbers) if number
    }


def owned_gradients(
    model_chunks: list[torch.nn.Module],
) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
    """This rank's part of the gradients; each element of the model belongs to exactly one rank.

    With the distributed optimizer a rank has the reduced gradients of its shard of each bucket.
    Without it every data-parallel rank has all of them, and the first rank counts them.
    """
    for chunk in model_chunks:
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            for bucket in group.buckets:
                start, end = _owned_range(group, bucket.grad_data.numel())
                for parameter, (first, last) in bucket.param_to_index.items():
                    low, high = max(first, start), min(last, end)
                    if low < high and _is_first_copy(parameter):
                        yield parameter, bucket.grad_data[low:high]


def _owned_range(group, num_elements: int) -> tuple[int, int]:
    """The range of a bucket whose elements this rank counts."""
    if not group.ddp_config.use_distributed_optimizer:
        is_first = torch.distributed.get_rank(group.data_parallel_group) == 0
        return (0, num_elements) if is_first else (0, 0)
    between = getattr(group, "inter_distributed_optimizer_instance_group", None)
    if between is not None and between.rank() != 0:
        return 0, 0
    ranks = group.intra_distributed_optimizer_instance_group
    shard = num_elements // ranks.size()
    return ranks.rank() * shard, (ranks.rank() + 1) * shard


def _is_first_copy(parameter: torch.nn.Parameter) -> bool:
    """Whether this is not a tensor-parallel duplicate of a weight."""
    return param_is_not_tensor_parallel_duplicate(
        parameter,
        mpu.get_tensor_model_parallel_group(),
        mpu.get_expert_tensor_parallel_group(),
    )


def _is_first_replica(parameter: torch.nn.Parameter) -> bool:
    if getattr(parameter, "allreduce", True):
        return mpu.get_data_parallel_rank(with_context_parallel=True) == 0
    return mpu.get_expert_data_parallel_rank() == 0


def _square_sum(tensor: Tensor) -> Tensor:
    # The norm of the elements in fp32; only the sum over parameters and ranks needs fp64.
    return torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32).double() ** 2
