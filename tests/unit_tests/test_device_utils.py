# Copyright (c) 2026, the megatron-core gptoss authors.

"""device_utils without CUDA: memory figures, RNG state, and streams without effect."""

import subprocess
import sys

import pytest
import torch

from megatron.core import device_utils

pytestmark = pytest.mark.skipif(device_utils.is_cuda(), reason="about machines without CUDA")


def test_device_and_backend():
    assert torch.zeros(1, device=device_utils.current_device()).device.type == "cpu"
    assert torch.zeros(1, device=device_utils.device_type()).device.type == "cpu"
    assert device_utils.default_backend() == "gloo"
    for dtype, name in ((torch.float32, "FloatTensor"), (torch.bfloat16, "BFloat16Tensor")):
        assert torch.zeros(1, dtype=dtype).type() == device_utils.tensor_type(name)


MEMORY = """
import torch
from megatron.core import device_utils
mebibyte = 2**20
before = device_utils.memory_allocated()
block = torch.ones(64 * mebibyte, dtype=torch.uint8)
grown = device_utils.memory_allocated() - before
del block
assert 60 * mebibyte < grown < 100 * mebibyte, grown
assert device_utils.max_memory_allocated() >= before + 60 * mebibyte
assert device_utils.memory_allocated() < before + 30 * mebibyte
"""


def test_memory_figures_follow_the_process():
    """64 MiB that are written show in the resident set, and its peak stays when they are freed.

    In a process of its own: of an old and large one the kernel may take cold pages meanwhile.
    """
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", MEMORY], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


def test_random_state_is_the_cpu_generators():
    device_utils.manual_seed(7)
    state = device_utils.get_rng_state()
    first = torch.rand(3)
    device_utils.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    assert torch.equal(first, torch.rand(3, generator=torch.Generator().manual_seed(7)))


def test_streams_and_events_stand_in():
    """All streams are the one of program order, so that nothing is recorded on a side stream."""
    stream, event = device_utils.new_stream(), device_utils.new_event(enable_timing=True)
    assert stream == device_utils.current_stream()
    with device_utils.use_stream(stream):
        stream.wait_stream(device_utils.current_stream())
        event.record(stream)
        stream.wait_event(event)
    assert event.query()
    stream.record_event().synchronize()
