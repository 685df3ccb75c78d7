# Copyright (c) 2026, the megatron-core gptoss authors.

"""One place that knows whether this process computes on CUDA or on the CPU.

On a CUDA machine every function is a plain call of its torch.cuda namesake: same device, same
streams, no additional synchronisation. On a machine without CUDA the process computes on the CPU,
where kernels are synchronous, so that streams, events and synchronisation have nothing to do.
"""

import contextlib
import functools
import resource
import sys
from typing import ContextManager, Union

import torch


@functools.lru_cache(maxsize=None)
def device_type() -> str:
    """'cuda' where PyTorch sees a CUDA device, else 'cpu'. Asked once: it does not change."""
    return 'cuda' if torch.cuda.is_available() else 'cpu'


def is_cuda() -> bool:
    """Whether this process computes on CUDA."""
    return device_type() == 'cuda'


def default_backend() -> str:
    """The torch.distributed backend that moves tensors of this process's device."""
    return 'nccl' if is_cuda() else 'gloo'


def current_device() -> Union[int, torch.device]:
    """What torch.cuda.current_device() returns, or the CPU; for the `device=` of a new tensor."""
    return torch.cuda.current_device() if is_cuda() else torch.device('cpu')


def device_name() -> str:
    """The current device as a string, 'cuda:0' or 'cpu'."""
    return f'cuda:{torch.cuda.current_device()}' if is_cuda() else 'cpu'


def set_device(index: int) -> None:
    """Choose the CUDA device of this process; the CPU is one device."""
    if is_cuda():
        torch.cuda.set_device(index)


def synchronize() -> None:
    """Wait for the device's queued work; the CPU queues none."""
    if is_cuda():
        torch.cuda.synchronize()


def tensor_type(dtype_name: str) -> str:
    """What `Tensor.type()` says of a tensor on this process's device, for 'FloatTensor' etc."""
    return f'torch.cuda.{dtype_name}' if is_cuda() else f'torch.{dtype_name}'


# ---------------------------------------------------------------------------------------------
# Random numbers. On the CPU the model draws from PyTorch's default CPU generator.
# ---------------------------------------------------------------------------------------------


def get_rng_state() -> torch.Tensor:
    """State of the generator that this process's device draws from."""
    return torch.cuda.get_rng_state() if is_cuda() else torch.get_rng_state()


def set_rng_state(state: torch.Tensor) -> None:
    """Set the state of the generator that this process's device draws from."""
    if is_cuda():
        torch.cuda.set_rng_state(state)
        return
    expected = torch.get_rng_state().numel()
    if state.numel() != expected:
        raise ValueError(
            f"The random number state to restore has {state.numel()} bytes, that of the CPU has "
            f"{expected}: it was saved on another device. Load the checkpoint with --no-load-rng."
        )
    torch.set_rng_state(state)


def manual_seed(seed: int) -> None:
    """Seed the generator that this process's device draws from."""
    if is_cuda():
        torch.cuda.manual_seed(seed)
    else:
        torch.random.default_generator.manual_seed(seed)


# ---------------------------------------------------------------------------------------------
# Streams and events.
# ---------------------------------------------------------------------------------------------


class CPUStream:
    """Stands where a torch.cuda.Stream would: the CPU runs in program order, nothing waits."""

    def wait_stream(self, stream) -> None:
        """Nothing to wait for."""

    def wait_event(self, event) -> None:
        """Nothing to wait for."""

    def record_event(self, event=None):
        """An event that has already happened."""
        return CPUEvent() if event is None else event

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def __eq__(self, other) -> bool:
        return isinstance(other, CPUStream)

    def __hash__(self) -> int:
        return hash(CPUStream)


class CPUEvent:
    """Stands where a torch.cuda.Event would: it has happened by the time it is recorded."""

    def record(self, stream=None) -> None:
        """Nothing to record."""

    def wait(self, stream=None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Always done."""
        return True


def new_stream(*args, **kwargs):
    """A torch.cuda.Stream made with these arguments, or its stand-in on the CPU."""
    return torch.cuda.Stream(*args, **kwargs) if is_cuda() else CPUStream()


def new_event(*args, **kwargs):
    """A torch.cuda.Event made with these arguments, or its stand-in on the CPU."""
    return torch.cuda.Event(*args, **kwargs) if is_cuda() else CPUEvent()


def current_stream():
    """The current CUDA stream, or its stand-in on the CPU."""
    return torch.cuda.current_stream() if is_cuda() else CPUStream()


def record_stream(tensor: torch.Tensor, stream) -> None:
    """Keep a tensor's memory until `stream` is past this point; the CPU frees in program order."""
    if tensor.is_cuda:
        tensor.record_stream(stream)


def use_stream(stream) -> ContextManager:
    """torch.cuda.stream(stream), or a context that does nothing on the CPU."""
    return torch.cuda.stream(stream) if is_cuda() else contextlib.nullcontext()


# ---------------------------------------------------------------------------------------------
# Memory, in bytes. The CPU has no allocator statistics: the resident set of the process is what
# a user can compare with the memory of the machine.
# ---------------------------------------------------------------------------------------------


def peak_rss() -> int:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else peak * 1024  # Linux counts in KiB.


def current_rss() -> int:
    """Resident set of this process now; its peak where /proc is not mounted."""
    try:
        with open('/proc/self/statm') as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_rss()


def memory_allocated() -> int:
    """Memory in use: of PyTorch's CUDA allocator, or of the whole process on the CPU."""
    return torch.cuda.memory_allocated() if is_cuda() else current_rss()


def max_memory_allocated() -> int:
    """Peak of memory_allocated()."""
    return torch.cuda.max_memory_allocated() if is_cuda() else peak_rss()


def memory_reserved() -> int:
    """Memory that PyTorch's CUDA allocator holds; the CPU has no caching allocator."""
    return torch.cuda.memory_reserved() if is_cuda() else current_rss()


def max_memory_reserved() -> int:
    """Peak of memory_reserved()."""
    return torch.cuda.max_memory_reserved() if is_cuda() else peak_rss()
