# Copyright (c) 2026, the megatron-core gptoss authors.

"""MXFP4 as in openai/gpt-oss files: 4-bit floats (E2M1) in blocks of 32 with a shared exponent."""

import torch

# The sixteen values of E2M1, by code; bit 3 is the sign.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
EXPONENT_BIAS = 127


def dequantize(
    blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Expand MXFP4 to floats; every value is exact in bfloat16.

    Args:
        blocks: [..., n, 16] uint8; the low nibble of a byte is the even element.
        scales: [..., n] uint8, the exponent of a block plus 127.
        dtype: of the result.
    Returns:
        [..., n * 32].
    """
    table = torch.tensor(E2M1, dtype=torch.float32, device=blocks.device)
    codes = torch.stack((blocks & 0x0F, blocks >> 4), dim=-1).flatten(-2)  # [..., n, 32]
    exponent = scales.to(torch.int32) - EXPONENT_BIAS
    values = torch.ldexp(table[codes.to(torch.int64)], exponent.unsqueeze(-1))
    return values.flatten(-2).to(dtype)
