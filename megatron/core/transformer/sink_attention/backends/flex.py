# Copyright (c) 2026, the megatron-core gptoss authors.

"""FlexAttention: compiled by Inductor for the case at hand, fp32 too.

Its backward takes no lse of ours, but its lse is differentiable: the sink is applied with ordinary
operations on (out, lse), which gives the same gradients.
"""

from functools import lru_cache

import torch
from torch import Tensor

from megatron.core.transformer.sink_attention.attention_params import Call, Case
from megatron.core.transformer.sink_attention.backends.base import Backend, import_problem
from megatron.core.transformer.sink_attention.backends.math import key_ranges
from megatron.core.transformer.sink_attention.rescale import apply_sink

_BLOCK = 128


class FlexBackend(Backend):
    """torch.nn.attention.flex_attention."""

    name = "flex"
    kernel = "FlexAttention, compiled by Inductor"
    remedy = "Install triton; the first call of a shape compiles for up to a minute."
    differentiable = True

    def why_not(self, case: Case) -> str | None:
        if case.device.type != "cuda":
            return f"is used on CUDA devices, the tensors are on {case.device.type}"
        if case.dtype == torch.float64:
            return "computes in bf16, fp16 and fp32, the tensors are float64"
        if not 16 <= case.head_dim <= 256:
            return f"needs a head dim from 16 to 256, not {case.head_dim}"
        if import_problem("triton") is not None:
            return "needs triton, which is not installed"
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, call: Call) -> Tensor:
        """Attention with the sink, differentiable."""
        return _attend(q, k, v, sink, call, _flex())

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        return _out_and_lse(q, k, v, call, _flex())

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        """For a piece of context parallel attention; runs the forward once more.

        out and lse are sums over pieces, and this one adds out_i with the weight
        w = exp(lse_i - lse): the gradients of its own out_i and lse_i follow, exactly.
        """
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            out_i, lse_i = _out_and_lse(*inputs, call, _flex())
        weight = torch.exp(lse_i.detach() - lse.masked_fill(lse == -torch.inf, torch.inf))
        rows = weight.transpose(-1, -2)
        dout_i = (rows.unsqueeze(-1) * dout).to(out_i.dtype)
        dlse_i = rows * (dout.to(lse.dtype) * (out_i.detach().to(lse.dtype) - out)).sum(-1)
        return torch.autograd.grad((out_i, lse_i), inputs, (dout_i, dlse_i.transpose(-1, -2)))


def _attend(q, k, v, sink, call, flex):
    out, lse = _out_and_lse(q, k, v, call, flex)
    return out if sink is None else apply_sink(out, lse, sink)[0]


def _out_and_lse(q, k, v, call, flex):
    packed = q.dim() == 3
    q, k, v = ((x.unsqueeze(0) if packed else x).transpose(1, 2) for x in (q, k, v))
    from torch.nn.attention.flex_attention import AuxRequest

    whole = not call.causal and not call.packed
    mask = None if whole else block_mask(q.shape[2], k.shape[2], call, q.device)
    wanted = AuxRequest(lse=True)
    out, aux = flex(q, k, v, block_mask=mask, scale=call.scale, enable_gqa=True, return_aux=wanted)
    out = out.transpose(1, 2)
    return (out[0], aux.lse[0]) if packed else (out, aux.lse)


def _flex():
    if torch.compiler.is_compiling():  # the compiler at work compiles it with everything else
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention
    return _compiled()


@lru_cache(maxsize=None)
def _compiled():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def block_mask(num_q: int, num_k: int, call: Call, device: torch.device):
    """The BlockMask, from the ranges of keys alone: no s x s mask, no value read on the host."""
    if not call.packed:
        make = _dense_block_mask
        if torch.compiler.is_compiling():
            make = make.__wrapped__  # a traced tensor must not stay in the cache
        return make(num_q, num_k, call.window, device)
    lower, upper = key_ranges(num_q, num_k, call, device)

    def visible(batch, head, row, key):
        return (key >= lower[row]) & (key < upper[row])

    return _from_ranges(lower, upper, num_q, num_k, visible)


@lru_cache(maxsize=32)
def _dense_block_mask(num_q, num_k, window, device):
    call = Call(1.0, window, None, None, num_q, num_k, False, num_q == num_k)
    offset = num_k - num_q

    def causal(batch, head, row, key):
        return key <= row + offset

    def windowed(batch, head, row, key):
        return (key <= row + offset) & (key > row + offset - window)

    ranges = key_ranges(num_q, num_k, call, device)
    return _from_ranges(*ranges, num_q, num_k, causal if window is None else windowed)


def _from_ranges(lower, upper, num_q, num_k, visible):
    from torch.nn.attention.flex_attention import BlockMask

    device = lower.device
    starts = torch.arange(0, num_q, _BLOCK, device=device)
    last = (starts + _BLOCK - 1).clamp(max=num_q - 1)
    keys = torch.arange(0, num_k, _BLOCK, device=device)
    # The bounds never decrease, so a block's outermost rows say all.
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
    """Per row of blocks: how many are set, and their indices first."""
    count = blocks.sum(-1, dtype=torch.int32)
    indices = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True).int()
    return count[None, None], indices[None, None].contiguous()
