# Copyright (c) 2026, the megatron-core gptoss authors.

"""BF16 to MXFP4 by integer arithmetic on the bits, two dozen passes over a piece in the cache.

The rule is that of `mxfp4.quantize`, whose plain arithmetic in fp32 the tests compare this with. A
core takes 1.2 GB/s of bf16 with it, 0.8 GB/s with one look-up an element, 0.04 GB/s in fp32.
"""

import functools
import threading

import numpy
import torch

BLOCK = 32
# Blocks at a time: 1.4 MB with all scratch, so that a piece stays in a core's second-level cache.
_PIECE = 4096

# A bf16 without its sign is 128 * exponent + mantissa, so that a difference of such bits is 128
# times the logarithm of a ratio, but for the curve within an octave. Let y be the bits of a value
# less those of half its block's scale: 128 is a ratio of 1, the first that E2M1 has as a normal
# number. From there on a code is a step of 64 in y, rounded to the even code by adding 31 and bit 6
# before the shift; ratios below 1 have codes of their own:
#     y < -127 code 0, y < 64 code 1, y < 161 code 2, y < 224 code 3, y < 289 code 4, ...
# With v = y + 31 and rung = (v + bit 6 of v) >> 5 every one of these limits falls between two rungs.
_HALF_UP = 31
_LOWEST = -127 + _HALF_UP - 1  # all that is below has code 0
_HIGHEST = 448  # and all from here on code 7
_RUNG_OF_CODE = (-3, 3, 6, 8, 10, 12, 14)  # the first of codes 1 .. 7
_SIGN = 32  # added to the rung of a negative value
_SMALLEST_NORMAL = 5 << 7  # less in a block: its scale is in reach of subnormal bf16, or it is zero
_INFINITE = 0x7F80


def encode(bits: torch.Tensor, blocks: torch.Tensor, scales: torch.Tensor) -> list[slice]:
    """Round bf16 to MXFP4 where that is a matter of bits.

    Args:
        bits: [n * 32] int16, contiguous: the bits of bf16 values.
        blocks: [n * 16] uint8, written: two codes a byte.
        scales: [n] uint8, written.
    Returns:
        The blocks (as slices of n) that hold numbers so small that bf16 has them as subnormals;
        nothing of use is written there.
    Raises:
        ValueError: a value is not finite.
    """
    left = []
    for first in range(0, len(scales), _PIECE):
        part = slice(first, min(first + _PIECE, len(scales)))
        scratch = _scratch(part.stop - part.start)
        value = slice(part.start * BLOCK, part.stop * BLOCK)
        byte = slice(part.start * BLOCK // 2, part.stop * BLOCK // 2)
        if not scratch.encode(bits[value], blocks[byte], scales[part]):
            left.append(part)
    return left


class _Scratch:
    """Memory for a number of blocks, and its views; numpy where it is the faster of the two."""

    def __init__(self, count: int):
        size = count * BLOCK
        self._a, self._b, self._c = (torch.zeros(size, dtype=torch.int16) for _ in range(3))
        self._rung, self._negative = (torch.empty(size, dtype=torch.uint8) for _ in range(2))
        self._offset = torch.empty(count, 1, dtype=torch.int16)
        self._largest = torch.empty(count, dtype=torch.int64)
        self._a_blocks = self._a.view(count, BLOCK)
        self._b_quads = self._b.view(torch.int64).view(count, BLOCK // 4)
        self._pair = self._c.view(torch.int32)

    def encode(self, bits: torch.Tensor, blocks: torch.Tensor, scales: torch.Tensor) -> bool:
        """See the function; False if there are subnormal blocks."""
        a, b = self._a.numpy(), self._b.numpy()
        numpy.bitwise_and(bits.numpy(), 0x7FFF, out=a)
        largest = self._largest_of_blocks()
        if largest.max() >= _INFINITE:
            raise ValueError("a value is not finite")
        zero = None
        if largest.min() < _SMALLEST_NORMAL:
            zero = largest == 0
            if (zero != (largest < _SMALLEST_NORMAL)).any():
                return False
        numpy.right_shift(largest, 7, out=largest)
        numpy.subtract(largest, 2, out=largest)  # the largest exponent of E2M1
        if zero is not None:
            largest[zero] = 0
        numpy.copyto(scales.numpy(), largest, casting="unsafe")
        numpy.subtract(largest, 1, out=largest)  # half the scale
        numpy.multiply(largest, 128, out=largest)
        offset = self._offset.numpy()[:, 0]
        numpy.subtract(largest, _HALF_UP, out=offset, casting="unsafe")
        if zero is not None:
            offset[zero] = 2**14
        self._a_blocks.sub_(self._offset)
        self._a.clamp_(_LOWEST, _HIGHEST)
        numpy.bitwise_and(a, 64, out=b)
        torch.add(self._b, self._a, alpha=64, out=self._b)  # 64 times v + bit 6
        numpy.right_shift(b, 11, out=b)
        self._rung.copy_(self._b)
        numpy.less(bits.numpy(), 0, out=self._negative.numpy().view(numpy.bool_))
        torch.add(self._rung, self._negative, alpha=_SIGN, out=self._rung)
        numpy.copyto(self._pair.numpy(), self._rung.numpy().view(numpy.uint16))
        torch.index_select(_bytes_of_rungs(), 0, self._pair, out=blocks)
        return True

    def _largest_of_blocks(self) -> numpy.ndarray:
        """[n] int64 of the largest of `a` in a block.

        In two steps the last of four neighbours gets the largest of them, which is the upper end of
        an int64; comparing those compares it. Along 32 int16 the reduction takes twice the time.
        """
        a, b, c = self._a.numpy(), self._b.numpy(), self._c.numpy()
        numpy.maximum(a[1:], a[:-1], out=c[1:])
        numpy.maximum(c[3:], c[1:-2], out=b[3:])
        torch.amax(self._b_quads, -1, out=self._largest)
        largest = self._largest.numpy()
        return numpy.right_shift(largest, 48, out=largest)


_kept = threading.local()


def _scratch(count: int) -> _Scratch:
    """A thread's own."""
    if getattr(_kept, "count", None) != count:
        _kept.count, _kept.scratch = count, _Scratch(count)
    return _kept.scratch


@functools.cache
def _bytes_of_rungs() -> torch.Tensor:
    """[65536] uint8: two codes by two rungs, the second in the upper byte, each modulo 256."""
    byte = torch.arange(256)
    lowest = 256 + (_LOWEST >> 5)
    negative = (byte >= (lowest + _SIGN) % 256) & (byte < 128)
    rung = torch.where(negative, byte - _SIGN, byte)
    rung = torch.where(rung >= 128, rung - 256, rung)
    code = torch.bucketize(rung, torch.tensor(_RUNG_OF_CODE), right=True)
    code = (code | negative.long() << 3).to(torch.uint8)
    return (code.unsqueeze(0) | code.unsqueeze(1) << 4).flatten()
