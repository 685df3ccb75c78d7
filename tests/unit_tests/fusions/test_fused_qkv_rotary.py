# Copyright (c) 2026, the megatron-core gptoss authors.

"""The reference of the fused rotation, and its compiled version."""

from pathlib import Path

import pytest
import torch

from megatron.core.fusions import fused_qkv_rotary as fused
from tests.harness.triton_interpreter import run_in_interpreter

MSCALE = 1.3465735902799727  # gpt-oss: 0.1 ln(32) + 1
# tokens, batch, groups, queries of a group, head dim
SHAPES = {
    "odd": (97, 1, 2, 4, 16),
    "batch-2": (33, 2, 3, 2, 8),
    "past-4096": (4099, 1, 1, 2, 8),
    "one-token": (1, 2, 2, 1, 6),
}


def make(shape, dtype=torch.float64, device="cpu", start=0):
    """qkv, angles of each token, gradients of query, key and value."""
    tokens, batch, groups, queries, head_dim = shape
    torch.manual_seed(0)
    inv_freq = 150000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    freqs = torch.outer(start + torch.arange(tokens, dtype=torch.float32), inv_freq)
    freqs = torch.cat((freqs, freqs), dim=-1)[:, None, None, :].to(device)
    qkv = torch.randn(tokens, batch, groups, (queries + 2) * head_dim).to(device, dtype)
    grads = [
        torch.randn(tokens, batch, heads, head_dim).to(device, dtype)
        for heads in (groups * queries, groups, groups)
    ]
    return qkv.requires_grad_(), freqs, grads


def complex_rotation(qkv, freqs, queries):
    """Each pair of a query or key as a complex number, times mscale * exp(i angle)."""
    heads = qkv.unflatten(3, (queries + 2, -1))
    first, second = heads.chunk(2, dim=-1)
    angle = freqs[..., None, : first.size(-1)].double()
    turned = torch.complex(first, second) * torch.polar(torch.full_like(angle, MSCALE), angle)
    turned = torch.cat((turned.real, turned.imag), dim=-1)
    return (
        torch.cat([turned[:, :, group, :queries] for group in range(qkv.size(2))], dim=2),
        turned[:, :, :, queries],
        heads[:, :, :, queries + 1],
    )


def with_gradient(outputs, qkv, grads):
    return dict(
        zip(
            ("query", "key", "value", "dqkv"), (*outputs, *torch.autograd.grad(outputs, qkv, grads))
        )
    )


