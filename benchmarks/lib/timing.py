# Copyright (c) 2026, the megatron-core gptoss authors.

"""Moments on the device's clock, where there is one."""

import time

import torch

from megatron.core import device_utils


def mark():
    """A recorded CUDA event, or the time on a CPU."""
    if not device_utils.is_cuda():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(begin, end) -> float:
    """Milliseconds between two marks; waits for the second."""
    if not device_utils.is_cuda():
        return 1e3 * (end - begin)
    end.synchronize()
    return begin.elapsed_time(end)
