# Copyright (c) 2026, the megatron-core gptoss authors.

"""The Triton kernels of the experts against plain PyTorch in float64.

On a CUDA device as they are; without one in Triton's interpreter, where TRITON_INTERPRET=1 is set
before the first import (test_grouped_experts.py starts such a run where triton is installed).
"""

import os

import pytest
import torch

from tests.harness.compare import relative_error

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

from megatron.core.transformer.moe.grouped_mlp import activation_triton as kernels
from megatron.core.transformer.moe.grouped_mlp.activation import (
    ClampedSwiGLU,
    swiglu_backward_ref,
    swiglu_forward_ref,
)
from megatron.core.transformer.moe.grouped_mlp.expert_segments import ExpertSegments

# `make test-gpu` runs them; the run in the interpreter names this file.
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Rows of each expert. Tiles have 32 rows, blocks 64 columns.
COUNTS = {
    "uneven": [5, 0, 33, 1],
    "one-takes-all": [0, 0, 70],
    "empty-ends": [0, 32, 0],
    "one-expert": [31],
    "no-rows": [0, 0],
    "five-experts": [1, 2, 64, 0, 3],
}
# In the interpreter one distribution is enough for bf16, which differs only in loads and stores.
CASES = [
    pytest.param(counts, dtype, id=f"{name}-{dtype}".replace("torch.", ""))
    for dtype in (torch.float32, torch.bfloat16)
    for name, counts in COUNTS.items()
    if dtype == torch.float32 or DEVICE == "cuda" or name == "uneven"
]
# A column block and a part of one.
WIDTH = 72
# A rounding of fp32 sums over up to 70 rows; bf16 results keep 8 bits.
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 2**-8}


def check(name, value, reference, dtype):
    """Relative to the reference as a whole; poisoned memory shows as NaN."""
    assert value.shape == reference.shape and value.dtype == dtype, name
    error = relative_error(value, reference)
    assert error <= LIMITS[dtype], f"{name}: relative error {error:.1e}"


