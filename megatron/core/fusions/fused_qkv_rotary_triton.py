# Copyright (c) 2026, the megatron-core gptoss authors.

"""The Triton kernel of `fused_qkv_rotary`: splits and rotates, or rotates back and concatenates.

A program loads cosines and sines of some tokens once, and processes all heads of one group. The
gradient of a rotation is the rotation by the negative angle, so the backward is the same kernel
with source and target exchanged. Shapes as in `fused_qkv_rotary`.
"""

import triton
import triton.language as tl

# Tokens of a program: 8 bf16 per thread for heads of 64, in loads of 16 bytes.
BLOCK_TOKENS = 32


def split_and_rotate(qkv, cos, sin, num_queries):
    """See `fused_qkv_rotary.split_and_rotate`; cos and sin are [s, hn / 2] fp32, mscale in them."""
    qkv = _dense_heads(qkv)
    tokens, batch, groups, width = qkv.shape
    head_dim = width // (num_queries + 2)
    query = qkv.new_empty(tokens, batch, groups * num_queries, head_dim)
    key, value = (qkv.new_empty(tokens, batch, groups, head_dim) for _ in range(2))
    _launch(qkv, query, key, value, cos, sin, num_queries, backward=False)
    return query, key, value


def rotate_back_and_join(dquery, dkey, dvalue, cos, sin, num_queries):
    """The gradient of qkv, contiguous, from those of query, key and value in any strides."""
    dquery, dkey, dvalue = (_dense_heads(grad) for grad in (dquery, dkey, dvalue))
    tokens, batch, groups, head_dim = dkey.shape
    dqkv = dkey.new_empty(tokens, batch, groups, (num_queries + 2) * head_dim)
    _launch(dqkv, dquery, dkey, dvalue, cos, sin, num_queries, backward=True)
    return dqkv


def _dense_heads(tensor):
    """The kernel takes any strides, except that the last is 1."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _launch(qkv, query, key, value, cos, sin, num_queries, backward):
    tokens, batch, groups, head_dim = key.shape
    if not qkv.numel():
        return
    _split_and_rotate[(triton.cdiv(tokens * batch, BLOCK_TOKENS), groups)](
        qkv,
        query,
        key,
        value,
        cos,
        sin,
        tokens * batch,
        batch,
        head_dim // 2,
        *(stride for tensor in (qkv, query, key, value) for stride in tensor.stride()[:3]),
        QUERIES=num_queries,
        BACKWARD=backward,
        TOKENS=BLOCK_TOKENS,
        HALF=triton.next_power_of_2(head_dim // 2),
    )


@triton.jit
def _move(joined, apart, cos, sin, half, mask, ROTATE: tl.constexpr, BACKWARD: tl.constexpr):
    """Copy one head of each token from qkv to query, key or value, or back."""
    source = apart if BACKWARD else joined
    target = joined if BACKWARD else apart
    first = tl.load(source, mask=mask, other=0.0)
    second = tl.load(source + half, mask=mask, other=0.0)
    if ROTATE:
        a = first.to(tl.float32)
        b = second.to(tl.float32)
        first = a * cos - b * sin
        second = b * cos + a * sin
    tl.store(target, first, mask=mask)
    tl.store(target + half, second, mask=mask)


@triton.jit
def _split_and_rotate(
    qkv,
    query,
    key,
    value,
    cos,
    sin,
    num_rows,
    batch,
    half,
    qkv_token,
    qkv_batch,
    qkv_group,
    query_token,
    query_batch,
    query_head,
    key_token,
    key_batch,
    key_head,
    value_token,
    value_batch,
    value_head,
    QUERIES: tl.constexpr,
    BACKWARD: tl.constexpr,
    TOKENS: tl.constexpr,
    HALF: tl.constexpr,
):
    row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    group = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, HALF)
    mask = (row < num_rows)[:, None] & (column < half)[None, :]
    # int64: 131,072 tokens x 5,120 columns x batch 4 pass 2^31.
    token = (row // batch).to(tl.int64)[:, None]
    place = (row % batch).to(tl.int64)[:, None]
    column = column[None, :]
    c = tl.load(cos + token * half + column, mask=mask, other=0.0)
    s = tl.load(sin + token * half + column, mask=mask, other=0.0)
    if BACKWARD:
        s = -s
    joined = qkv + token * qkv_token + place * qkv_batch + group * qkv_group + column
    apart = query + token * query_token + place * query_batch
    apart += group * QUERIES * query_head + column
    for _ in range(QUERIES):
        _move(joined, apart, c, s, half, mask, True, BACKWARD)
        joined += 2 * half
        apart += query_head
    apart = key + token * key_token + place * key_batch + group * key_head + column
    _move(joined, apart, c, s, half, mask, True, BACKWARD)
    joined += 2 * half
    apart = value + token * value_token + place * value_batch + group * value_head + column
    _move(joined, apart, c, s, half, mask, False, BACKWARD)
