# Copyright (c) 2026, the megatron-core gptoss authors.

"""From the output of linear_qkv to rotated queries and keys, in one pass over it.

Upstream's layer splits [s, b, ng, (np/ng + 2) * hn], copies the queries, negates and joins halves,
multiplies twice and adds, each in the tensor's own dtype and each a pass over memory. Here it is one
read and one write, forward and backward; what is between is fp32 and rounded once. The values are
copied as well: a view of them would keep all of linear_qkv's output until the backward.

Shapes: s tokens, b micro batch, ng key groups of this rank, np query heads of this rank, hn head
dim, np/ng = `num_queries`.
"""

import functools
import os
import shutil
from typing import Callable

import torch
from torch import Tensor

from megatron.core.triton_kernels import triton_module

# How it runs on CUDA: 'triton', 'compiled' (torch.compile of the reference) or 'eager' (upstream's
# functions, one after the other). benchmarks/elementwise.py compares them.
IMPLEMENTATION = 'triton'
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_triton_module = functools.partial(triton_module, 'megatron.core.fusions.fused_qkv_rotary_triton')


def fused_implementation(tensor: Tensor) -> str | None:
    """'triton' or 'compiled', if this device and dtype have it; None is upstream's path."""
    if not tensor.is_cuda or tensor.dtype not in _DTYPES:
        return None
    if IMPLEMENTATION == 'triton' and _triton_module() is not None:
        return 'triton'
    if IMPLEMENTATION == 'compiled' and can_compile():
        return 'compiled'
    return None


def split_and_rotate(
    qkv: Tensor, freqs: Tensor, num_queries: int, mscale: float, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Split linear_qkv's output by head and rotate queries and keys.

    Args:
        qkv: [s, b, ng, (num_queries + 2) * hn]; of each group its queries, its key, its value.
        freqs: the angles of the tokens, fp32, hn each of which the second half repeats the first:
            [s, 1, 1, hn], or [s, 1, hn] for packed tokens.
        num_queries: query heads of a group.
        mscale: YaRN's factor of cosine and sine.
        implementation: what `fused_implementation` says.
    Returns:
        query [s, b, np, hn], key [s, b, ng, hn], value [s, b, ng, hn], dtype of qkv, contiguous.
    Raises:
        ValueError: if there are not as many angles as tokens, or not one for each element.
    """
    head_dim = qkv.size(3) // (num_queries + 2)
    if freqs.numel() != qkv.size(0) * head_dim or freqs.size(0) != qkv.size(0):
        raise ValueError(
            f"freqs {list(freqs.shape)} are no angles of {qkv.size(0)} tokens with heads of "
            f"{head_dim}. Rotate a part of each head, or tokens of several batches, unfused."
        )
    if implementation == 'triton':
        return _SplitAndRotate.apply(qkv, freqs, num_queries, mscale)
    # Else the first sequence length would be compiled for itself, and the second once more.
    torch._dynamo.maybe_mark_dynamic(qkv, 0)
    torch._dynamo.maybe_mark_dynamic(freqs, 0)
    return compiled(num_queries, mscale)(qkv, freqs)


def split_and_rotate_ref(
    qkv: Tensor, freqs: Tensor, num_queries: int, mscale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """`split_and_rotate` in plain PyTorch: in fp32 (fp64 for fp64), rounded once.

    Source: transformers gpt_oss `apply_rotary_pos_emb`; that cosine and sine are not rounded to
    the dtype of qkv is the only difference.
    """
    tokens, batch, groups, width = qkv.shape
    head_dim = width // (num_queries + 2)
    heads = qkv.view(tokens, batch, groups, num_queries + 2, head_dim)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    angles = freqs.view(tokens, 1, 1, 1, head_dim)[..., : head_dim // 2].to(wide)
    cos, sin = angles.cos() * mscale, angles.sin() * mscale

    def rotate(x: Tensor) -> Tensor:
        first, second = x.to(wide).chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return turned.to(x.dtype).flatten(2, 3)

    query, key, value = heads.split((num_queries, 1, 1), dim=3)
    return rotate(query), rotate(key), value.flatten(2, 3).clone()


@functools.cache
def compiled(num_queries: int, mscale: float, backend: str = 'inductor') -> Callable:
    """torch.compile of the reference, as a function of (qkv, freqs)."""

    def rotate(qkv: Tensor, freqs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return split_and_rotate_ref(qkv, freqs, num_queries, mscale)

    return torch.compile(rotate, fullgraph=True, backend=backend)


def can_compile() -> bool:
    """Whether torch.compile makes a kernel: not switched off, and a C++ compiler to be found."""
    # The former is TORCH_COMPILE_DISABLE, read at import; the latter torch.compile reads itself.
    if torch._dynamo.config.disable or os.environ.get('TORCHDYNAMO_DISABLE') == '1':
        return False
    names = (os.environ.get('CXX'), 'c++', 'g++', 'clang++')
    return any(name and shutil.which(name) for name in names)


class _SplitAndRotate(torch.autograd.Function):
    """The Triton kernel. Angles are kept for the backward, which every layer shares; no copy."""

    @staticmethod
    def forward(ctx, qkv, freqs, num_queries, mscale):
        # A table made by a generation is kept for training, whose backward may not save it.
        ctx.save_for_backward(freqs.clone() if freqs.is_inference() else freqs)
        ctx.constants = num_queries, mscale
        return _triton_module().split_and_rotate(qkv, *_tables(freqs, mscale), num_queries)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dquery, dkey, dvalue):
        (freqs,) = ctx.saved_tensors
        num_queries, mscale = ctx.constants
        grads = dquery, dkey, dvalue
        dqkv = _triton_module().rotate_back_and_join(*grads, *_tables(freqs, mscale), num_queries)
        return dqkv, None, None, None


def _tables(freqs: Tensor, mscale: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine [s, hn / 2] fp32. PyTorch's: Triton's lose digits at large angles."""
    angles = freqs.flatten(1).float()
    angles = angles[:, : angles.size(1) // 2]
    return angles.cos().mul_(mscale), angles.sin().mul_(mscale)
