# Copyright (c) 2026, the megatron-core gptoss authors.

"""CUDA_DEVICE_MAX_CONNECTIONS, which nobody should have to know of."""

import os
from typing import Callable

VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"
# These want several queues to the GPU, so Megatron refuses 1, or leaves the choice to the user.
_SEVERAL = ("use_torch_fsdp2", "use_megatron_fsdp", "overlap_moe_expert_parallel_comm")


def set_device_connections(value: Callable[[str], object]) -> None:
    """Set the variable to 1 where tensor or context parallelism need it and the user set nothing.

    With one queue, kernels reach the GPU in the order in which they were launched: communication
    launched first starts first, and compute hides it. Megatron's validation demands it on Hopper and
    before. CUDA reads it when a process first uses the GPU, so call this before.

    Args:
        value: the argument of a name (argparse's dest), before Megatron's validation.
    """
    parallel = value("tensor_model_parallel_size") > 1 or value("context_parallel_size") > 1
    if parallel and not any(value(dest) for dest in _SEVERAL):
        os.environ.setdefault(VARIABLE, "1")
