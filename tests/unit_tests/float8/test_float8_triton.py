# Copyright (c) 2026, the megatron-core gptoss authors.

"""The Triton kernels of FP8 against the same functions in plain PyTorch.

On a Hopper GPU as they are; without a GPU in Triton's interpreter, where TRITON_INTERPRET=1 is set
before the first import (test_float8.py starts such a run where triton is installed).
"""

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

from megatron.core.float8 import gemm, quantize
from megatron.core.transformer.moe.grouped_mlp import activation_fp8
from megatron.core.transformer.moe.grouped_mlp.activation import ClampedSwiGLU
from megatron.core.transformer.moe.grouped_mlp.expert_segments import ExpertSegments

gemm_kernels = pytest.importorskip("megatron.core.float8.gemm_triton", exc_type=ImportError)
from megatron.core.float8 import quantize_triton
from megatron.core.transformer.moe.grouped_mlp import activation_fp8_triton

# `make test-gpu` runs them; the run in the interpreter names this file.
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]
DEVICE = "cuda" if ON_GPU else "cpu"
COUNTS = {
    "uneven": [5, 0, 130, 1],
    "one-takes-all": [0, 0, 257],
    "empty-ends": [0, 256, 0],
    "five-experts": [1, 64, 65, 0, 300],
}
if not ON_GPU:  # a program of the interpreter takes 20 ms
    COUNTS = {"uneven": [5, 0, 130, 1], "one-takes-all": [0, 0, 257]}
# Each row is a program.
FEW_ROWS = [5, 0, 33, 1]
WIDTH, HIDDEN = 80, 144
CONSTANTS = ClampedSwiGLU()
# The interpreter cuts bf16 off instead of rounding it.
BF16 = 2.0**-8 if ON_GPU else 2.0**-7


@pytest.fixture(params=COUNTS.values(), ids=COUNTS)
def counts(request):
    return request.param


@pytest.fixture
def segments(counts):
    return ExpertSegments(torch.tensor(counts).to(DEVICE), DEVICE)


def plain(function, *args, **kwargs):
    """The result of plain PyTorch."""
    with (
        quantize.QUANTIZE.prefer("torch"),
        gemm.GEMM.prefer("torch"),
        activation_fp8.ACTIVATION_FP8.prefer("torch"),
    ):
        return function(*args, **kwargs)


