# Copyright (c) 2026, the megatron-core gptoss authors.

"""FP8 operands and grouped GEMMs in plain PyTorch, against float64.

The Triton kernels are compared with these in test_float8_triton.py.
"""

from pathlib import Path

import pytest
import torch

from megatron.core.float8.gemm import grouped_gemm, grouped_wgrad
from megatron.core.float8.quantize import (
    E4M3,
    SEGMENT,
    padded_tokens,
    power_of_two_scale,
    quantize_matrices,
    quantize_rows,
    transpose_rows,
)
from megatron.core.transformer.moe.grouped_mlp.expert_segments import ExpertSegments
from tests.harness.compare import relative_error
from tests.harness.triton_interpreter import run_in_interpreter

COUNTS = {
    "uneven": [5, 0, 300, 1],
    "one-takes-all": [0, 0, 257],
    "empty-ends": [0, 256, 0],
    "no-rows": [0, 0],
}
SMALLEST = 2.0**-126


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def segments_of(counts):
    return ExpertSegments(torch.tensor(counts), "cpu")


@pytest.mark.parametrize(
    "amax, scale",
    [
        (448.0, 1.0),
        (448.1, 2.0),
        (449.0, 2.0),
        (224.0, 0.5),
        (1.0, 2.0**-8),
        (1.75, 2.0**-8),
        (1.76, 2.0**-7),
        (0.0, SMALLEST),
        (1e-45, SMALLEST),
        (3e38, 2.0**120),
        (float("inf"), float("nan")),
        (float("nan"), float("nan")),
    ],
)
def test_power_of_two_scale(amax, scale):
    found = power_of_two_scale(torch.tensor([amax]))
    assert torch.equal(found.nan_to_num(-1), torch.tensor([scale]).nan_to_num(-1))
    if scale == scale and amax > 1e-30:
        assert amax / scale <= 448 and amax / (scale / 2) > 448


def test_rows():
    """Values keep four bits, down to 2^-15 of the largest of their row; no row disturbs another."""
    x = draw(7, 48) * 10.0 ** torch.arange(-20, 15, 5)[:, None]
    q, scale = quantize_rows(x)
    assert q.dtype == E4M3 and scale.dtype == torch.float32
    error = (q.float() * scale[:, None] - x).abs()
    floor = x.abs().amax(1, keepdim=True) * 2.0**-18
    assert (error <= torch.maximum(x.abs() * 2.0**-4, floor)).all()
    assert (q.float().abs().amax(1) > 200).all()  # the range is used


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_rows_stay_so(bad):
    """A row with infinity or NaN makes its outputs NaN, and no other row's."""
    x = draw(4, 32)
    x[2, 5] = bad
    q, scale = quantize_rows(x)
    weight, _, factor = quantize_matrices(draw(1, 16, 32))
    y = grouped_gemm(q, scale, weight, factor, segments_of([4]))
    assert y[2].isnan().all() and y[[0, 1, 3]].isfinite().all()


def test_zero_rows():
    q, scale = quantize_rows(torch.zeros(3, 16))
    assert (q.float() == 0).all() and (scale > 0).all()


def test_outliers():
    """An element of 1e4 costs the others of its row at most the range below 2^-15 of it."""
    x = draw(2, 64)
    x[0, 0] = 1e4
    q, scale = quantize_rows(x)
    assert relative_error(q[0].float() * scale[0], x[0]) < 2.0**-4
    assert relative_error(q[1].float() * scale[1], x[1]) < 2.0**-4


def test_weights_that_were_mxfp4_are_exact():
    """MXFP4 has one fraction bit and scales of powers of two, as these scales are."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6.0])
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(8, (2, 64, 32), generator=generator)
    signs = torch.randint(2, codes.shape, generator=generator) * 2 - 1
    blocks = 2.0 ** torch.randint(-9, -2, (2, 64, 1), generator=generator)
    weight = values[codes] * signs * blocks
    q, transposed, scale = quantize_matrices(weight.bfloat16())
    assert torch.equal(q.float() * scale[:, None, None], weight)
    assert torch.equal(transposed.float(), q.float().transpose(1, 2))


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_transposed_rows(counts):
    """The same numbers as the rows, each segment at a multiple of SEGMENT, zeros after it."""
    segments, rows = segments_of(counts), sum(counts)
    q, scale = quantize_rows(draw(rows, 32) * 2.0 ** (draw(rows, 1, seed=1) * 2).round())
    transposed, factor = transpose_rows(q, scale, segments)
    assert transposed.shape == (32, padded_tokens(q, segments))
    column = row = 0
    for expert, count in enumerate(counts):
        found = transposed[:, column : column + count].float() * factor[expert]
        expected = (q[row : row + count].float() * scale[row : row + count, None]).t()
        small = expected.abs() < factor[expert] * 2.0**-6  # subnormal: fewer bits
        assert torch.equal(found[~small], expected[~small])
        assert ((found - expected).abs() <= factor[expert] * 2.0**-10).all()
        width = -(-count // SEGMENT) * SEGMENT
        assert (transposed[:, column + count : column + width].float() == 0).all()
        column, row = column + width, row + count
    assert (factor[torch.tensor(counts) == 0] == 1).all()


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_gemm(counts):
    """Against float64 of the quantised operands: only the result is rounded."""
    segments, rows, groups = segments_of(counts), sum(counts), len(counts)
    q, scale = quantize_rows(draw(rows, 48) * 100)
    _, weight, factor = quantize_matrices(draw(groups, 48, 32, seed=1))
    bias, bias_scale = draw(groups, 32, seed=2), draw(rows, seed=3)
    y, amax = grouped_gemm(q, scale, weight, factor, segments, bias, bias_scale, row_amax=True)
    owner = torch.repeat_interleave(torch.arange(groups), torch.tensor(counts))
    expected = torch.einsum("tk,tnk->tn", q.double(), weight.double()[owner])
    expected *= (scale.double() * factor.double()[owner])[:, None]
    expected += bias_scale.double()[:, None] * bias.double()[owner]
    assert y.dtype == torch.bfloat16
    assert relative_error(y, expected) <= 2.0**-9
    assert torch.equal(amax.amax(0), y.abs().amax(1).float())


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("accumulate", [False, True], ids=["new", "accumulate"])
def test_wgrad(counts, accumulate):
    segments, rows, groups = segments_of(counts), sum(counts), len(counts)
    x, x_scale = transpose_rows(*quantize_rows(draw(rows, 48)), segments)
    dy, dy_scale = transpose_rows(*quantize_rows(draw(rows, 32, seed=1) * 1e-4), segments)
    total = draw(groups, 48, 32, seed=2) * 1e-3 if accumulate else None
    expected = torch.zeros(groups, 48, 32, dtype=torch.float64)
    if accumulate:
        expected += total.double()
    column = 0
    for expert, count in enumerate(counts):
        tokens = slice(column, column + count)
        product = x[:, tokens].double() @ dy[:, tokens].double().t()
        expected[expert] += product * (x_scale * dy_scale)[expert].double()
        column += -(-count // SEGMENT) * SEGMENT
    found = grouped_wgrad(x, dy, x_scale * dy_scale, segments, total)
    assert found.dtype == (torch.float32 if accumulate else torch.bfloat16)
    assert accumulate == (found is total)
    assert relative_error(found, expected) <= (1e-6 if accumulate else 2.0**-9)


def test_kernels_in_the_interpreter():
    """The Triton kernels without a GPU; `make test-gpu` runs the same file on the device."""
    run_in_interpreter(Path(__file__).with_name("test_float8_triton.py"))
