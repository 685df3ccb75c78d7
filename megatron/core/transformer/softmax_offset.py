# Copyright (c) 2026, the megatron-core gptoss authors.

"""The learnable sinks as a tensor-parallel parameter: one logit per query head."""

import torch

from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker


@torch.no_grad()
def init_softmax_offset(param: torch.nn.Parameter, config, tp_group) -> None:
    """Mark the sinks as split over the heads, and initialise them.

    Without the mark, the gradient norm counts only those of TP rank 0. The initial values are drawn
    as those of other weights: with use_cpu_initialization for the heads of all ranks, of which each
    rank takes its own, so that they do not depend on the tensor parallel size; else with the random
    state of the tensor parallel rank, so that ranks do not have the same values.

    Args:
        param: [np], the sinks of this rank's heads.
        config: TransformerConfig; perform_initialization, use_cpu_initialization, init_method.
        tp_group: the tensor parallel group that the heads are split over.
    """
    set_tensor_model_parallel_attributes(param, is_parallel=True, dim=0, stride=1)
    if not config.perform_initialization:
        return
    if config.use_cpu_initialization:
        heads = torch.empty(param.numel() * tp_group.size(), dtype=torch.float32)
        config.init_method(heads)
        param.copy_(heads.chunk(tp_group.size())[tp_group.rank()])
    else:
        # 0.15 makes the parameter on the CPU; the tracker's state is the device's.
        on_cpu = param.device.type == "cpu" and torch.cuda.is_available()
        drawn = torch.empty_like(param, device="cuda" if on_cpu else param.device)
        with get_cuda_rng_tracker().fork():
            config.init_method(drawn)
        param.copy_(drawn)
