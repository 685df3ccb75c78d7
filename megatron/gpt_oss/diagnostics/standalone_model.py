# Copyright (c) 2026, the megatron-core gptoss authors.

"""A GPTModel outside of a training run."""

import os
import tempfile
from contextlib import contextmanager
from typing import Iterator

import torch

from megatron.gpt_oss.presets import Preset


@contextmanager
def single_rank_model(preset: Preset, bf16: bool = False) -> Iterator[torch.nn.Module]:
    """A GPTModel with random weights in eval mode, in a process group of one rank.

    Args:
        preset: the sizes.
        bf16: parameters and forward in bf16; otherwise in fp32.
    Raises:
        RuntimeError: the process already has a process group.
    """
    from megatron.core import device_utils, parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.gpt_oss.layer_specs import model_config

    if torch.distributed.is_initialized():
        raise RuntimeError("single_rank_model creates a process group, but one exists already")
    with tempfile.TemporaryDirectory() as rendezvous:
        torch.distributed.init_process_group(
            device_utils.default_backend(),
            init_method=f"file://{os.path.join(rendezvous, 'store')}",
            rank=0,
            world_size=1,
        )
        try:
            parallel_state.initialize_model_parallel()
            model_parallel_cuda_manual_seed(0)
            config = model_config(preset, bf16=bf16)
            config.finalize()
            groups = ProcessGroupCollection.use_mpu_process_groups()
            model = config.get_builder_cls()(config).build_model(groups)
            yield model.to(device_utils.device_name()).eval()
        finally:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()
