# Copyright (c) 2026, the megatron-core gptoss authors.

"""Activation offloading to CPU memory, to measure whether it pays.

Megatron's own (`--fine-grained-activation-offloading`, `--cpu-offloading`) needs TransformerEngine.
This one copies all tensors that autograd saves to pinned memory on a separate stream, and prefetches
them for the backward.
"""

from collections import deque

import torch
from torch import Tensor

# Smaller tensors are not offloaded: a copy costs more than it saves.
MINIMUM_BYTES = 1 << 20
# Limit of copies in flight in each direction; until a copy ends, its tensor takes device memory.
IN_FLIGHT_BYTES = 2 << 30


class _Kept:
    """A tensor in CPU memory, and its copy on the device once it is prefetched."""

    def __init__(self, tensor: Tensor, host: Tensor):
        self.device, self.host, self.back, self.event = tensor.device, host, None, None


class ActivationOffload:
    """Offload the tensors that a module's forward saves to CPU memory; on the CPU, to a copy.

    Args:
        module: its parameters stay where they are.
        minimum: bytes; smaller tensors stay.

    Attributes:
        bytes: taken to the host in the last forward.
    """

    def __init__(self, module: torch.nn.Module, minimum: int = MINIMUM_BYTES):
        self.module, self.minimum, self.bytes = module, minimum, 0
        self.kept: list[_Kept] = []
        self.leaving: deque = deque()
        self.cuda = torch.cuda.is_available()
        if self.cuda:
            self.to_host, self.to_device = torch.cuda.Stream(), torch.cuda.Stream()
        self.hooks = None
        # Around the forward alone: what the backward computes again must not leave.
        module.register_forward_pre_hook(self._begin)
        module.register_forward_hook(self._end, always_call=True)

    def _begin(self, module, args) -> None:
        self.kept.clear()
        self.bytes = 0
        self.weights = {p.untyped_storage().data_ptr() for p in self.module.parameters()}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self.hooks.__enter__()

    def _end(self, module, args, output) -> None:
        self.hooks.__exit__()

    def _pack(self, tensor: Tensor):
        size = tensor.nbytes
        if size < self.minimum or tensor.untyped_storage().data_ptr() in self.weights:
            return tensor
        self.bytes += size
        # Dense, with the order of its strides: kernels ask for it in the backward.
        host = torch.empty_like(tensor, device="cpu", pin_memory=self.cuda)
        if self.cuda:
            self.to_host.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.to_host):
                host.copy_(tensor, non_blocking=True)
                event = self.to_host.record_event()
            tensor.record_stream(self.to_host)
            self.leaving.append((event, size))
            while sum(size for _, size in self.leaving) > IN_FLIGHT_BYTES:
                self.leaving.popleft()[0].synchronize()
        else:
            host.copy_(tensor)
        self.kept.append(_Kept(tensor, host))
        return len(self.kept) - 1

    def _unpack(self, kept) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        entry = self.kept[kept]
        if not self.cuda:
            return entry.host
        self._bring_back(entry)
        torch.cuda.current_stream().wait_event(entry.event)
        tensor = entry.back
        tensor.record_stream(torch.cuda.current_stream())
        entry.back = None  # autograd has it; a second use fetches it again
        ahead = 0
        for other in reversed(self.kept[:kept]):  # the backward goes the other way round
            ahead += other.host.nbytes
            if ahead > IN_FLIGHT_BYTES:
                break
            if other.event is None:
                self._bring_back(other)
        return tensor

    def _bring_back(self, entry: _Kept) -> None:
        if entry.back is not None:
            return
        self.to_device.wait_stream(self.to_host)
        with torch.cuda.stream(self.to_device):
            entry.back = torch.empty_like(entry.host, device=entry.device)
            entry.back.copy_(entry.host, non_blocking=True)
            entry.event = self.to_device.record_event()
