# Copyright (c) 2026, the megatron-core gptoss authors.

"""--optimizer-cpu-offload: the part of AdamW's state in CPU memory, tested without a GPU."""

import contextlib
import gc
import types
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer


class OnGpu(torch.nn.Parameter):
    """A parameter that reports to be on a GPU; tensors computed from it do not."""

    is_cuda = property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl


@pytest.fixture(autouse=True)
def no_gpu_needed(monkeypatch):
    """Streams that have nothing to wait for, and pinned memory that is any memory."""
    event = types.SimpleNamespace(synchronize=lambda: None, wait=lambda stream: None)
    stream = types.SimpleNamespace(wait_stream=lambda other: None, record_event=lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)


def build(parameters, offload_fraction=1.0, in_fp32=True, **more):
    """As Megatron builds it for bf16 parameters."""
    return HybridDeviceOptimizer(
        [dict(params=parameters)],
        offload_fraction=offload_fraction,
        cpu_optimizer_cls=torch.optim.AdamW,
        gpu_optimizer_cls=torch.optim.AdamW,
        param_update_in_fp32=in_fp32,
        pin_cpu_grads=False,
        pin_cpu_params=False,
        lr=0.1,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        eps=1e-8,
        **more,
    )


class CopiesInto(TorchDispatchMode):
    """The dtypes of what is copied into some tensors."""

    def __init__(self, tensors):
        super().__init__()
        self.wanted = {tensor.data_ptr() for tensor in tensors}
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default and args[0].data_ptr() in self.wanted:
            self.seen.append(args[1].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("overlap", [True, False])
def test_its_copies_go_with_it(overlap):
    """The distributed optimizer builds it twice. The first one's copies of the whole parameters
    stayed on the GPU, 4 bytes a parameter, until the garbage collector found the circle through its
    hooks.
    """
    parameters = [OnGpu(torch.ones(3, dtype=torch.bfloat16))]
    # PyTorch imports more of itself for the first one, whose frames stay in circles of their own.
    build(parameters, overlap_cpu_optimizer_d2h_h2d=overlap)
    gc.collect()
    gc.disable()
    try:
        optimizer = build(parameters, overlap_cpu_optimizer_d2h_h2d=overlap)
        copies = [weakref.ref(copy) for copy in optimizer.param_to_fp32_param.values()]
        assert len(copies) == 1 and copies[0]() is not None
        del optimizer
        assert copies[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("overlap", [True, False])
def test_cast_before_the_way_to_the_gpu(overlap):
    """copy_ from fp32 on the host to bf16 on the GPU casts into pageable memory, and waits."""
    parameters = [OnGpu(torch.randn(33).bfloat16()), OnGpu(torch.randn(3, 5).bfloat16())]
    start = [parameter.detach().clone() for parameter in parameters]
    optimizer = build(parameters, overlap_cpu_optimizer_d2h_h2d=overlap)
    masters = [value.detach().float().requires_grad_() for value in start]
    reference = torch.optim.AdamW(masters, lr=0.1, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    for _ in range(3):
        for parameter, master in zip(parameters, masters):
            master.grad = torch.randn(master.shape)
            parameter.decoupled_grad = master.grad.clone()
        reference.step()
        with CopiesInto(parameters) as copies:
            optimizer.step()
        assert copies.seen == [torch.bfloat16] * 2
    for parameter, master in zip(parameters, masters):
        torch.testing.assert_close(parameter.detach(), master.detach().bfloat16(), rtol=0, atol=0)


def test_loaded_state_stays_on_its_side(monkeypatch):
    """With PyTorch's AdamW on both sides, what a checkpoint has of the GPU's part went to the host."""
    parameters = [OnGpu(torch.ones(4)), OnGpu(torch.ones(4))]
    optimizer = build(parameters, offload_fraction=0.5, in_fp32=False)
    for parameter in parameters:
        parameter.grad = torch.randn(4)
    optimizer.step()
    moves, to = {}, torch.Tensor.to

    def record(tensor, *args, **kwargs):
        if args in (("cpu",), ("cuda",)):
            moves[tensor.data_ptr()] = args[0]
            return tensor
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", record)
    optimizer.load_state_dict(optimizer.state_dict())
    host, gpu = optimizer.cpu_copys_map_gpu_param, parameters[1]
    assert len(host) == 1 and gpu in optimizer.gpu_optimizer.state
    for side in optimizer.sub_optimizers:
        for parameter, state in side.state.items():
            places = {moves[value.data_ptr()] for value in state.values()}
            assert places == {"cuda" if parameter is gpu else "cpu"}
