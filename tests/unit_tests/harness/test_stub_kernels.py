# Copyright (c) 2026, the megatron-core gptoss authors.

"""The stubs of the flash-attention packages take the arguments of the installed packages."""

import inspect
import types

import pytest

from tests.harness.stub_kernels import STUBS


def parameters(function) -> list[inspect.Parameter]:
    """Parameters of a function, or of the function in a torch.library.custom_op."""
    return list(inspect.signature(getattr(function, "_init_fn", function)).parameters.values())


@pytest.mark.parametrize("name", sorted({"fa2", "fa3", "fa4"} & STUBS.keys()))
def test_signatures(name):
    """Same names in the same order; what the stub leaves out has a default in the package."""
    (path, stub), *_ = STUBS[name]().items()
    package = pytest.importorskip(path, exc_type=ImportError)
    functions = {key: f for key, f in vars(stub).items() if isinstance(f, types.FunctionType)}
    assert functions
    for key, function in functions.items():
        ours = [parameter.name for parameter in parameters(function)]
        real = parameters(getattr(package, key))
        assert [p.name for p in real if p.name in ours] == ours, key
        left_out = [p for p in real if p.name not in ours]
        assert all(p.default is not p.empty or p.kind == p.VAR_KEYWORD for p in left_out), key
        assert all(ours.index(p.name) == i for i, p in enumerate(real) if p.default is p.empty), key
