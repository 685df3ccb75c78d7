# Copyright (c) 2026, the megatron-core gptoss authors.

"""Sets CUDA_DEVICE_MAX_CONNECTIONS."""

import os
from argparse import Namespace

VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"
# With these Megatron refuses 1, or leaves the value to the user.
_SEVERAL = ("use_torch_fsdp2", "use_megatron_fsdp", "overlap_moe_expert_parallel_comm")


def set_device_connections(args: Namespace) -> None:
    """Set the variable to 1 if tensor or context parallelism needs it and it is not set.

    With one hardware queue, kernels start in launch order: communication that is launched first
    starts first and overlaps with compute. Megatron's validation requires it on Hopper and older
    GPUs. CUDA reads the variable when a process first uses the GPU, so call this before.

    Args:
        args: the arguments, before Megatron's validation.
    """
    parallel = args.tensor_model_parallel_size > 1 or args.context_parallel_size > 1
    if parallel and not any(getattr(args, dest) for dest in _SEVERAL):
        os.environ.setdefault(VARIABLE, "1")
