# Copyright (c) 2026, the megatron-core gptoss authors.

"""Invalid arguments: the ValueError names the argument, its value and the expected value."""

import re

import pytest
import torch

from megatron.core.transformer.sink_attention import (
    available_backends,
    check_cu_seqlens,
    sink_attention,
)
from megatron.core.transformer.sink_attention.registry import BACKENDS


def dense(s=6, b=2, heads=4, groups=2, dim=8, dtype=torch.float32):
    return dict(
        query=torch.zeros(s, b, heads, dim, dtype=dtype),
        key=torch.zeros(s, b, groups, dim, dtype=dtype),
        value=torch.zeros(s, b, groups, dim, dtype=dtype),
        sinks=torch.zeros(heads),
    )


def packed(cu, t=6, dtype=torch.int32, **changes):
    arguments = {name: x[:, 0] for name, x in dense(t).items() if name != "sinks"}
    return {**arguments, "cu_seqlens": torch.tensor(cu, dtype=dtype), **changes}


WRONG = {
    "heads": (
        {**dense(), "key": torch.zeros(6, 2, 3, 8), "value": torch.zeros(6, 2, 3, 8)},
        "key: has 3 heads; wanted a divisor of query's 4",
    ),
    "key-dtype": (
        {**dense(), "key": torch.zeros(6, 2, 2, 8, dtype=torch.bfloat16)},
        "key: is torch.bfloat16; wanted torch.float32",
    ),
    "value-device": (
        {**dense(), "value": torch.zeros(6, 2, 2, 8, device="meta")},
        "value: is on meta; wanted cpu",
    ),
    "sinks-device": ({**dense(), "sinks": torch.zeros(4, device="meta")}, "sinks: is on meta"),
    "sinks-length": ({**dense(), "sinks": torch.zeros(2)}, "sinks: is [2]; wanted [4]"),
    "sinks-dtype": (
        {**dense(), "sinks": torch.zeros(4, dtype=torch.int32)},
        "sinks: is torch.int32",
    ),
    "value-shape": (
        {**dense(), "value": torch.zeros(6, 2, 4, 8)},
        "value: is [6, 2, 4, 8]; wanted",
    ),
    "head-dim": (
        {**dense(), "key": torch.zeros(6, 2, 2, 4), "value": torch.zeros(6, 2, 2, 4)},
        "key: head dim is 4; wanted 8",
    ),
    "batch": (
        {**dense(), "key": torch.zeros(6, 1, 2, 8), "value": torch.zeros(6, 1, 2, 8)},
        "key: batch is 1; wanted 2",
    ),
    "short-key": (
        {**dense(), "key": torch.zeros(5, 2, 2, 8), "value": torch.zeros(5, 2, 2, 8)},
        "key: has 5 tokens; wanted at least query's 6",
    ),
    "dimensions": ({**dense(), "query": torch.zeros(6, 8)}, "query: has 2 dimensions, [6, 8]"),
    "integers": ({k: v.long() for k, v in dense().items()}, "query: is torch.int64"),
    "window-int": ({**dense(), "window_size": 128}, "window_size: is 128; wanted"),
    "window-left": ({**dense(), "window_size": (-2, 0)}, "window_size: is (-2, 0); wanted"),
    "window-right": ({**dense(), "window_size": (127, 1)}, "window_size: is (127, 1); wanted"),
    "no-cu": (packed([0, 6], cu_seqlens=None), "cu_seqlens: is missing"),
    "cu-with-batch": (
        {**dense(), "cu_seqlens": torch.tensor([0, 6], dtype=torch.int32)},
        "query: is [6, 2, 4, 8] with cu_seqlens; wanted packed [t, np, hn]",
    ),
    "cu-int64": (packed([0, 6], dtype=torch.int64), "cu_seqlens: is torch.int64; wanted"),
    "cu-start": (packed([1, 6]), "cu_seqlens: begins with 1; wanted 0"),
    "cu-descending": (packed([0, 5, 3, 6]), "cu_seqlens: element 2 is 3, less than 5 before it"),
    "cu-end": (packed([0, 5]), "cu_seqlens: ends with 5; wanted the number of tokens, 6"),
    "cu-short": (packed([0]), "cu_seqlens: is [1]; wanted [documents + 1]"),
    "cu-device": (
        packed([0, 6], cu_seqlens=torch.zeros(2, dtype=torch.int32, device="meta")),
        "cu_seqlens: is on meta; wanted cpu",
    ),
    "max-seqlen-small": (packed([0, 5, 6], max_seqlen=4), "max_seqlen: 4 is less than the longest"),
    "max-seqlen-tensor": (
        packed([0, 6], max_seqlen=torch.tensor(6)),
        "wanted a positive Python int",
    ),
    "max-seqlen-dense": ({**dense(), "max_seqlen": 6}, "max_seqlen: is for packed sequences"),
    "backend-unknown": ({**dense(), "backend": "fa5"}, "backend: 'fa5' is unknown; wanted 'auto'"),
    "backend-unable": (
        {**dense(), "backend": "cudnn"},
        "backend: 'cudnn' cannot run this call: needs a CUDA device, the tensors are on cpu. "
        "Supported here: math.",
    ),
    "cp-comm-type": ({**dense(), "cp_comm_type": "ring"}, "cp_comm_type: 'ring' is unknown"),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused(name):
    arguments, message = WRONG[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        sink_attention(**arguments)


def test_neighbours_are_accepted():
    """The same calls, corrected."""
    assert sink_attention(**dense()).shape == (6, 2, 4, 8)
    assert sink_attention(**packed([0, 5, 5, 6], max_seqlen=5)).shape == (6, 4, 8)
    assert sink_attention(**packed([0, 5, 6], max_seqlen=6)).shape == (6, 4, 8)
    for window_size in ((0, 0), (-1, 0), (-1, -1), (3, -1), [3, 0]):
        options = {**dense(), "window_size": window_size, "backend": "math"}
        assert sink_attention(**options).shape == (6, 2, 4, 8)
    assert sink_attention(**dense(s=0)).shape == (0, 2, 4, 8)


def test_check_cu_seqlens():
    check_cu_seqlens(torch.tensor([0, 3, 3, 6]), 6)
    with pytest.raises(ValueError, match="ends with 6"):
        check_cu_seqlens(torch.tensor([0, 6]), 7)


def test_available_backends():
    """A reason in one sentence for everything that cannot run here, on the CPU."""
    found = available_backends((128, 1, 8, 64), (128, 1, 2, 64), device="cpu")
    assert list(found) == list(BACKENDS) and found["math"] is None
    for name, reason in found.items():
        assert name == "math" or "cpu" in reason
