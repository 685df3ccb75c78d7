# Copyright (c) 2026, the megatron-core gptoss authors.

"""KernelChoice: the order, preferred implementations, and rejected names."""

import pytest
import torch

from megatron.core.kernel_selection import (
    KernelChoice,
    PyTorchOperations,
    TritonKernels,
    triton_or_torch,
)


class OnlyFor:
    def __init__(self, name, call):
        self.name, self.call = name, call

    def unsupported_reason(self, call):
        return None if call == self.call else f"takes {self.call}"


@pytest.fixture
def choice():
    return KernelChoice("kernel", (OnlyFor("a", 1), OnlyFor("b", 2), PyTorchOperations()))


def test_select(choice):
    """The first that supports the call; a named one must."""
    assert [choice.select(call).name for call in (1, 2, 3)] == ["a", "b", "torch"]
    assert choice.select(2, name="b").name == "b"
    with pytest.raises(ValueError, match="kernel: 'c' is unknown; wanted 'auto' or one of 'a'"):
        choice.select(1, name="c")
    message = "kernel: 'b' cannot run this call: takes 2. Supported here: a, torch."
    with pytest.raises(ValueError, match=message):
        choice.select(1, name="b")
    assert choice.unsupported_reasons(2) == {"a": "takes 1", "b": None, "torch": None}


def test_order():
    """A given order comes first; the others follow in that of the list."""
    implementations = (OnlyFor("a", 1), PyTorchOperations("x"), PyTorchOperations("y"))
    choice = KernelChoice("kernel", implementations, order=lambda call: ["y"] if call == 1 else [])
    assert choice.select(1).name == "y" and choice.select(2).name == "x"


def test_prefer(choice):
    """Until the end of the context, and only for calls that it supports."""
    with choice.prefer("torch"):
        assert choice.select(1).name == "torch"
        with choice.prefer("b"):
            assert [choice.select(call).name for call in (1, 2)] == ["a", "b"]
        assert choice.select(1).name == "torch"
    assert choice.select(1).name == "a"
    with pytest.raises(ValueError, match="'c' is unknown"), choice.prefer("c"):
        pass


def test_triton_or_torch():
    """Plain PyTorch on the CPU, and where the module cannot be imported."""
    choice = triton_or_torch("kernel", "megatron.core.no_such_module")
    assert choice.select(torch.zeros(2)).module is None
    reason = TritonKernels("megatron.core.no_such_module").unsupported_reason()
    assert "No module named 'megatron.core.no_such_module'" in reason
