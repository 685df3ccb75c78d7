# Copyright (c) 2026, the megatron-core gptoss authors.

"""The Triton kernel of the rotation against its reference in float64.

On a CUDA device as it is; without one in Triton's interpreter, where TRITON_INTERPRET=1 is set
before the first import (test_fused_qkv_rotary.py starts such a run where triton is installed).
"""

import os

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

from megatron.core.fusions import fused_qkv_rotary as fused

# `make test-gpu` runs them; the run in the interpreter names this file.
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MSCALE = 1.3465735902799727  # gpt-oss: 0.1 ln(32) + 1
# tokens, batch, groups, queries of a group, head dim. Programs take 32 tokens.
SHAPES = {
    "one-token": (1, 1, 2, 4, 64),
    "odd": (97, 1, 2, 4, 64),
    "batch-2": (33, 2, 2, 8, 64),
    "batch-3-odd-heads": (21, 3, 1, 3, 16),
    "half-of-24": (40, 1, 2, 1, 48),
    "no-tokens": (0, 1, 2, 4, 64),
}
# fp32: angles up to 131072 are multiplied and added once; bf16, fp16 results are rounded once.
LIMITS = {torch.float32: 3e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}
if DEVICE == "cpu":
    LIMITS[torch.bfloat16] *= 2  # the interpreter cuts bf16 where a device rounds


def angles(tokens, head_dim, start=131_000):
    """[s, 1, 1, hn]; far from 0, where a kernel's own cosine would be off."""
    inv_freq = 150000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    freqs = torch.outer(start + torch.arange(tokens, dtype=torch.float32), inv_freq)
    return torch.cat((freqs, freqs), -1)[:, None, None, :].to(DEVICE)


def draw(*shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def run(rotate, qkv, grads):
    """query, key, value and the gradient of qkv."""
    qkv = qkv.detach().requires_grad_()
    outputs = rotate(qkv)
    (dqkv,) = torch.autograd.grad(outputs, qkv, [g.to(outputs[0].dtype) for g in grads])
    return dict(zip(("query", "key", "value", "dqkv"), (*outputs, dqkv)))


def check(found, expected, dtype):
    for name, value in found.items():
        assert value.shape == expected[name].shape and value.dtype == dtype, name
        if value.numel():
            # Of the largest element in the pair, which is what a rotation's terms are as large as.
            error = (value.double() - expected[name]).abs().max() / expected[name].abs().max()
            assert error <= LIMITS[dtype], f"{name}: {error:.1e} of the largest"


@pytest.mark.parametrize("dtype", LIMITS, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernel(shape, dtype):
    """Forward and gradient."""
    tokens, batch, groups, queries, head_dim = shape
    freqs = angles(tokens, head_dim)
    qkv = draw(tokens, batch, groups, (queries + 2) * head_dim, dtype=dtype, seed=0)
    grads = [
        draw(tokens, batch, heads, head_dim, dtype=dtype, seed=1 + i)
        for i, heads in enumerate((groups * queries, groups, groups))
    ]
    # fp64 arithmetic on the fp32 cosines that the tables hold.
    found = run(lambda x: fused.split_and_rotate(x, freqs, queries, MSCALE, "triton"), qkv, grads)
    expected = run(
        lambda x: fused.split_and_rotate_ref(x, freqs, queries, MSCALE), qkv.double(), grads
    )
    check(found, expected, dtype)
    assert all(value.is_contiguous() for value in found.values())


def test_strides():
    """qkv as a slice of something wider and batch first; gradients as attention kernels give them."""
    tokens, batch, groups, queries, head_dim = 35, 2, 2, 4, 16
    freqs = angles(tokens, head_dim)
    wide = draw(batch, tokens, groups + 1, (queries + 2) * head_dim, dtype=torch.float32, seed=0)
    qkv = wide.transpose(0, 1)[:, :, 1:]
    dquery = draw(batch, groups * queries, tokens, head_dim, dtype=torch.float32, seed=1)
    dkey = draw(tokens, batch, head_dim, groups, dtype=torch.float32, seed=2)
    dvalue = draw(1, 1, 1, 1, dtype=torch.float32, seed=3)
    grads = (
        dquery.permute(2, 0, 1, 3),
        dkey.transpose(2, 3),
        dvalue.expand(tokens, batch, groups, head_dim),
    )
    found = run(lambda x: fused.split_and_rotate(x, freqs, queries, MSCALE, "triton"), qkv, grads)
    expected = run(
        lambda x: fused.split_and_rotate_ref(x.contiguous(), freqs, queries, MSCALE),
        qkv.double(),
        grads,
    )
    check(found, expected, torch.float32)


def test_unused_output():
    """A key and value that nothing uses have gradients of zero."""
    qkv = draw(5, 1, 2, 6 * 16, dtype=torch.float32, seed=0).requires_grad_()
    query, _, _ = fused.split_and_rotate(qkv, angles(5, 16), 4, 1.0, "triton")
    query.sum().backward()
    by_head = qkv.grad.unflatten(3, (6, 16))
    assert (by_head[..., 4:, :] == 0).all() and (by_head[..., :4, :] != 0).any()


def test_angles_of_a_generation():
    """RotaryEmbedding keeps its table; one made in inference mode may not be saved as it is."""
    with torch.inference_mode():
        freqs = angles(5, 16)
    qkv = draw(5, 1, 2, 6 * 16, dtype=torch.float32, seed=0)
    grads = [torch.ones(5, 1, heads, 16, device=DEVICE) for heads in (8, 2, 2)]
    found, expected = (
        run(lambda x, f=f: fused.split_and_rotate(x, f, 4, 1.0, "triton"), qkv, grads)
        for f in (freqs, freqs.clone())
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_values_are_no_view():
    """A view would keep linear_qkv's output alive until the backward."""
    qkv = draw(5, 1, 2, 6 * 16, dtype=torch.float32, seed=0)
    for output in fused.split_and_rotate(qkv, angles(5, 16), 4, 1.0, "triton"):
        assert output.untyped_storage().data_ptr() != qkv.untyped_storage().data_ptr()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs 12 GB and a device")
def test_more_elements_than_int32():
    """131,072 tokens x 4 x 5,120 columns pass 2^31: the last tokens are right."""
    tokens, batch, tail = 131_072, 4, 65
    freqs = angles(tokens, 64, start=0)
    qkv = torch.zeros(tokens, batch, 8, 640, dtype=torch.bfloat16, device=DEVICE)
    qkv[-tail:] = draw(tail, batch, 8, 640, dtype=torch.bfloat16, seed=0)
    qkv.requires_grad_()
    outputs = fused.split_and_rotate(qkv, freqs, 8, MSCALE, "triton")
    grads = [torch.zeros_like(output) for output in outputs]
    for seed, grad in enumerate(grads):
        grad[-tail:] = draw(tail, *grad.shape[1:], dtype=torch.bfloat16, seed=1 + seed)
    (dqkv,) = torch.autograd.grad(outputs, qkv, grads)
    found = dict(zip(("query", "key", "value", "dqkv"), (x[-tail:] for x in (*outputs, dqkv))))
    expected = run(
        lambda x: fused.split_and_rotate_ref(x, freqs[-tail:], 8, MSCALE),
        qkv[-tail:].double(),
        [grad[-tail:] for grad in grads],
    )
    check(found, expected, torch.bfloat16)
