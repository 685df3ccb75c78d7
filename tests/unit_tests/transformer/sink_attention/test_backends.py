# Copyright (c) 2026, the megatron-core gptoss authors.

"""Every backend against the definition.

On the CPU our calls of each kernel, with stubs in place of the kernels. On a GPU the kernels:
error at most 1.2 times that of the same kernel without a sink on the same data.
"""

import dataclasses
from functools import lru_cache

import pytest
import torch
import torch._dynamo

from megatron.core.transformer.sink_attention import available_backends, sink_attention
from megatron.core.transformer.sink_attention.attend import attend
from megatron.core.transformer.sink_attention.attention_params import AttentionParams
from megatron.core.transformer.sink_attention.backends import flex
from megatron.core.transformer.sink_attention.ops import forward_op
from megatron.core.transformer.sink_attention.registry import BACKENDS
from tests.harness.attention_reference import (
    LARGE,
    SMALL,
    attention_ref,
    gradients,
    window_size,
)
from tests.harness.compare import relative_error
from tests.harness.stub_kernels import stub

NAMES = ("out", "dq", "dk", "dv", "dsink")
KERNELS = [name for name in BACKENDS if name not in ("math", "flex")]
# Compiled for every shape or kind of mask, half a minute each: these examples only.
COMPILED = ("flex", "fa4_native")
FEW = (
    "T300-B2-H8_2-D64-W128",
    "T1001-H64_8-D64-bf16-sinks",
    "T513-D64-large-sinks",
    "packed-D64-W128",
    "packed-H64_8-D64-fused-qkv",
)
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def run_operator(name, q, k, v, sink, options):
    """sink_attention without the selection of the backend, which would reject the CPU."""
    params = params_of(q, k, options, backend=name)
    return forward_op(q, k, v, sink, *params.flatten())[0]


def params_of(q, k, options, **changes):
    """AttentionParams of the keyword arguments of sink_attention, on one rank."""
    cu, length = options.get("cu_seqlens"), options.get("max_seqlen")
    return AttentionParams.of(
        q,
        k,
        softmax_scale=options["softmax_scale"],
        window_size=options["window_size"],
        cu_seqlens_q=cu,
        cu_seqlens_k=cu,
        max_seqlen_q=length,
        max_seqlen_k=length,
        **changes,
    )


@pytest.mark.parametrize(
    "example",
    ["T7-B3", "T65-B2-W64-crossing", "T40-B2-fused-qkv", "T40-bf16-sinks", "packed-W8",
     "packed-one-token-documents", "packed-fused-qkv-W40"],
)  # fmt: skip
@pytest.mark.parametrize("name", KERNELS)
def test_our_side_of_the_call(name, example, monkeypatch):
    """Layouts, strides, scale, window, lse: in float32, where a mistake is not lost in rounding."""
    example = SMALL[example]
    if name == "cudnn":
        if example.cu:
            pytest.skip("cudnn does not support packed sequences")
        example = dataclasses.replace(example, window=None)
    q, k, v, sink, dout = example.tensors(torch.float32)
    with stub(name, monkeypatch):
        for used in (sink, None):
            inputs = (q, k, v) if used is None else (q, k, v, sink)
            out = run_operator(name, q, k, v, used, example.options())
            values = [out, *gradients(out, inputs, dout)]
            assert all(x.is_contiguous() for x in values[:4])
            expected = example.reference(q, k, v, used, dout)
            for label, value, target in zip(NAMES, values, expected):
                limit = 6e-3 if value.dtype == torch.bfloat16 else 1e-5
                scale = target if target.norm() > 1e-4 else dout
                assert relative_error(value, target, scale) < limit, label


@pytest.mark.parametrize("name", [n for n in KERNELS if n != "cudnn"])
def test_rows_without_a_key(name, monkeypatch):
    """FlashAttention 2 and 3 say lse = +inf for them, 4 says -inf."""
    cu_q, cu_k = (0, 4, 6, 11), (0, 9, 9, 11)
    generator = torch.Generator().manual_seed(1)
    shapes = [(11, 4, 8), (11, 2, 8), (11, 2, 8), (4,)]
    q, k, v, sink = (torch.randn(s, generator=generator).requires_grad_() for s in shapes)
    lengths = [torch.tensor(cu, dtype=torch.int32) for cu in (cu_q, cu_k)]
    with stub(name, monkeypatch):
        params = AttentionParams.of(
            q,
            k,
            softmax_scale=1.0,
            cu_seqlens_q=lengths[0],
            cu_seqlens_k=lengths[1],
            max_seqlen_q=5,
            max_seqlen_k=9,
            same_lengths=False,
            backend=name,
        )
        out = forward_op(q, k, v, sink, *params.flatten())[0]
        dout = torch.randn(out.shape, generator=generator)
        values = [out, *gradients(out, (q, k, v, sink), dout)]
    expected = attention_ref(q, k, v, sink, 1.0, None, cu_q, cu_k)
    for value, target in zip(values, [expected, *gradients(expected, (q, k, v, sink), dout)]):
        assert torch.allclose(value, target, atol=1e-5)


