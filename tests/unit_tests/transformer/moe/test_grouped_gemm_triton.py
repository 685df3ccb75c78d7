# Copyright (c) 2026, the megatron-core gptoss authors.

"""The Triton kernels of the grouped GEMMs against plain PyTorch in float64.

On a Hopper GPU as they are; without a GPU in Triton's interpreter, where TRITON_INTERPRET=1 is set
before the first import (test_grouped_experts.py starts such a run where triton is installed).
"""

import itertools
import os

import pytest
import torch

from tests.harness.compare import relative_error

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)
if ON_GPU and torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("these kernels are for Hopper", allow_module_level=True)

from megatron.core.transformer.moe.grouped_mlp.dispatch import GEMM
from megatron.core.transformer.moe.grouped_mlp.expert_segments import ExpertSegments

kernels = pytest.importorskip(
    "megatron.core.transformer.moe.grouped_mlp.gemm_triton", exc_type=ImportError
)

# `make test-gpu` runs them; the run in the interpreter names this file.
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16 if ON_GPU else torch.float16  # the interpreter does not support bf16 GEMMs
# Rows of each expert. Tiles have 128 rows; the gradient of a matrix takes 64 at a time.
COUNTS = {
    "uneven": [5, 0, 130, 1],
    "one-takes-all": [0, 0, 257],
    "empty-ends": [0, 128, 0],
    "one-expert": [127],
    "five-experts": [1, 64, 65, 0, 200],
}
# Inputs and outputs: tiles have 256 columns, and depth is taken 64 at a time.
SIZES = [(64, 256), (200, 264), (72, 8), (8, 520)]
KINDS = {  # (with bias, transposed weight)
    "forward": (False, False),
    "forward-bias": (True, False),
    "dgrad": (False, True),
    "dgrad-bias": (True, True),
}


def check(name, value, reference):
    """bf16 results of fp32 sums keep 8 bits; poisoned memory shows as NaN."""
    assert value.shape == reference.shape and value.dtype == DTYPE, name
    error = relative_error(value, reference)
    assert error <= 2**-8, f"{name}: relative error {error:.1e}"


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DTYPE).to(DEVICE)


def product_cases():
    """Every combination on a GPU; in the interpreter each pair of two parameters' values."""
    for (i, counts), (j, sizes), (k, kind) in itertools.product(
        enumerate(COUNTS), enumerate(SIZES), enumerate(KINDS)
    ):
        if ON_GPU or (i + j) % len(KINDS) == k:
            yield pytest.param(COUNTS[counts], sizes, *KINDS[kind], id=f"{counts}-{sizes}-{kind}")


@pytest.mark.parametrize("counts, sizes, with_bias, transposed", product_cases())
def test_product(counts, sizes, with_bias, transposed):
    groups = ExpertSegments(torch.tensor(counts), DEVICE)
    depth, width = sizes
    x, bias = draw(sum(counts), depth), draw(len(counts), width, seed=1)
    weight = draw(len(counts), *(sizes[::-1] if transposed else sizes), seed=2)
    if transposed:
        weight = weight.transpose(1, 2)
    scale = torch.rand(sum(counts), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    owners = groups.owners(sum(counts))
    reference = torch.einsum("tk,tkn->tn", x.double(), weight.double()[owners])
    if with_bias:
        reference += scale[:, None].double() * bias.double()[owners]
    more = (bias, scale) if with_bias else ()
    check("y", kernels.grouped_gemm(x, weight, groups.ends, *more), reference)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_weight_gradient(counts, sizes):
    groups = ExpertSegments(torch.tensor(counts), DEVICE)
    x, dy = draw(sum(counts), sizes[0]), draw(sum(counts), sizes[1], seed=1)
    found = kernels.grouped_wgrad(x, dy, groups.ends)
    pieces = zip(x.double().split(counts), dy.double().split(counts))
    check("dweight", found, torch.stack([a.t() @ b for a, b in pieces]))
    assert all(found[e].eq(0).all() for e, count in enumerate(counts) if not count)


def test_nan_stays_with_its_expert():
    """Of rows in the same tile, and of the next expert's matrix beyond a depth that 64 does not
    divide."""
    groups = ExpertSegments(torch.tensor([70, 0, 3, 60]), DEVICE)
    x, dy = draw(133, 72), draw(133, 264, seed=1)
    weight = draw(4, 72, 264, seed=2)
    x[70:73] = dy[70:73] = weight[1:3] = float("nan")
    others = [0, 3]
    for y in (
        kernels.grouped_gemm(x, weight, groups.ends),
        kernels.grouped_gemm(dy, weight.transpose(1, 2), groups.ends),
    ):
        assert y[:70].isfinite().all() and y[73:].isfinite().all() and y[70:73].isnan().all()
    dweight = kernels.grouped_wgrad(x, dy, groups.ends)
    assert dweight[others].isfinite().all() and dweight[2].isnan().all()


@pytest.mark.skipif(not ON_GPU, reason="needs a device")
def test_operands_that_are_taken():
    """bf16, with addresses and rows that TMA supports; otherwise PyTorch's GEMMs run."""
    weight = draw(2, 16, 24)
    assert GEMM.select(draw(4, 16), weight).module is kernels
    assert GEMM.select(draw(4 * 16 + 4)[4:].view(4, 16), weight).name != "triton"  # 8 bytes off
    for x in (draw(4, 16).float(), draw(4, 20), draw(0, 16)):
        assert GEMM.select(x, weight).name != "triton"


@pytest.mark.skipif(not ON_GPU, reason="needs 20 GB and a device")
def test_more_elements_than_int32():
    """131,072 tokens x 4 experts x 5,760 columns pass 2^31: the last rows are right."""
    rows, width = 524_288, 5760
    groups = ExpertSegments(torch.tensor([0, rows - 1001, 1001]), DEVICE)
    x = torch.zeros(rows, 64, dtype=torch.bfloat16, device=DEVICE)
    x[-2000:] = draw(2000, 64)
    weight = draw(3, 64, width, seed=1)
    y = kernels.grouped_gemm(x, weight, groups.ends)
    owners = groups.owners(rows)[-2000:]
    pieces = zip(x[-2000:].double().split([999, 1001]), weight[1:].double())
    reference = torch.cat([a @ b for a, b in pieces])
    assert owners.unique_consecutive().tolist() == [1, 2]
    check("y", y[-2000:], reference)
    assert y[:-2000].eq(0).all()
    dx = kernels.grouped_gemm(y, weight.transpose(1, 2), groups.ends)
    pieces = zip(y[-2000:].double().split([999, 1001]), weight[1:].double())
    check("dx", dx[-2000:], torch.cat([a @ b.t() for a, b in pieces]))
    dweight = kernels.grouped_wgrad(x, y, groups.ends)
    pieces = zip(x[-2000:].double().split([999, 1001]), y[-2000:].double().split([999, 1001]))
    check("dweight", dweight[1:], torch.stack([a.t() @ b for a, b in pieces]))
