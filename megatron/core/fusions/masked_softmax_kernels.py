# Copyright (c) 2026, the megatron-core gptoss authors.

"""Whether the extensions behind masked_softmax_fusion are installed."""

import importlib.util
from functools import lru_cache

# Built from the fused kernels of Megatron's older releases and of Apex; FusedScaleMaskSoftmax
# takes one or another by the mask's type.
_EXTENSIONS = (
    "scaled_softmax_cuda",
    "scaled_masked_softmax_cuda",
    "scaled_upper_triang_masked_softmax_cuda",
)


@lru_cache(maxsize=None)
def have_masked_softmax_kernels() -> bool:
    """True if all of them can be imported. They are looked for once, and not loaded here."""
    return all(importlib.util.find_spec(name) is not None for name in _EXTENSIONS)