@pytest.mark.parametrize("example", SMALL)
def test_flex_on_the_cpu(example):
    """The mask by blocks and the sink, with FlexAttention not compiled: it has no backward here."""
    from torch.nn.attention.flex_attention import flex_attention

    example = SMALL[example]
    q, k, v, sink, dout = (x.detach() for x in example.tensors(torch.float32))
    params = params_of(q, k, example.options())
    first = [x.transpose(0, 1) if x.dim() == 4 else x for x in (q, k, v)]
    out = flex._attend(*first, sink, params, flex_attention)
    out = out.transpose(0, 1) if out.dim() == 4 else out
    expected = example.reference(q, k, v, sink, dout)[0]
    assert relative_error(out, expected) < (1e-3 if example.one_hot else 1e-5)


@pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 300])
@pytest.mark.parametrize("cu", [None, (0, 1, 2, 130, 500, 641)], ids=["dense", "packed"])
def test_block_mask(cu, window):
    """Blocks of the mask are exactly those in which something is seen, and the full ones full."""
    num = 641
    cu_tensor = None if cu is None else torch.tensor(cu, dtype=torch.int32)
    q = torch.empty(num, 1, 8) if cu else torch.empty(num, 1, 1, 8)
    options = dict(window_size=window_size(window), cu_seqlens=cu_tensor, softmax_scale=1.0)
    mask = flex.block_mask(params_of(q, q, options))
    row, key = torch.arange(768)[:, None], torch.arange(768)[None]
    seen = (key <= row) & (row < num) & (key < num)
    if window is not None:
        seen &= row - key < window
    if cu is not None:
        document = torch.bucketize(torch.arange(768), torch.tensor(cu[1:]), right=True)
        seen &= document[:, None] == document[None]
    blocks = seen.view(6, 128, 6, 128).permute(0, 2, 1, 3).flatten(2)
    full = blocks.all(-1)
    if num % 128:  # rows past the end do not matter
        full[-1] = seen[640, :].view(6, 128).all(-1)
    assert torch.equal(_as_dense(mask.kv_num_blocks, mask.kv_indices), blocks.any(-1) & ~full)
    assert torch.equal(_as_dense(mask.full_kv_num_blocks, mask.full_kv_indices), full)


def _as_dense(count, indices):
    dense = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for row, (n, columns) in enumerate(zip(count[0, 0].tolist(), indices[0, 0].tolist())):
        dense[row, columns[:n]] = True
    return dense


@pytest.mark.parametrize("name", BACKENDS)
def test_reasons(name):
    """Without a GPU every backend but math reports what is missing."""
    backend = BACKENDS[name]
    assert backend.name == name and backend.kernel
    params = AttentionParams(torch.device("cpu"), torch.bfloat16, 64, 8, 8)
    reason = backend.unsupported_reason(params)
    assert (reason is None) == (name == "math")


@pytest.mark.parametrize("example", ["T127-D64-W128", "packed-D64-W128", "T513-D64-W1"])
def test_cpu_error(example):
    """The error limit of the GPU tests, checked with plain PyTorch in bf16."""
    compare(LARGE[example], "math", torch.bfloat16)


def test_the_measure_notices(monkeypatch):
    """A backend that drops the sink in the backward only."""
    math = BACKENDS["math"]

    def forgetful(q, k, v, sink, out, lse, dout, params, need_dsinks):
        own_lse = math.forward(q, k, v, params)[1]
        dsink = None if sink is None else torch.zeros_like(sink)
        return (*math.backward(q, k, v, out, own_lse, dout, params), dsink)

    monkeypatch.setattr(math, "backward_with_sinks", forgetful)
    with pytest.raises(AssertionError, match="dq: .*dk: .*dv: .*dsink: "):
        compare(LARGE["T127-D64-W128"], "math", torch.bfloat16)


def require(name, example, dtype, deterministic=False):
    lead = (example.cu[-1],) if example.cu else (example.tokens, example.batch)
    reason = available_backends(
        (*lead, example.heads, example.dim),
        (*lead, example.groups, example.dim),
        dtype,
        "cuda",
        window_size=window_size(example.window),
        deterministic=deterministic,
    )[name]
    if reason is not None:
        pytest.skip(f"{name}: {reason}")


def with_gradients(example, name, sink, q, k, v, dout, **changes):
    options = {**example.options(DEVICE), "backend": name, **changes}
    out = sink_attention(q, k, v, sink, **options)
    inputs = (q, k, v) if sink is None else (q, k, v, sink)
    return [out.detach(), *gradients(out, inputs, dout)]


