# Copyright (c) 2026, the megatron-core gptoss authors.

"""MXFP4 as in openai/gpt-oss files: blocks of 32 4-bit floats (E2M1) with a shared exponent.

Source: OCP Microscaling Formats (MX) Specification 1.0; the packing is that of transformers'
`convert_moe_packed_tensors`.
"""

import functools

import torch

from megatron.gpt_oss.checkpoint.hf import mxfp4_bits

# The values of E2M1 by code; bit 3 is the sign.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
EXPONENT_BIAS = 127
LARGEST_EXPONENT = 2  # of E2M1: 6 = 1.5 * 2^2
BLOCK = mxfp4_bits.BLOCK
NAN_SCALE = 255


def dequantize(
    blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Convert MXFP4 to floats; every value is exact in bfloat16.

    Args:
        blocks: [..., n, 16] uint8; the low nibble of a byte is the even element.
        scales: [..., n] uint8, the exponent of a block plus 127; 255 is NaN.
        dtype: of the result.
    Returns:
        [..., n * 32].
    """
    # One table look-up per byte gives two scaled values, and a chunk fits the cache: 3 GB/s of bf16
    # on one core. A look-up per nibble followed by ldexp gave 0.02.
    out = torch.empty(*blocks.shape[:-2], blocks.shape[-2] * BLOCK, dtype=torch.bfloat16)
    out = out.to(blocks.device)
    pairs = _pairs().to(blocks.device)
    flat = out.view(torch.int32).view(-1, BLOCK // 2)
    parts = (x.split(_CHUNK) for x in (flat, blocks.reshape(-1, BLOCK // 2), scales.reshape(-1)))
    for to, block, scale in zip(*parts):
        index = block.to(torch.int32)
        index.add_((scale.to(torch.int32) << 8).unsqueeze(-1))
        torch.index_select(pairs, 0, index.view(-1), out=to.view(-1))
    return out.to(dtype)


# Blocks at a time: 0.75 MB of bf16 values.
_CHUNK = 12288


@functools.cache
def _pairs() -> torch.Tensor:
    """[256 * 256] int32: two bf16 values for each scale and byte."""
    byte = torch.arange(256)
    values = torch.tensor(E2M1, dtype=torch.float64)
    pairs = torch.stack((values[byte & 0x0F], values[byte >> 4]), dim=-1)
    exponent = torch.arange(256) - EXPONENT_BIAS
    table = (pairs * torch.exp2(exponent.double())[:, None, None]).to(torch.bfloat16)
    table[NAN_SCALE] = torch.nan
    return table.view(torch.int32).flatten()


def quantize(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round floats to MXFP4 by section 6.3 of the specification.

    The shared exponent of a block is floor(log2(largest magnitude)) - 2. An element is the nearest
    multiple of the scale, ties to the even code, and saturates at 6. A block of zeros has scale 0.
    Values that came from MXFP4 are exact, though the scale may be another one.

    Args:
        values: [..., n * 32], any float dtype, finite.
    Returns:
        blocks [..., n, 16] and scales [..., n], both uint8, for `dequantize`.
    Raises:
        ValueError: a value is not finite, or the last dimension is no multiple of 32.
    """
    if values.shape[-1] % BLOCK:
        raise ValueError(f"last dimension {values.shape[-1]} is not a multiple of {BLOCK}")
    if values.dtype == torch.bfloat16 and values.device.type == "cpu":
        return _quantize_bits(values)
    return _quantize_floats(values)


def _quantize_bits(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`_quantize_floats` for bf16 on the CPU, about 30 times as fast."""
    bits = values.contiguous().view(torch.int16).view(-1)
    groups = (*values.shape[:-1], values.shape[-1] // BLOCK)
    blocks = torch.empty(*groups, BLOCK // 2, dtype=torch.uint8)
    scales = torch.empty(groups, dtype=torch.uint8)
    for part in mxfp4_bits.encode(bits, blocks.view(-1), scales.view(-1)):
        exact = _quantize_floats(bits.view(-1, BLOCK)[part].view(torch.bfloat16))
        blocks.view(-1, BLOCK // 2)[part] = exact[0].squeeze(1)
        scales.view(-1)[part] = exact[1].squeeze(1)
    return blocks, scales


def _quantize_floats(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values = values.to(torch.float32).unflatten(-1, (-1, BLOCK))
    largest = values.abs().amax(dim=-1)
    if not torch.isfinite(largest).all():
        raise ValueError("a value is not finite")
    # frexp: largest = m * 2^e with m in [0.5, 1), so that floor(log2) is e - 1.
    exponent = torch.frexp(largest).exponent - 1 - LARGEST_EXPONENT
    exponent = exponent.clamp(-EXPONENT_BIAS, EXPONENT_BIAS)
    exponent = torch.where(largest == 0, -EXPONENT_BIAS, exponent)
    # In two steps, because 2^127 and more exceed the range of an fp32 factor.
    half = -exponent // 2
    scaled = torch.ldexp(torch.ldexp(values, half.unsqueeze(-1)), (-exponent - half).unsqueeze(-1))
    sign = (torch.signbit(scaled)).to(torch.uint8) << 3
    codes = _round_to_even_code(scaled.abs()) | sign
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponent + EXPONENT_BIAS).to(torch.uint8)


def _round_to_even_code(magnitude: torch.Tensor) -> torch.Tensor:
    """The code (0 .. 7) of the nearest E2M1 magnitude; ties to the even code.

    Steps are 0.5 below 2, 1 from 2 to 4, and 2 from 4 on. torch.round rounds ties to the even
    multiple, which is the even code in each range.
    """
    small = torch.round(magnitude * 2)  # codes 0 .. 4
    middle = torch.round(magnitude) + 2  # 2, 3, 4 -> codes 4, 5, 6
    large = torch.round(magnitude / 2) + 4  # 4, 6 -> codes 6, 7
    code = torch.where(magnitude < 2, small, torch.where(magnitude < 4, middle, large))
    return code.clamp(max=7).to(torch.uint8)
