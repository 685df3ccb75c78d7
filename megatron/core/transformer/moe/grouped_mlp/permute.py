# Copyright (c) 2026, the megatron-core gptoss authors.

"""Permute tokens to the experts and back; each is the gradient of the other.

A token has one row, a copy, for each of its experts. Permute is a gather. Unpermute sums the rows
of each token in fp32, in their order, and rounds once; a scatter with atomic additions in bf16
rounds after each of them.
"""

import torch

from megatron.core.transformer.moe.grouped_mlp.dispatch import UNPERMUTE


def take_rows(tokens: torch.Tensor, token_of_row: torch.Tensor) -> torch.Tensor:
    """Permute: copy the token of each row.

    Args:
        tokens: [n, h], any float.
        token_of_row: [t], int64, on the same device.
    Returns:
        [t, h], dtype of tokens.
    """
    return _TakeRows.apply(tokens, token_of_row)


def add_rows(rows: torch.Tensor, token_of_row: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Unpermute: sum the rows of each token, 0 for a token without rows.

    Args:
        rows: [t, h], any float.
        token_of_row: [t], int64, on the same device.
        num_tokens: n.
    Returns:
        [n, h], dtype of rows, added up in fp32 at least.
    """
    return _AddRows.apply(rows, token_of_row, num_tokens)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, token_of_row):
        ctx.num_tokens = tokens.shape[0]
        ctx.save_for_backward(token_of_row)
        return tokens.index_select(0, token_of_row)

    @staticmethod
    def backward(ctx, drows):
        (token_of_row,) = ctx.saved_tensors
        return _sum_by_token(drows, token_of_row, ctx.num_tokens), None


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, token_of_row, num_tokens):
        ctx.save_for_backward(token_of_row)
        return _sum_by_token(rows, token_of_row, num_tokens)

    @staticmethod
    def backward(ctx, dtokens):
        (token_of_row,) = ctx.saved_tensors
        return dtokens.index_select(0, token_of_row), None, None


def _sum_by_token(rows, token_of_row, num_tokens):
    if (kernels := UNPERMUTE.select(rows).module) is not None:
        return kernels.sum_by_token(rows.contiguous(), *rows_of_tokens(token_of_row, num_tokens))
    wide = torch.promote_types(rows.dtype, torch.float32)
    sums = rows.new_zeros(num_tokens, rows.shape[1], dtype=wide)
    return sums.index_add_(0, token_of_row, rows.to(wide)).to(rows.dtype)


def rows_of_tokens(
    token_of_row: torch.Tensor, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The map from tokens to rows, computed on the device.

    Returns:
        [t], int64: rows in the order of their tokens; [n + 1], int64: where those of each token
        begin.
    """
    tokens, rows = token_of_row.sort(stable=True)
    every = torch.arange(num_tokens + 1, device=tokens.device)
    return rows, torch.searchsorted(tokens, every)