def assert_close(found, expected, atol):
    for name, value in found.items():
        torch.testing.assert_close(
            value.double(),
            expected[name],
            rtol=0,
            atol=atol * expected[name].abs().max().item(),
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_reference(shape):
    """Values and gradient in float64."""
    qkv, freqs, grads = make(shape)
    queries = shape[3]
    found = with_gradient(fused.split_and_rotate_ref(qkv, freqs, queries, MSCALE), qkv, grads)
    expected = with_gradient(complex_rotation(qkv, freqs, queries), qkv, grads)
    assert_close(found, expected, 1e-14)


def test_reference_of_packed_rows():
    """Angles [t, 1, hn], a row for each token: documents of 5, 1 and 7 tokens."""
    places = torch.cat([torch.arange(n) for n in (5, 1, 7)])
    qkv, freqs, grads = make((13, 1, 2, 2, 8))
    rows = freqs[places]
    found = with_gradient(fused.split_and_rotate_ref(qkv, rows[:, 0], 2, MSCALE), qkv, grads)
    expected = with_gradient(complex_rotation(qkv, rows, 2), qkv, grads)
    assert_close(found, expected, 1e-14)


def test_bf16_is_rounded_once():
    """Half a unit in the last place at most: bf16 keeps 8 bits."""
    qkv, freqs, grads = make(SHAPES["odd"], torch.bfloat16)
    found = with_gradient(fused.split_and_rotate_ref(qkv, freqs, 4, MSCALE), qkv, grads)
    wide = qkv.detach().double().requires_grad_()
    expected = complex_rotation(wide, freqs, 4)
    expected = with_gradient(expected, wide, [grad.double() for grad in grads])
    for name, value in found.items():
        assert value.dtype == torch.bfloat16
        error = (value.double() - expected[name]).abs()
        assert (error <= expected[name].abs() * 2**-8 + 1e-6).all(), name


def test_compiled_once_for_every_length():
    """Two lengths, two batch sizes: no graph of its own for a length, values of the reference."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    fused.compiled.cache_clear()
    for tokens in (33, 47, 96):
        qkv, freqs, grads = make((tokens, 1, 2, 4, 16))
        rotate = fused.compiled(4, MSCALE, count)
        torch._dynamo.maybe_mark_dynamic(qkv, 0)
        torch._dynamo.maybe_mark_dynamic(freqs, 0)
        found = with_gradient(rotate(qkv, freqs), qkv, grads)
        expected = with_gradient(complex_rotation(qkv, freqs, 4), qkv, grads)
        assert_close(found, expected, 1e-14)
    assert len(graphs) == 1


def test_public_function_compiles(monkeypatch):
    """The public function marks the length as one that changes."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = fused.compiled.__wrapped__
    rotate = compiled(2, MSCALE, count)
    monkeypatch.setattr(fused, "compiled", lambda *constants: rotate)
    torch._dynamo.reset()
    for tokens in (20, 31):
        qkv, freqs, _ = make((tokens, 2, 2, 2, 8))
        for found, expected in zip(
            fused.split_and_rotate(qkv, freqs, 2, MSCALE, "compiled"),
            complex_rotation(qkv, freqs, 2),
            strict=True,
        ):
            torch.testing.assert_close(found, expected)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    "freqs", [(8, 1, 1, 8), (9, 1, 1, 4), (9, 2, 1, 8)], ids=["tokens", "part-of-head", "batch"]
)
def test_wrong_angles_are_refused(freqs):
    """Angles of other tokens, of a part of each head, or of each sequence of a batch."""
    qkv = torch.zeros(9, 2, 2, 32)
    with pytest.raises(ValueError, match=r"no angles of 9 tokens with heads of 8"):
        fused.split_and_rotate(qkv, torch.zeros(freqs), 2, 1.0, "compiled")


def test_cpu_takes_upstreams_path():
    """Whichever implementation is preferred."""
    for implementation in ("triton", "compiled", "eager"):
        with fused.QKV_ROTARY.prefer(implementation):
            assert fused.fused_implementation(torch.zeros(2, dtype=torch.bfloat16)) is None


def test_can_compile(monkeypatch):
    """Not without a compiler, nor where it was switched off."""
    monkeypatch.setattr(fused.shutil, "which", lambda name: name if name == "g++" else None)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    # Not by monkeypatch: it would take the entry away where it puts the old value back.
    with torch._dynamo.config.patch(disable=True):
        assert not fused.can_compile()
    with torch._dynamo.config.patch(disable=False):
        assert fused.can_compile()
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
        assert not fused.can_compile()
        monkeypatch.delenv("TORCHDYNAMO_DISABLE")
        monkeypatch.setattr(fused.shutil, "which", lambda name: None)
        assert not fused.can_compile()


def test_triton_kernel_in_interpreter():
    run_in_interpreter(Path(__file__).with_name("test_fused_qkv_rotary_triton.py"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("implementation", ["triton", "compiled"])
def test_cuda(implementation):
    """gpt-oss' heads in bf16, at two lengths, where angles are large: rounded once."""
    for tokens in (4099, 2048):
        qkv, freqs, grads = make((tokens, 1, 8, 8, 64), torch.bfloat16, "cuda", start=126_000)
        found = fused.split_and_rotate(qkv, freqs, 8, MSCALE, implementation)
        found = with_gradient(found, qkv, grads)
        wide = qkv.detach().double().requires_grad_()
        expected = complex_rotation(wide, freqs, 8)
        expected = with_gradient(expected, wide, [grad.double() for grad in grads])
        for name, value in found.items():
            error = (value.double() - expected[name]).abs()
            assert (error <= expected[name].abs() * 2**-8 + 2e-6).all(), name
