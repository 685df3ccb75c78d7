# Copyright (c) 2026, the megatron-core gptoss authors.

"""FlexAttention: compiled by Inductor for each kind of call, in fp32 as well.

Its backward does not accept another lse, but its lse is differentiable: the sinks are applied with
differentiable operations on (out, lse), which gives the same gradients.
"""

from functools import lru_cache

import torch
from torch import Tensor

from megatron.core.kernel_selection import import_problem
from megatron.core.transformer.sink_attention.attention_params import AttentionParams
from megatron.core.transformer.sink_attention.backends.base import Backend
from megatron.core.transformer.sink_attention.backends.math import key_ranges
from megatron.core.transformer.sink_attention.rescale import apply_sink

_BLOCK = 128


class FlexBackend(Backend):
    """torch.nn.attention.flex_attention."""

    name = "flex"
    kernel = "FlexAttention, compiled by Inductor"
    hint = "Install triton; the first call of a shape compiles for up to a minute."
    differentiable = True

    def unsupported_reason(self, params: AttentionParams) -> str | None:
        if params.device.type != "cuda":
            return f"is used on CUDA devices, the tensors are on {params.device.type}"
        if params.dtype == torch.float64:
            return "computes in bf16, fp16 and fp32, the tensors are float64"
        if not 16 <= params.head_dim <= 256:
            return f"needs a head dim from 16 to 256, not {params.head_dim}"
        if import_problem("triton") is not None:
            return "needs triton, which is not installed"
        return None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, params: AttentionParams
    ) -> Tensor:
        """Attention with the sink, differentiable."""
        return _attend(q, k, v, sinks, params, _flex())

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams
    ) -> tuple[Tensor, Tensor]:
        return _out_and_lse(q, k, v, params, _flex())

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dout: Tensor,
        params: AttentionParams,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """For a chunk of context parallel attention; recomputes the forward.

        out and lse are merged over chunks. This chunk contributes out_i with the weight
        w = exp(lse_i - lse), which gives the exact gradients of out_i and lse_i.
        """
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            out_i, lse_i = _out_and_lse(*inputs, params, _flex())
        weight = torch.exp(lse_i.detach() - lse.masked_fill(lse == -torch.inf, torch.inf))
        rows = weight.transpose(-1, -2)
        dout_i = (rows.unsqueeze(-1) * dout).to(out_i.dtype)
        dlse_i = rows * (dout.to(lse.dtype) * (out_i.detach().to(lse.dtype) - out)).sum(-1)
        return torch.autograd.grad((out_i, lse_i), inputs, (dout_i, dlse_i.transpose(-1, -2)))


def _attend(q, k, v, sinks, params, flex):
    out, lse = _out_and_lse(q, k, v, params, flex)
    return out if sinks is None else apply_sink(out, lse, sinks)[0]


def _out_and_lse(q, k, v, params, flex):
    packed = q.dim() == 3
    q, k, v = ((x.unsqueeze(0) if packed else x).transpose(1, 2) for x in (q, k, v))
    from torch.nn.attention.flex_attention import AuxRequest

    no_mask = not params.causal and not params.packed
    mask = None if no_mask else block_mask(params)
    out, aux = flex(
        q,
        k,
        v,
        block_mask=mask,
        scale=params.softmax_scale,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    out = out.transpose(1, 2)
    return (out[0], aux.lse[0]) if packed else (out, aux.lse)


def _flex():
    if torch.compiler.is_compiling():  # the outer compilation includes it
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention
    return _compiled()


@lru_cache(maxsize=None)
def _compiled():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def block_mask(params: AttentionParams):
    """The BlockMask, computed from ranges of keys: no s x s mask, no wait for the device."""
    if not params.packed:
        make = _dense_block_mask
        if torch.compiler.is_compiling():
            make = make.__wrapped__  # a traced tensor must not stay in the cache
        return make(params)
    lower, upper = key_ranges(params)

    def visible(batch, head, row, key):
        return (key >= lower[row]) & (key < upper[row])

    return _from_ranges(lower, upper, params, visible)


@lru_cache(maxsize=32)
def _dense_block_mask(params: AttentionParams):
    offset, left = params.num_tokens_k - params.num_tokens_q, params.window_size[0]

    def causal(batch, head, row, key):
        return key <= row + offset

    def windowed(batch, head, row, key):
        return (key <= row + offset) & (key >= row + offset - left)

    return _from_ranges(*key_ranges(params), params, windowed if params.has_window else causal)


def _from_ranges(lower, upper, params, visible):
    from torch.nn.attention.flex_attention import BlockMask

    device, num_q, num_k = lower.device, params.num_tokens_q, params.num_tokens_k
    starts = torch.arange(0, num_q, _BLOCK, device=device)
    last = (starts + _BLOCK - 1).clamp(max=num_q - 1)
    keys = torch.arange(0, num_k, _BLOCK, device=device)
    # The bounds never decrease, so the first and last row of a block decide.
    seen = (keys + _BLOCK > lower[starts, None]) & (keys < upper[last, None])
    full = (keys >= lower[last, None]) & (keys + _BLOCK <= upper[starts, None])
    return BlockMask.from_kv_blocks(
        *_ordered(seen & ~full),
        *_ordered(full),
        BLOCK_SIZE=_BLOCK,
        mask_mod=visible,
        seq_lengths=(num_q, num_k),
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Per row of blocks: how many are set, and the indices with those first."""
    count = blocks.sum(-1, dtype=torch.int32)
    indices = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True).int()
    return count[None, None], indices[None, None].contiguous()
