# Copyright (c) 2026, the megatron-core gptoss authors.

"""The sinks of TransformerEngine's attention in Megatron's gradient reduction and norms."""

import weakref

import torch

from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.softmax_offset import init_softmax_offset
from megatron.core.utils import get_pg_size


def prepare_te_softmax_offset(module, config, tp_group) -> None:
    """Mark and initialise the sinks of a TransformerEngine attention module; count them once.

    TransformerEngine gathers the gradient of the sinks over the context parallel group (a2a), so
    every rank has the complete gradient. Megatron's reduction then sums over the group, as it must
    for every other parameter, and gets cp times the gradient. A hook therefore divides by cp.

    Args:
        module: TEDotProductAttention, after its own __init__; `softmax_offset` [np] and `cp_group`.
        config: TransformerConfig.
        tp_group: the tensor parallel group that the heads are split over, or None.
    """
    param = getattr(module, "softmax_offset", None)
    if not isinstance(param, torch.nn.Parameter):
        return
    if config.use_cpu_initialization or get_cuda_rng_tracker().is_initialized():
        init_softmax_offset(param, config, tp_group)
    else:  # without Megatron's random states they stay 0
        set_tensor_model_parallel_attributes(param, is_parallel=True, dim=0, stride=1)
    owner = weakref.ref(module)  # the hook is held in C++: a reference cycle would not be collected
    # Looked up at each call: the group can be set after __init__.
    param.register_hook(lambda gradient: gradient / get_pg_size(owner().cp_group))