@lru_cache(maxsize=None)
def references(example_id, dtype):
    """References with and without the sink, for all backends."""
    example = next(x for x in LARGE.values() if id(x) == example_id)
    q, k, v, sink, dout = example.tensors(dtype, DEVICE)
    with_sink = example.reference(q, k, v, sink, dout, sink_terms=True)
    return with_sink, example.reference(q, k, v, None, dout)


def compare(example, name, dtype):
    """Check one case; the failure names the tensor, its error and the limit."""
    q, k, v, sink, dout = example.tensors(dtype, DEVICE)
    (*expected, (dsink, sink_terms)), plain_expected = references(id(example), dtype)
    *values, dsink_value = with_gradients(example, name, sink, q, k, v, dout)
    plain = with_gradients(example, name, None, q, k, v, dout)
    limits, found = {}, {}
    for label, value, target, base_value, base_target in zip(
        NAMES, values, expected, plain, plain_expected
    ):
        found[label] = relative_error(value, target)
        base = relative_error(base_value, base_target, target if example.one_hot else base_target)
        # One rounding of the exact result to the output's type. A kernel writes its output
        # rounded, and the sink rounds it once more: sqrt(3/2) = 1.22 of the kernel's own
        # roundings of P and out, where it has no sink of its own.
        once = relative_error(target.to(dtype), target)
        limits[label] = max(1.2 * base, 1.1 * (base**2 + once**2) ** 0.5)
        if example.one_hot and label in ("dq", "dk"):
            # Zero without a sink. With one, dP - delta is a small difference, and delta is made
            # of out in the output's type: inherent in every flash backward.
            limits[label] = max(limits[label], 12 * once)
        elif example.one_hot:
            limits[label] = max(limits[label], 2.2 * once)
    # Has no counterpart without a sink: its terms are as exact as the output, and a sum over few
    # heads scatters (fp16 on an H100: 1.52 times the larger of the two).
    scale = torch.maximum(dsink.norm(), sink_terms.norm())
    found["dsink"] = relative_error(dsink_value, dsink, scale)
    rounding = relative_error(dsink.to(sink.dtype), dsink, scale)
    limits["dsink"] = 2 * max(limits["out"], limits["dv"]) + rounding
    failures = [
        f"{label}: relative error {found[label]:.2e}, limit {limits[label]:.2e}"
        for label in NAMES
        if not found[label] <= limits[label]
    ]
    assert not failures, f"{name}: " + "; ".join(failures)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize(
    "name, example", [(n, e) for n in BACKENDS for e in LARGE if n not in COMPILED or e in FEW]
)
@torch._dynamo.config.patch(recompile_limit=64)  # flex, one for each shape
def test_gpu_error(name, example):
    require(name, LARGE[example], torch.bfloat16)
    compare(LARGE[example], name, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("example", ["T300-B2-H8_2-D64-W128", "packed-D64", "T1001-D64"])
@pytest.mark.parametrize("name", BACKENDS)
@torch._dynamo.config.patch(recompile_limit=64)
def test_gpu_other_types(name, example, dtype):
    if name in COMPILED and example != "packed-D64":
        pytest.skip("compiled for every shape: one is enough")
    require(name, LARGE[example], dtype)
    compare(LARGE[example], name, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("name", [n for n in BACKENDS if n not in ("cudnn", "flex")])
def test_gpu_rows_without_a_key(name):
    """Queries of other lengths than keys, for context parallelism."""
    heads, dim, dtype = 8, 64, torch.float32 if name == "math" else torch.bfloat16
    cu_q, cu_k = (0, 64, 66, 366, 370), (0, 200, 200, 500, 502)
    generator = torch.Generator().manual_seed(1)
    shapes = [(370, heads, dim), (502, 2, dim), (502, 2, dim)]
    tensors = [torch.randn(s, generator=generator).to("cuda", dtype) for s in shapes]
    sink = torch.linspace(-3, 8, heads, device="cuda")
    lengths = [torch.tensor(cu, dtype=torch.int32, device="cuda") for cu in (cu_q, cu_k)]
    params = AttentionParams.of(
        *tensors[:2],
        cu_seqlens_q=lengths[0],
        cu_seqlens_k=lengths[1],
        max_seqlen_q=300,
        max_seqlen_k=300,
        same_lengths=False,
        backend=name,
    )
    reason = BACKENDS[name].unsupported_reason(params)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    inputs = [x.requires_grad_() for x in (*tensors, sink)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    dout = torch.randn(shapes[0], generator=generator).to("cuda", dtype)
    for window in (None, 100):
        window_params = params.with_tensors(
            *tensors[:2], window_size=window_size(window) or (-1, 0)
        )
        out = attend(*inputs, window_params)
        expected = attention_ref(*exact, None, window, cu_q, cu_k)
        assert out[64:66].eq(0).all() and out[366:368].eq(0).all()
        values = [out, *gradients(out, inputs, dout)]
        targets = [expected, *gradients(expected, exact, dout.double())]
        for label, value, target in zip(NAMES, values, targets):
            assert relative_error(value, target) < (1e-5 if name == "math" else 5e-3), label


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("name", [n for n in BACKENDS if n not in ("cudnn", "flex", "fa4_native")])
def test_gpu_backward_needs_the_merged_lse(name):
    """The check that the test above would notice: a varlen backward with the kernel's own lse."""
    example = LARGE["packed-D64"]
    require(name, example, torch.bfloat16)
    q, k, v, sink, dout = (x.detach() for x in example.tensors(torch.bfloat16, "cuda"))
    params = params_of(q, k, example.options("cuda"))
    backend = BACKENDS[name]
    _, own_lse = backend.forward(q, k, v, params)
    out, lse = backend.forward_with_sinks(q, k, v, sink, params)
    expected = example.reference(q, k, v, sink, dout)[1:4]
    right = backend.backward(q, k, v, out, lse, dout, params)
    wrong = backend.backward(q, k, v, out, own_lse, dout, params)
    for good, bad, target in zip(right, wrong, expected):
        assert relative_error(good, target) < 5e-3 and relative_error(bad, target) > 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("example", ["T1001-H64_8-D64-bf16-sinks", "packed-H64_8-D64-fused-qkv"])
@pytest.mark.parametrize("name", BACKENDS)
def test_gpu_deterministic(name, example):
    """Five runs, the same bits; a backend that cannot says so, and which can."""
    example = LARGE[example]
    require(name, example, torch.bfloat16)
    q, k, v, sink, dout = example.tensors(torch.bfloat16, "cuda")
    if not BACKENDS[name].deterministic:
        with pytest.raises(ValueError, match="deterministic.*Supported here"):
            with_gradients(example, name, sink, q, k, v, dout, deterministic=True)
        return
    runs = [
        with_gradients(example, name, sink, q, k, v, dout, deterministic=True) for _ in range(5)
    ]
    for run in runs[1:]:
        for label, value, first in zip(NAMES, run, runs[0]):
            assert torch.equal(value, first), label


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("example", ["T512-B2-D32", "packed-D64-W128"])
@pytest.mark.parametrize("name", BACKENDS)
def test_gpu_graph(name, example):
    """A CUDA graph of forward and backward, replayed with other numbers: no host sync in it."""
    example = LARGE[example]
    require(name, example, torch.bfloat16)
    q, k, v, sink, dout = example.tensors(torch.bfloat16, "cuda")
    options = {**example.options("cuda"), "backend": name}  # a copy from CPU memory: not in a graph

    def attention():
        out = sink_attention(q, k, v, sink, **options)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v, sink), dout)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            attention()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        captured = attention()
    other = example.tensors(torch.bfloat16, "cuda", seed=7)
    with torch.no_grad():
        for target, source in zip((q, k, v, dout), (*other[:3], other[4])):
            target.copy_(source)
    graph.replay()
    torch.cuda.synchronize()
    for label, value, target in zip(NAMES, captured, attention()):
        assert relative_error(value, target.double()) < 5e-3, label


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("name", BACKENDS)
def test_gpu_no_sync(name):
    """PyTorch raises at any wait for the device."""
    example = LARGE["packed-D64"]
    require(name, example, torch.bfloat16)
    q, k, v, sink, dout = example.tensors(torch.bfloat16, "cuda")
    options = {**example.options("cuda"), "backend": name, "max_seqlen": None}
    out = sink_attention(q, k, v, sink, **options)  # compiling may wait
    torch.autograd.grad(out, (q, k, v, sink), dout)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = sink_attention(q, k, v, sink, **options)
        torch.autograd.grad(out, (q, k, v, sink), dout)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("name", BACKENDS)
def test_gpu_compile(name):
    """fullgraph=True: a graph break would raise. The same numbers as eager."""
    example = LARGE["packed-D64-W128" if name != "cudnn" else "T512-B2-D32"]
    require(name, example, torch.bfloat16)
    q, k, v, sink, dout = example.tensors(torch.bfloat16, "cuda")
    options = {**example.options("cuda"), "backend": name}

    @torch.compile(fullgraph=True)
    def layer(q, k, v, sink):
        return sink_attention(2 * q, k, v, sink, **options).sin()

    out = layer(q, k, v, sink)
    values = [out, *gradients(out, (q, k, v, sink), dout)]
    out = sink_attention(2 * q, k, v, sink, **options).sin()
    for label, value, target in zip(NAMES, values, [out, *gradients(out, (q, k, v, sink), dout)]):
        assert relative_error(value, target.double()) < 5e-3, label
