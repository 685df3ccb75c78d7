# Copyright (c) 2026, the megatron-core gptoss authors.

"""Count bytes of live tensors on the CPU, as the allocator of a GPU would."""

import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# GEMMs take most of the time in bf16 on a CPU; their values are not used.
_PRODUCTS = {
    torch.ops.aten.mm.default: lambda a, b: a.new_zeros(a.shape[0], b.shape[1]),
    torch.ops.aten.mm.out: lambda a, b, out: out.zero_(),
    torch.ops.aten.bmm.default: lambda a, b: a.new_zeros(*a.shape[:2], b.shape[2]),
}


class LiveMemory(TorchDispatchMode):
    """Counts each storage from its first operation until it is freed; `peak` is the maximum so far.

    Args:
        known: tensors that are there already and do not count.
    """

    def __init__(self, known=()):
        super().__init__()
        self.now = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = _PRODUCTS.get(operation, operation)(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage):
        place, size = storage._cdata, storage.nbytes()
        if place in self._seen or size == 0:
            return
        self._seen.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, place, size)

    def _gone(self, place, size):
        self._seen.discard(place)
        self.now -= size


class _Norm(torch.autograd.Function):
    """Saves the tensors that CUDA's fused RMSNorm saves; its values are not used."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_ones(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.ones_like(x)

    @staticmethod
    def backward(ctx, dout):
        x, weight, _ = ctx.saved_tensors
        return torch.full_like(x, 1e-3), torch.zeros_like(weight)


@contextmanager
def balanced_routing():
    """Route the same number of tokens to every expert; Megatron's flag would draw at random."""
    from megatron.core.transformer.moe import router

    def balanced(logits):
        experts = torch.arange(logits.shape[-1])
        tokens = torch.arange(logits.numel() // len(experts)).view(*logits.shape[:-1], 1)
        return logits * 0 + (experts - 4 * tokens) % len(experts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(router, "apply_random_logits", balanced)
        yield


@contextmanager
def kernels_of_cuda():
    """Kernels that allocate as those of CUDA do, where the CPU's reference takes more."""
    from megatron.core.fusions import chunked_lm_loss, fused_qkv_rotary
    from megatron.core.transformer import fused_rotary_attention
    from megatron.core.transformer.moe.grouped_mlp import dispatch, permute

    activation_triton = pytest.importorskip(
        "megatron.core.transformer.moe.grouped_mlp.activation_triton", exc_type=ImportError
    )

    def partial_sums(rows, bias, block_rows):
        """fp32 sums of each tile's rows, as many tiles as the kernel's launch allows for."""
        num_tiles = len(rows) // block_rows + len(bias)
        return rows.new_empty(num_tiles, bias.shape[1], dtype=torch.float32)

    def swiglu_backward(dout, y, bias, probs, ends, constants):
        sums = partial_sums(y, bias, activation_triton.BLOCK_ROWS)
        gradients = torch.full_like(y, 1e-3), torch.zeros_like(bias), torch.zeros_like(probs)
        del sums
        return gradients

    def bias_gradients(dy, bias, scale, ends):
        sums = partial_sums(dy, bias, activation_triton.BIAS_BLOCK_ROWS)
        gradients = torch.zeros_like(bias), torch.zeros_like(scale)
        del sums
        return gradients

    def split(qkv, cos, sin, num_queries):
        heads = qkv.unflatten(3, (num_queries + 2, -1)).split((num_queries, 1, 1), dim=3)
        return tuple(x.flatten(2, 3).clone() for x in heads)

    def join(dquery, dkey, dvalue, cos, sin, num_queries):
        return dkey.new_zeros(*dkey.shape[:3], (num_queries + 2) * dkey.shape[3])

    def row_statistics(logits, labels):
        return tuple(logits.new_ones(len(logits), dtype=torch.float32) for _ in range(3))

    def sum_by_token(rows, token_of_row, num_tokens):
        order = permute.rows_of_tokens(token_of_row, num_tokens)
        sums = rows.new_zeros(num_tokens, rows.shape[1])
        del order
        return sums

    rotation = SimpleNamespace(split_and_rotate=split, rotate_back_and_join=join)
    loss = SimpleNamespace(row_statistics=row_statistics, to_gradient_=lambda *_: None)
    kernels = SimpleNamespace(
        swiglu_forward=lambda y, *_: y.new_ones(y.shape[0], y.shape[1] // 2),
        swiglu_backward=swiglu_backward,
        add_weighted_bias_=lambda *_: None,
        weighted_bias_gradients=bias_gradients,
    )
    with pytest.MonkeyPatch.context() as patch:
        elementwise = SimpleNamespace(module=kernels)
        patch.setattr(dispatch.ELEMENTWISE, "select", lambda tensor: elementwise)
        patch.setattr(fused_rotary_attention, "fused_implementation", lambda tensor: "triton")
        patch.setattr(fused_qkv_rotary, "_TRITON", SimpleNamespace(module=rotation))
        patch.setattr(permute, "_sum_by_token", sum_by_token)
        cross_entropy = SimpleNamespace(module=loss)
        patch.setattr(chunked_lm_loss.CROSS_ENTROPY, "select", lambda logits: cross_entropy)
        patch.setattr(chunked_lm_loss, "_add_product_", lambda *_: None)
        patch.setattr(
            torch.nn.functional, "rms_norm", lambda x, shape, weight, eps: _Norm.apply(x, weight)
        )
        yield