def tensors(counts, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = sum(counts)

    def draw(*shape, scale=1.0):
        values = torch.randn(*shape, generator=generator) * scale
        return values.to(dtype).to(DEVICE)

    # A clamp at 7: many gates and ups are past it, and the bias carries some of them over it.
    y, bias = draw(rows, 2 * width, scale=6), draw(len(counts), 2 * width, scale=3)
    probs = torch.rand(rows, generator=generator).to(DEVICE)
    dout = draw(rows, width)
    return y, bias, probs, dout, ExpertSegments(torch.tensor(counts), DEVICE)


@pytest.mark.parametrize("counts, dtype", CASES)
def test_swiglu(counts, dtype):
    """Forward and every gradient of bias, clamp, SwiGLU and router weight."""
    y, bias, probs, dout, groups = tensors(counts, WIDTH, dtype)
    constants = ClampedSwiGLU()
    out = kernels.swiglu_forward(y, bias, probs, groups.ends, constants)
    wide = [tensor.double() for tensor in (y, bias, probs)]
    check("out", out, swiglu_forward_ref(*wide, groups, constants), dtype)
    grads = kernels.swiglu_backward(dout, y, bias, probs, groups.ends, constants)
    references = swiglu_backward_ref(dout.double(), *wide, groups, constants)
    names = zip(("dy", "dbias", "dprobs"), (dtype, dtype, torch.float32))
    for (name, kind), grad, reference in zip(names, grads, references, strict=True):
        check(name, grad, reference, kind)


@pytest.mark.parametrize("min_programs", [1, 8])
def test_several_blocks_a_program(min_programs, monkeypatch):
    """Blocks of columns dealt out to fewer programs than there are blocks, and unevenly."""
    monkeypatch.setattr(kernels, "MIN_PROGRAMS", min_programs)
    monkeypatch.setattr(kernels, "BLOCK_COLUMNS", 16)
    launched = kernels._Tiling(39, WIDTH, torch.zeros(4))
    assert launched.grid == (6, 1 if min_programs == 1 else 2)
    test_swiglu(COUNTS["uneven"], torch.float32)
    test_weighted_bias(COUNTS["uneven"], torch.float32)


@pytest.mark.parametrize("constants", [ClampedSwiGLU(1.0, None, 0.0)], ids=["swiglu"])
def test_swiglu_without_bias_and_limit(constants):
    y, _, probs, dout, groups = tensors(COUNTS["uneven"], 24, torch.float32)
    out = kernels.swiglu_forward(y, None, probs, groups.ends, constants)
    wide = y.double(), None, probs.double()
    check("out", out, swiglu_forward_ref(*wide, groups, constants), torch.float32)
    dy, dbias, dprobs = kernels.swiglu_backward(dout, y, None, probs, groups.ends, constants)
    references = swiglu_backward_ref(dout.double(), *wide, groups, constants)
    check("dy", dy, references[0], torch.float32)
    assert dbias is None
    check("dprobs", dprobs, references[2], torch.float32)


def test_swiglu_keeps_nan_in_its_row():
    """A clamp that compares would turn NaN into 7."""
    y, bias, probs, dout, groups = tensors(COUNTS["uneven"], 24, torch.float32)
    y[3] = float("nan")
    out = kernels.swiglu_forward(y, bias, probs, groups.ends, ClampedSwiGLU())
    assert out[3].isnan().all()
    assert out.isfinite().all(dim=1).sum() == len(out) - 1


@pytest.mark.parametrize("counts, dtype", CASES)
def test_weighted_bias(counts, dtype):
    """The fc2 bias, added in place and weighted per routed token, and its gradients."""
    _, bias, probs, y, groups = tensors(counts, WIDTH, dtype)
    bias = bias[:, :WIDTH].contiguous()
    owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(DEVICE)
    wide, bias64, probs64 = y.double(), bias.double(), probs.double()
    dbias, dscale = kernels.weighted_bias_gradients(y, bias, probs, groups.ends)
    reference = torch.zeros_like(bias64).index_add_(0, owners, wide * probs64[:, None])
    check("dbias", dbias, reference, dtype)
    check("dscale", dscale, (wide * bias64[owners]).sum(1), torch.float32)
    kernels.add_weighted_bias_(y, bias, probs, groups.ends)
    check("y", y, wide + probs64[:, None] * bias64[owners], dtype)


def test_zero_where_empty():
    """Only what belongs to an expert without a row is cleared, its last element included."""
    groups = ExpertSegments(torch.tensor([0, 2, 0, 1, 0]), DEVICE)
    weight = torch.full((5, 70, 90), float("nan"), device=DEVICE)
    weight[[1, 3]] = 1.0
    kernels.zero_where_empty_(weight, groups.ends)
    assert torch.equal(weight.sum((1, 2)).cpu(), torch.tensor([0.0, 6300, 0, 6300, 0]))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs 20 GB and a device")
def test_more_elements_than_int32():
    """131,072 tokens x 4 experts x 5,760 columns pass 2^31: the last rows are right."""
    rows, width = 524_288, 2880
    counts = torch.tensor([0, rows - 1001, 1001])
    groups = ExpertSegments(counts, DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    y = torch.zeros(rows, 2 * width, dtype=torch.bfloat16, device=DEVICE)
    y[-2000:].normal_(generator=generator)
    bias = torch.randn(3, 2 * width, device=DEVICE, generator=generator).bfloat16()
    probs = torch.rand(rows, device=DEVICE, generator=generator)
    dout = torch.zeros(rows, width, dtype=torch.bfloat16, device=DEVICE)
    dout[-1001:].normal_(generator=generator)
    out = kernels.swiglu_forward(y, bias, probs, groups.ends, ClampedSwiGLU())
    tail = ExpertSegments(torch.tensor([0, 999, 1001]), DEVICE)
    wide = y[-2000:].double(), bias.double(), probs[-2000:].double()
    check("out", out[-2000:], swiglu_forward_ref(*wide, tail, ClampedSwiGLU()), torch.bfloat16)
    del out
    dy, dbias, _ = kernels.swiglu_backward(dout, y, bias, probs, groups.ends, ClampedSwiGLU())
    d = dout[-2000:].double()
    references = swiglu_backward_ref(d, *wide, tail, ClampedSwiGLU())
    check("dy", dy[-2000:], references[0], torch.bfloat16)
    check("dbias", dbias, references[1], torch.bfloat16)  # all other rows have a gradient of 0
    del dy, y
    bias = bias[:, :width].contiguous()
    before = dout[-2000:].double()
    kernels.add_weighted_bias_(dout, bias, probs, groups.ends)
    owners = tail.owners(2000)
    reference = before + probs[-2000:, None].double() * bias.double()[owners]
    check("y", dout[-2000:], reference, torch.bfloat16)
