# Copyright (c) 2026, the megatron-core gptoss authors.

"""Device functions that work on CUDA and on the CPU.

With CUDA every function calls the torch.cuda function of the same name, without additional
synchronisation. Without CUDA the process computes on the CPU. Its kernels are synchronous, so
streams, events and synchronisation do nothing.
"""

import contextlib
import functools
import resource
import sys
from typing import ContextManager, Union

import torch


@functools.lru_cache(maxsize=None)
def device_type() -> str:
    """'cuda' if PyTorch sees a CUDA device, else 'cpu'."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def is_cuda() -> bool:
    """Whether this process computes on CUDA."""
    return device_type() == "cuda"


def default_backend() -> str:
    """The torch.distributed backend for tensors on this process's device."""
    return "nccl" if is_cuda() else "gloo"


def current_device() -> Union[int, torch.device]:
    """What torch.cuda.current_device() returns, or the CPU; for the `device=` of a new tensor."""
    return torch.cuda.current_device() if is_cuda() else torch.device("cpu")


def device_name() -> str:
    """The current device as a string, 'cuda:0' or 'cpu'."""
    return f"cuda:{torch.cuda.current_device()}" if is_cuda() else "cpu"


def set_device(index: int) -> None:
    """Set the CUDA device of this process; no effect on the CPU."""
    if is_cuda():
        torch.cuda.set_device(index)


def synchronize() -> None:
    """Wait for all kernels of the current device; no effect on the CPU."""
    if is_cuda():
        torch.cuda.synchronize()


def tensor_type(dtype_name: str) -> str:
    """The result of `Tensor.type()` for a tensor on this process's device, e.g. of 'FloatTensor'."""
    return f"torch.cuda.{dtype_name}" if is_cuda() else f"torch.{dtype_name}"


def get_rng_state() -> torch.Tensor:
    """RNG state of this process's device: the current CUDA device, or PyTorch's CPU generator."""
    return torch.cuda.get_rng_state() if is_cuda() else torch.get_rng_state()


def set_rng_state(state: torch.Tensor) -> None:
    """Set the RNG state of this process's device.

    Raises:
        ValueError: on the CPU, if the state was saved on another device.
    """
    if is_cuda():
        torch.cuda.set_rng_state(state)
        return
    expected = torch.get_rng_state().numel()
    if state.numel() != expected:
        raise ValueError(
            f"The RNG state to restore has {state.numel()} bytes, that of the CPU has {expected}: "
            "it was saved on another device. Load the checkpoint with --no-load-rng."
        )
    torch.set_rng_state(state)


def manual_seed(seed: int) -> None:
    """Seed the generator of this process's device."""
    if is_cuda():
        torch.cuda.manual_seed(seed)
    else:
        torch.random.default_generator.manual_seed(seed)


class CPUStream:
    """Replaces torch.cuda.Stream on the CPU, which runs kernels in program order."""

    def wait_stream(self, stream) -> None:
        """Nothing to wait for."""

    def wait_event(self, event) -> None:
        """Nothing to wait for."""

    def record_event(self, event=None):
        """Return an event that is complete."""
        return CPUEvent() if event is None else event

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def __eq__(self, other) -> bool:
        return isinstance(other, CPUStream)

    def __hash__(self) -> int:
        return hash(CPUStream)


class CPUEvent:
    """Replaces torch.cuda.Event on the CPU; it is complete when it is recorded."""

    def record(self, stream=None) -> None:
        """Nothing to record."""

    def wait(self, stream=None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Always True: the event is complete."""
        return True


def new_stream(*args, **kwargs):
    """A torch.cuda.Stream with these arguments, or a CPUStream."""
    return torch.cuda.Stream(*args, **kwargs) if is_cuda() else CPUStream()


def new_event(*args, **kwargs):
    """A torch.cuda.Event with these arguments, or a CPUEvent."""
    return torch.cuda.Event(*args, **kwargs) if is_cuda() else CPUEvent()


def current_stream():
    """The current CUDA stream, or a CPUStream."""
    return torch.cuda.current_stream() if is_cuda() else CPUStream()


def record_stream(tensor: torch.Tensor, stream) -> None:
    """Call `tensor.record_stream(stream)` for a CUDA tensor; no effect on the CPU."""
    if tensor.is_cuda:
        tensor.record_stream(stream)


def use_stream(stream) -> ContextManager:
    """torch.cuda.stream(stream); on the CPU a context manager that does nothing."""
    return torch.cuda.stream(stream) if is_cuda() else contextlib.nullcontext()


# The CPU allocator has no statistics: the memory functions return the resident set instead.


def peak_rss() -> int:
    """Peak resident set size of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB.


def current_rss() -> int:
    """Resident set size of this process in bytes; its peak if /proc is not mounted."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_rss()


def memory_allocated() -> int:
    """Bytes allocated by PyTorch's CUDA allocator; on the CPU the resident set size."""
    return torch.cuda.memory_allocated() if is_cuda() else current_rss()


def max_memory_allocated() -> int:
    """Peak of memory_allocated(), in bytes."""
    return torch.cuda.max_memory_allocated() if is_cuda() else peak_rss()


def memory_reserved() -> int:
    """Bytes reserved by PyTorch's CUDA allocator; on the CPU the resident set size."""
    return torch.cuda.memory_reserved() if is_cuda() else current_rss()


def max_memory_reserved() -> int:
    """Peak of memory_reserved(), in bytes."""
    return torch.cuda.max_memory_reserved() if is_cuda() else peak_rss()
