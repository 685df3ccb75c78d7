# Copyright (c) 2026, the megatron-core gptoss authors.

"""Split of linear_qkv's output and rotary embedding of queries and keys in one kernel.

Upstream's layer splits [s, b, ng, (np/ng + 2) * hn], copies the queries, negates and concatenates
halves, multiplies twice and adds, each a memory-bound kernel in the tensor's dtype. This kernel
reads and writes once, forward and backward, computes in fp32 and rounds once. It copies the values
as well: a view of them would keep the complete output of linear_qkv until the backward.

Shapes: s tokens, b micro batch, ng key groups of this rank, np query heads of this rank, hn head
dim, np/ng = `num_queries`.
"""

import functools
import os
import shutil
from typing import Callable

import torch
from torch import Tensor

from megatron.core.kernel_selection import KernelChoice, PyTorchOperations, TritonKernels


class _Compiled:
    """torch.compile of the reference."""

    name = "compiled"

    def unsupported_reason(self, tensor: Tensor) -> str | None:
        if not tensor.is_cuda or tensor.dtype not in TritonKernels.dtypes:
            return "needs CUDA tensors in bf16, fp16 or fp32"
        return None if can_compile() else "torch.compile is disabled or finds no C++ compiler"


_TRITON = TritonKernels("megatron.core.fusions.fused_qkv_rotary_triton")
# 'eager' is upstream's unfused path; benchmarks/kernels/elementwise.py compares them.
QKV_ROTARY = KernelChoice(
    "qkv_rotary",
    (_TRITON, _Compiled(), PyTorchOperations("eager")),
    order=lambda tensor: ("triton", "eager"),
)


def fused_implementation(tensor: Tensor) -> str | None:
    """'triton' or 'compiled', where the fusion runs for this device and dtype; else None."""
    name = QKV_ROTARY.select(tensor).name
    return None if name == "eager" else name


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
        implementation: result of `fused_implementation`.
    Returns:
        query [s, b, np, hn], key [s, b, ng, hn], value [s, b, ng, hn], dtype of qkv, contiguous.
    Raises:
        ValueError: freqs do not have one angle per token and element of a head.
    """
    head_dim = qkv.size(3) // (num_queries + 2)
    if freqs.numel() != qkv.size(0) * head_dim or freqs.size(0) != qkv.size(0):
        raise ValueError(
            f"freqs {list(freqs.shape)} are no angles of {qkv.size(0)} tokens with heads of "
            f"{head_dim}. Rotate a part of each head, or tokens of several batches, unfused."
        )
    if implementation == "triton":
        return _SplitAndRotate.apply(qkv, freqs, num_queries, mscale)
    # Without it the first and the second sequence length would be compiled separately.
    torch._dynamo.maybe_mark_dynamic(qkv, 0)
    torch._dynamo.maybe_mark_dynamic(freqs, 0)
    return compiled(num_queries, mscale)(qkv, freqs)


def split_and_rotate_ref(
    qkv: Tensor, freqs: Tensor, num_queries: int, mscale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """`split_and_rotate` in plain PyTorch: in fp32 (fp64 for fp64), rounded once.

    Source: transformers gpt_oss `apply_rotary_pos_emb`; the only difference is that cosine and
    sine are not rounded to the dtype of qkv.
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
def compiled(num_queries: int, mscale: float, backend: str = "inductor") -> Callable:
    """torch.compile of the reference, as a function of (qkv, freqs)."""

    def rotate(qkv: Tensor, freqs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return split_and_rotate_ref(qkv, freqs, num_queries, mscale)

    return torch.compile(rotate, fullgraph=True, backend=backend)


def can_compile() -> bool:
    """Whether torch.compile is enabled and finds a C++ compiler."""
    # config.disable is TORCH_COMPILE_DISABLE, read at import.
    if torch._dynamo.config.disable or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return False
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return any(name and shutil.which(name) for name in names)


class _SplitAndRotate(torch.autograd.Function):
    """The Triton kernel. Saves the angles for the backward, which all layers share."""

    @staticmethod
    def forward(ctx, qkv, freqs, num_queries, mscale):
        # The table may come from a generation, and autograd cannot save an inference tensor.
        ctx.save_for_backward(freqs.clone() if freqs.is_inference() else freqs)
        ctx.constants = num_queries, mscale
        return _TRITON.module.split_and_rotate(qkv, *_tables(freqs, mscale), num_queries)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dquery, dkey, dvalue):
        (freqs,) = ctx.saved_tensors
        num_queries, mscale = ctx.constants
        grads = dquery, dkey, dvalue
        dqkv = _TRITON.module.rotate_back_and_join(*grads, *_tables(freqs, mscale), num_queries)
        return dqkv, None, None, None


def _tables(freqs: Tensor, mscale: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine [s, hn / 2] fp32, by PyTorch: those of Triton are inexact at large angles."""
    angles = freqs.flatten(1).float()
    angles = angles[:, : angles.size(1) // 2]
    return angles.cos().mul_(mscale), angles.sin().mul_(mscale)
