# Copyright (c) 2026, the megatron-core gptoss authors.

"""tiny_pretrain with injected faults, for tests of failing runs."""

import hashlib
import os
import signal
import time
from typing import Any, Callable, Dict, List, Optional

import torch

from megatron.core.enums import ModelType
from megatron.gpt_oss.training.datasets import provide_datasets
from megatron.training import get_args, pretrain, step_callbacks
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.training import set_startup_timestamps
from tests.harness import tiny_pretrain


def run(
    flags: List[str],
    data_prefix: str,
    kill_after: Optional[int] = None,
    before_forward: Optional[Callable[[int, torch.nn.Module], None]] = None,
) -> Dict[str, Any]:
    """Train; return what this rank logged and which samples it read.

    Args:
        kill_after: SIGKILL this process once that step is logged.
        before_forward: called with the step (from 1) and the model before each micro-batch.
    """
    received = {"steps": [], "samples": []}

    def on_step(event):
        received["steps"].append(vars(event))
        if event.iteration == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    def forward_step(data_iterator, model):
        if before_forward is not None:
            before_forward(get_args().curr_iteration + 1, model)
        return tiny_pretrain.forward_step(_Recorded(data_iterator, received["samples"]), model)

    step_callbacks.clear()
    step_callbacks.subscribe(step_callbacks.TrainingLogged, on_step)
    # Upstream reduces it over the ranks where it is set, as an earlier run leaves it on some.
    set_startup_timestamps(program_start=time.time())
    args = tiny_pretrain.parse(flags, data_prefix, tiny_pretrain.MODEL_FLAGS)
    try:
        pretrain(
            pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
            provide_datasets,
            ModelType.encoder_or_decoder,
            forward_step,
        )
    finally:
        step_callbacks.clear()
    return received


class _Recorded:
    """A data iterator that records the tokens."""

    def __init__(self, iterator, samples: List[str]):
        self.iterator = iterator
        self.samples = samples

    def __next__(self):
        sample = next(self.iterator)
        self.samples.append(hashlib.sha256(sample["tokens"].numpy().tobytes()).hexdigest())
        return sample
