# Copyright (c) 2026, the megatron-core gptoss authors.

"""Rounding to MXFP4: exact for representable values, otherwise to nearest."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megatron.gpt_oss.checkpoint.hf.mxfp4 import E2M1, dequantize, quantize

MAGNITUDES = torch.tensor(E2M1[:8], dtype=torch.float64)


def _nearest_by_search(values, scales):
    """The nearest E2M1 multiple of the scale by trying all; ties to the even code."""
    scale = torch.exp2(scales.double() - 127)[..., None, None]
    scaled = (values.double().abs().unflatten(-1, (-1, 32)).unsqueeze(-1)) / scale
    distance = (scaled - MAGNITUDES).abs()
    best = distance.amin(dim=-1, keepdim=True)
    ties = distance == best
    even = ties & (torch.arange(8) % 2 == 0)
    pick = torch.where(even.any(-1, keepdim=True), even, ties).int().argmax(dim=-1)
    nearest = MAGNITUDES[pick] * scale.squeeze(-1)
    return torch.copysign(nearest, values.double().unflatten(-1, (-1, 32))).flatten(-2)


def test_every_representable_block_is_a_fixed_point():
    """Random blocks at every scale that bf16 holds, with blocks of small values alone among them."""
    blocks = torch.randint(0, 256, (253, 40, 16), dtype=torch.uint8)
    largest = torch.arange(40).view(1, 40, 1) % 8  # codes up to 0 .. 7
    low, high = blocks & 0x0F, blocks >> 4
    low = (low & 8) | (low & 7).minimum(largest.to(torch.uint8))
    high = (high & 8) | (high & 7).minimum(largest.to(torch.uint8))
    scales = torch.arange(253, dtype=torch.uint8).unsqueeze(1).expand(253, 40)
    values = dequantize(low | high << 4, scales)
    again = dequantize(*quantize(values))
    assert torch.equal(again, values)
    assert torch.equal(torch.signbit(again), torch.signbit(values))  # -0 too
    # And as bytes, where the block uses the upper half of the range.
    kept = torch.cat((low, high), dim=-1).bitwise_and(7).amax(dim=-1) >= 6
    blocks_again, scales_again = quantize(values)
    assert torch.equal(scales_again[kept], scales[kept])
    assert torch.equal(blocks_again[kept], (low | high << 4)[kept])
    assert kept.sum() > 1000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounds_to_nearest(dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64, 320, generator=generator) * torch.exp2(
        torch.randint(-40, 40, (64, 1), generator=generator)
    )
    # Every tie, exactly: with 4 in the block its scale is 1.
    values[0, :32] = 0
    values[0, :9] = torch.tensor([4, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 7])
    values = values.to(dtype)
    blocks, scales = quantize(values)
    exponent = torch.floor(torch.log2(values.double().abs().unflatten(-1, (-1, 32)).amax(-1))) - 2
    assert torch.equal(scales.double(), exponent + 127)
    assert torch.equal(
        dequantize(blocks, scales, torch.float64), _nearest_by_search(values, scales)
    )
    by_hand = dequantize(blocks, scales)[0, :9].tolist()
    assert by_hand == [4, 0, 1, 1, 2, 2, 4, 4, 6]


def test_bf16_by_its_bits():
    """Every finite bf16 among neighbours of every size, as the path of fp32 rounds it."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    every = every[torch.isfinite(every)]
    every = torch.cat((every, every[: -len(every) % 32])).view(-1, 32)
    for seed in range(6):
        order = torch.randperm(every.numel(), generator=torch.Generator().manual_seed(seed))
        values = every if seed == 0 else every.flatten()[order].view(-1, 32)
        if seed > 2:  # of like size, as weights are
            exponent = torch.randint(0, 8, values.shape) - 128 + 40 * seed
            values = torch.ldexp(1 + torch.rand(values.shape), exponent).to(torch.bfloat16)
        values = values.view(2, -1, 64)
        blocks, scales = quantize(values)
        expected_blocks, expected_scales = quantize(values.float())
        assert torch.equal(scales, expected_scales)
        assert torch.equal(blocks, expected_blocks)


def test_bf16_in_many_pieces():
    """More than one piece of work and a rest, by two threads at once; some pieces have zeros or
    subnormals, which another path takes."""
    generator = torch.Generator().manual_seed(7)
    values = torch.randn(9001, 32, generator=generator).to(torch.bfloat16)
    values[::50] *= 0
    values[8500] = torch.tensor(2.0**-131)
    values = values.view(9001, 32).clone()
    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(quantize, [values, values.flip(0)] * 3))
    expected = quantize(values.float())
    for number, (blocks, scales) in enumerate(results):
        order = (lambda t: t.flip(0)) if number % 2 else (lambda t: t)
        assert torch.equal(order(scales), expected[1])
        assert torch.equal(order(blocks), expected[0])
    transposed = values[:9000].view(-1, 320).t().contiguous().t()  # [900, 320] in another order
    for one, other in zip(quantize(transposed), expected):
        assert torch.equal(one.flatten(), other[:9000].flatten())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_zeros_and_extremes(dtype):
    blocks, scales = quantize(torch.zeros(2, 32, dtype=dtype))
    assert blocks.eq(0).all() and scales.eq(0).all()
    extremes = torch.zeros(4, 32)
    extremes[0, 0] = torch.finfo(torch.bfloat16).max
    extremes[1, 0] = 2.0**-133  # the smallest bf16
    extremes[2, 0] = -1.5 * 2.0**127
    extremes[3, 0] = 2.0**-128
    values = dequantize(*quantize(extremes.to(dtype)), torch.float64)[:, 0].tolist()
    assert values == [1.5 * 2.0**127, 0, -1.5 * 2.0**127, 2.0**-128]


def test_what_cannot_be_rounded():
    for bad in (torch.inf, torch.nan):
        for dtype in (torch.bfloat16, torch.float32):
            with pytest.raises(ValueError, match="not finite"):
                quantize(torch.full((1, 32), bad, dtype=dtype))
    with pytest.raises(ValueError, match="40 is not a multiple of 32"):
        quantize(torch.zeros(2, 40))


def test_scale_255_is_nan():
    values = dequantize(torch.zeros(1, 16, dtype=torch.uint8), torch.tensor([255]).to(torch.uint8))
    assert values.isnan().all()
