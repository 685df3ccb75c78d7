# Copyright (c) 2026, the megatron-core gptoss authors.

"""The RNG tracker without CUDA uses PyTorch's default CPU generator."""

import logging

import pytest
import torch

from megatron.core import device_utils
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker, checkpoint

pytestmark = pytest.mark.skipif(device_utils.is_cuda(), reason="about machines without CUDA")


def draws_of(seed: int, count: int) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def test_tracker_forks_cpu_generator(caplog):
    """Each name continues its own stream; the default stream is unchanged."""
    tracker = CudaRNGStatesTracker()
    torch.manual_seed(1)
    tracker.add("a", 2)
    tracker.add("b", 3)
    drawn = {"default": [torch.rand(2)], "a": [], "b": []}
    with caplog.at_level(logging.WARNING):
        for name in ("a", "b", "a"):
            with tracker.fork(name):
                drawn[name].append(torch.rand(2))
            drawn["default"].append(torch.rand(1))
        with tracker.fork("b"):
            drawn["b"].append(torch.rand(1))
            with tracker.fork("a"):
                drawn["a"].append(torch.rand(1))
            drawn["b"].append(torch.rand(1))
    for name, seed in (("default", 1), ("a", 2), ("b", 3)):
        got = torch.cat(drawn[name])
        assert torch.equal(got, draws_of(seed, len(got))), name
    assert "RNG state changed" not in caplog.text


def test_states_are_saved_and_restored():
    tracker = CudaRNGStatesTracker()
    tracker.add("a", 2)
    with tracker.fork("a"):
        torch.rand(3)
    other = CudaRNGStatesTracker()
    other.set_states(tracker.get_states())
    with other.fork("a"):
        got = torch.rand(4)
    assert torch.equal(got, draws_of(2, 7)[3:])


def test_recompute_repeats_dropout(monkeypatch):
    """Activation checkpointing draws the same mask in the backward pass as in the forward."""
    from megatron.core.tensor_parallel import random

    tracker = CudaRNGStatesTracker()
    tracker.add(random._MODEL_PARALLEL_RNG_TRACKER_NAME, 2)
    monkeypatch.setattr(random, "get_cuda_rng_tracker", lambda *args, **kwargs: tracker)
    masks = []

    def dropout(x):
        with tracker.fork():
            y = torch.nn.functional.dropout(x, 0.5)
        masks.append((y != 0).float())
        return y

    torch.manual_seed(1)
    x = torch.ones(64, requires_grad=True)
    checkpoint(dropout, False, x).sum().backward()
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(x.grad, 2 * masks[0])


def test_state_of_another_device_is_named():
    """A checkpoint written on CUDA holds 16 bytes where the CPU generator has thousands."""
    with pytest.raises(ValueError, match=r"has 16 bytes.*--no-load-rng"):
        device_utils.set_rng_state(torch.zeros(16, dtype=torch.uint8))
