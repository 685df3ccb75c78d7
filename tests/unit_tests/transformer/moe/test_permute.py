# Copyright (c) 2026, the megatron-core gptoss authors.

"""Upstream's permute and unpermute against float64."""

import importlib.util
import os
import sys

import pytest
import torch

from megatron.core.transformer.moe.grouped_mlp.permute import add_rows, rows_of_tokens, take_rows
from megatron.core.transformer.moe.moe_utils import permute, unpermute
from tests.harness import commands

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOKENS, HIDDEN, EXPERTS, TOPK = 37, 24, 8, 4


def routing(kind):
    """[tokens, experts], bool."""
    generator = torch.Generator().manual_seed(1)
    chosen = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOPK, dim=1).indices
    routing_map = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter_(1, chosen, True)
    if kind == "some-dropped":  # by capacity, or because the others' experts are elsewhere
        routing_map[:, 5:] = False
        routing_map[3] = False
    return routing_map


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["all", "some-dropped"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
def test_permute_and_back(dtype, kind, device):
    """Sums over a token's rows are rounded once, forward and backward.

    On a GPU, atomic additions in bf16 round after each of four.
    """
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    routing_map = routing(kind).to(device)
    generator = torch.Generator().manual_seed(2)
    tokens, probs = (
        torch.randn(TOKENS, n, generator=generator).to(dtype).to(device) for n in (HIDDEN, EXPERTS)
    )
    tokens.requires_grad_(), probs.requires_grad_()
    rows, row_probs, indices, *_ = permute(
        tokens, routing_map, probs, num_out_tokens=int(routing_map.sum())
    )
    experts, expected = routing_map.T.nonzero(as_tuple=True)
    assert torch.equal(indices, expected)
    assert torch.equal(rows, tokens[expected]) and torch.equal(row_probs, probs[expected, experts])

    drows = torch.randn(rows.shape, generator=generator).to(dtype).to(device)
    dprobs = torch.randn(len(rows), generator=generator).to(dtype).to(device)
    torch.autograd.backward([rows, row_probs], [drows, dprobs])
    onto = torch.zeros(TOKENS, len(rows), dtype=torch.float64, device=device)
    onto[expected, torch.arange(len(rows), device=device)] = 1
    wide = onto @ drows.double()
    # One rounding of bf16, or none that counts.
    limit = wide.abs() * (2**-8 if dtype == torch.bfloat16 else 1e-14) + 1e-6
    assert ((tokens.grad.double() - wide).abs() <= limit).all(), "gradient of the tokens"
    scattered = torch.zeros_like(probs).index_put((expected, experts), dprobs)
    assert torch.equal(probs.grad, scattered)

    experts_out = drows.clone().requires_grad_()
    out = unpermute(experts_out, indices, tokens.shape, routing_map=routing_map)
    assert out.dtype == dtype
    assert ((out.double() - wide).abs() <= limit).all(), "output"
    out.backward(tokens.detach())
    assert torch.equal(experts_out.grad, tokens[expected])


def test_no_scatter():
    """What runs is permute.py: on the CPU, whose scatter is exact, only the graph shows it."""
    tokens = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    routing_map = routing("all")
    rows, _, indices, *_ = permute(tokens, routing_map, num_out_tokens=int(routing_map.sum()))
    assert rows.grad_fn.name() == "_TakeRowsBackward"
    assert unpermute(rows, indices, tokens.shape).grad_fn.name() == "_AddRowsBackward"


def test_rows_of_tokens():
    """Tokens that are routed to no expert, also at the end."""
    rows, starts = rows_of_tokens(torch.tensor([4, 0, 4, 2]), 6)
    assert rows.tolist() == [1, 3, 0, 2]
    assert starts.tolist() == [0, 1, 1, 2, 2, 4, 4]


def test_gradcheck():
    rows = torch.tensor([2, 0, 2, 1, 2])
    tokens = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: take_rows(t, rows), (tokens,))
    assert torch.autograd.gradcheck(lambda t: add_rows(t, rows[:4], 5), (tokens,))


KERNEL = """
import torch
from megatron.core.transformer.moe.grouped_mlp.permute import rows_of_tokens
from megatron.core.transformer.moe.grouped_mlp.permute_triton import sum_by_token
index = torch.tensor([4, 0, 4, 2, 0, 4, 4])
for width in (5, 1500):
    rows = torch.randn(7, width).bfloat16()
    expected = torch.zeros(6, width).index_add_(0, index, rows.float())
    found = sum_by_token(rows, *rows_of_tokens(index, 6))
    assert found.dtype == torch.bfloat16
    # The interpreter cuts to bfloat16 where a device rounds.
    assert ((found.float() - expected).abs() <= expected.abs() * 2**-7).all()
    assert not found[[1, 3, 5]].any()
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is tested on the device")
def test_kernel_in_interpreter():
    """In a separate process: triton reads TRITON_INTERPRET when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", KERNEL]
    done = commands.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("this Triton's interpreter does not know this NumPy (3.6 and 2.4)")
    assert done.returncode == 0, done.stderr[-4000:]
