# Copyright (c) 2026, the megatron-core gptoss authors.

"""Triton kernel of unpermute: sums the rows of each token; addresses are int64."""

import triton
import triton.language as tl


def sum_by_token(rows, rows_of_token, starts):
    """[t, h] to [n, h]; the other two are what `permute.rows_of_tokens` returns."""
    num_tokens, width = starts.numel() - 1, rows.shape[1]
    sums = rows.new_empty(num_tokens, width)
    columns = min(1024, triton.next_power_of_2(width))
    _sum_by_token[(num_tokens, triton.cdiv(width, columns))](
        rows, rows_of_token, starts, sums, width, COLUMNS=columns
    )
    return sums


@triton.jit
def _sum_by_token(rows, rows_of_token, starts, sums, width, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < width
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for place in range(tl.load(starts + token), tl.load(starts + token + 1)):
        row = tl.load(rows_of_token + place)
        total += tl.load(rows + row * width + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(sums + token * width + column, total, mask=mask)