def draw(*shape, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.to(DEVICE)


def assert_same_e4m3(found, expected):
    """Bit for bit, but for values that fp32 rounding moved across a rounding boundary."""
    assert found.shape == expected.shape and found.dtype == expected.dtype == quantize.E4M3
    different = found.float() != expected.float()
    different &= ~(found.float().isnan() & expected.float().isnan())
    if not ON_GPU:  # it does not carry into the exponent where it rounds up, and rounds ties up
        different &= torch.frexp(expected.float().abs())[0] != 0.5
    assert different.float().mean() <= (2e-3 if ON_GPU else 0.03)
    if ON_GPU:
        both = found.float().nan_to_num(), expected.float().nan_to_num()
        assert relative_error(*both) <= 5e-3


def defined(transposed, counts):
    """The columns of a transposed operand that are defined."""
    columns = sum(-(-count // quantize.SEGMENT) for count in counts) * quantize.SEGMENT
    return transposed[:, :columns]


def test_rows():
    rows = sum(FEW_ROWS)
    x = draw(rows, HIDDEN) * 10.0 ** draw(rows, 1, seed=1)
    x[0], x[1, 3] = 0, float("inf")
    q, scale = quantize_triton.quantize_rows(x)
    expected, expected_scale = plain(quantize.quantize_rows, x)
    assert torch.equal(scale.nan_to_num(-1), expected_scale.nan_to_num(-1))
    assert_same_e4m3(q, expected)


@pytest.mark.parametrize("height, width", [(HIDDEN, 2 * WIDTH), (208, 80), (64, 256)])
def test_matrices(height, width):
    weight = draw(3, height, width).bfloat16()
    weight *= torch.tensor([1, 2.0**-10, 64]).to(weight)[:, None, None]
    found = quantize_triton.quantize_matrices(weight)
    expected = plain(quantize.quantize_matrices, weight)
    assert torch.equal(found[2], expected[2])
    assert_same_e4m3(found[0], expected[0])
    assert torch.equal(found[1].float(), found[0].float().transpose(1, 2))


def test_transposed_rows(counts, segments):
    rows = sum(counts)
    q, scale = plain(quantize.quantize_rows, draw(rows, HIDDEN) * 2.0 ** draw(rows, 1).round())
    columns = quantize.padded_tokens(q, segments)
    found, factor = quantize_triton.transpose_rows(q, scale, segments.ends, columns)
    expected, expected_factor = plain(quantize.transpose_rows, q, scale, segments)
    assert torch.equal(factor, expected_factor)
    assert_same_e4m3(defined(found, counts), defined(expected, counts))


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_gemm(counts, segments, bias):
    rows, groups = sum(counts), len(counts)
    q, scale = plain(quantize.quantize_rows, draw(rows, HIDDEN))
    _, weight, factor = plain(quantize.quantize_matrices, draw(groups, HIDDEN, 272, seed=1))
    biases = (draw(groups, 272, seed=2), draw(rows, seed=3)) if bias else (None, None)
    found, amax = gemm_kernels.grouped_gemm(
        q, scale, weight, factor, segments.ends, *biases, row_amax=True
    )
    expected = plain(gemm.grouped_gemm, q, scale, weight, factor, segments, *biases)
    assert relative_error(found, expected) <= BF16
    assert torch.equal(amax.amax(0), found.abs().amax(1).float())


@pytest.mark.parametrize("accumulate", [False, True], ids=["new", "accumulate"])
def test_wgrad(counts, segments, accumulate):
    rows, groups = sum(counts), len(counts)
    x, x_scale = plain(
        quantize.transpose_rows, *plain(quantize.quantize_rows, draw(rows, HIDDEN)), segments
    )
    dy, dy_scale = plain(
        quantize.transpose_rows, *plain(quantize.quantize_rows, draw(rows, 160, seed=1)), segments
    )
    scale = x_scale * dy_scale
    total = draw(groups, HIDDEN, 160, seed=2) if accumulate else None
    expected = plain(
        gemm.grouped_wgrad, x, dy, scale, segments, None if total is None else total.clone()
    )
    found = gemm_kernels.grouped_wgrad(x, dy, scale, segments.ends, total)
    assert found.dtype == expected.dtype
    assert relative_error(found, expected) <= (1e-3 if accumulate else BF16)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="the interpreter adds in fp32")
def test_long_sums():
    """The tensor cores lose bits of long sums of one sign: 7 % of 4,096 terms, were they not cut."""
    tokens = 32768
    segments = ExpertSegments(torch.tensor([tokens]).to(DEVICE), DEVICE)
    operands = [quantize.quantize_rows(draw(tokens, 128, seed=s).abs()) for s in (0, 1)]
    (x, x_scale), (dy, dy_scale) = (quantize.transpose_rows(*o, segments) for o in operands)
    total = torch.zeros(1, 128, 128, device=DEVICE)
    gemm_kernels.grouped_wgrad(x, dy, x_scale * dy_scale, segments.ends, total)
    expected = x[:, :tokens].double() @ dy[:, :tokens].double().t() * (x_scale * dy_scale).double()
    assert relative_error(total[0], expected) <= 4e-3


def test_swiglu_forward(counts, segments):
    y = draw(sum(counts), 2 * WIDTH) * 5
    bias = draw(len(counts), 2 * WIDTH, seed=1)
    scale = activation_fp8.out_scale(CONSTANTS)
    found = activation_fp8_triton.swiglu_forward(y, bias, segments.ends, CONSTANTS, scale)
    assert_same_e4m3(found, plain(activation_fp8.swiglu_forward, y, bias, segments, CONSTANTS))


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_swiglu_backward(counts, segments, bias):
    rows = sum(counts)
    dout, y = draw(rows, WIDTH) * 1e-3, draw(rows, 2 * WIDTH, seed=1) * 5
    bias = draw(len(counts), 2 * WIDTH, seed=2) if bias else None
    probs = draw(rows, seed=3).abs()
    amax = dout.abs().amax(1)[None]
    scales = plain(activation_fp8.dy_scales, amax, probs, segments, CONSTANTS)
    bound = activation_fp8.gradient_bound(CONSTANTS)
    found = activation_fp8_triton.dy_scales(amax, probs, segments.ends, bound)
    assert torch.equal(found[0], scales[0]) and torch.equal(found[1], scales[1])
    expected = plain(
        activation_fp8.swiglu_backward, dout, y, bias, probs, scales, segments, CONSTANTS
    )
    dy, dy_t, out_t, out_scale, dbias, dprobs = expected
    found = activation_fp8_triton.swiglu_backward(
        dout, y, bias, probs, scales, out_scale, segments.ends, CONSTANTS, dy_t.shape[1]
    )
    assert_same_e4m3(found[0], dy)
    assert_same_e4m3(defined(found[1], counts), defined(dy_t, counts))
    assert_same_e4m3(defined(found[2], counts), defined(out_t, counts))
    if bias is not None:
        assert relative_error(found[3], dbias) <= 1e-5
    assert relative_error(found[4], dprobs) <= 1e-5


def test_output_gradient():
    rows, segments = sum(FEW_ROWS), ExpertSegments(torch.tensor(FEW_ROWS).to(DEVICE), DEVICE)
    dout, bias = draw(rows, HIDDEN), draw(len(FEW_ROWS), HIDDEN, seed=1)
    probs = draw(rows, seed=2).abs()
    found = activation_fp8_triton.quantize_dout(dout, bias, probs, segments.ends)
    expected = plain(activation_fp8.quantize_dout, dout, bias, probs, segments)
    assert_same_e4m3(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert relative_error(found[2], expected[2]) <= 1e-5
    assert relative_error(found[3], expected[3]) <= 1e-5
