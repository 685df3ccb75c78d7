# Copyright (c) 2026, the megatron-core gptoss authors.

"""sink_attention with autograd, autocast, checkpointing and torch.compile; the choice of "auto"."""

import json

import pytest
import torch

from megatron.core.transformer.sink_attention import measured_order, registry, sink_attention
from megatron.core.transformer.sink_attention.attention_params import SCHEMA, AttentionParams
from megatron.core.transformer.sink_attention.context_parallel.choose import COMM_TYPES
from tests.harness.attention_reference import SMALL, Example, gradients

EXAMPLE = Example(tokens=20, batch=2, heads=4, groups=2, dim=8, window=7)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    """Recomputed, the same bits."""
    q, k, v, sink, dout = EXAMPLE.tensors(torch.float32)

    def attention(*tensors):
        return sink_attention(*tensors, window_size=(6, 0))

    out = attention(q, k, v, sink)
    expected = [out, *gradients(out, (q, k, v, sink), dout)]
    out = torch.utils.checkpoint.checkpoint(attention, q, k, v, sink, use_reentrant=reentrant)
    out.backward(dout)
    for value, target in zip([out, q.grad, k.grad, v.grad, sink.grad], expected):
        assert torch.equal(value, target)


def test_autocast():
    """In autocast's dtype, as PyTorch's own attention; gradients in that of the inputs."""
    q, k, v, sink, dout = EXAMPLE.tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = sink_attention(q, k, v, sink, window_size=(6, 0))
    half = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    expected = sink_attention(*half, sink, window_size=(6, 0))
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    grads = gradients(out, (q, k, v, sink), dout.bfloat16())
    assert all(grad.dtype == torch.float32 for grad in grads)
    for value, target in zip(grads, gradients(expected, (*half, sink), dout.bfloat16())):
        assert torch.equal(value, target.float())


@pytest.mark.parametrize("name", ["T40-B2-fused-qkv", "packed-W8"])
def test_compile(name):
    """fullgraph: a graph break would raise."""
    example = SMALL[name]
    q, k, v, sink, dout = example.tensors(torch.float32)
    options = example.options()

    def layer(q, k, v, sink):
        return sink_attention(2 * q, k, v, sink, **options).sin()

    out = layer(q, k, v, sink)
    expected = [out, *gradients(out, (q, k, v, sink), dout)]
    out = torch.compile(layer, fullgraph=True, backend="aot_eager")(q, k, v, sink)
    for value, target in zip([out, *gradients(out, (q, k, v, sink), dout)], expected):
        assert torch.allclose(value, target, atol=1e-6)


def test_operators_keep_their_promises():
    """Schemas, fake tensors, strides and autograd registration, by PyTorch's own check."""
    from megatron.core.transformer.sink_attention.ops import backward_op, forward_op

    for example in (EXAMPLE, SMALL["packed-W8"], SMALL["T40-bf16-sinks"]):
        q, k, v, sink, dout = example.tensors(torch.float32)
        options = example.options()
        cu, length = options.get("cu_seqlens"), options.get("max_seqlen", q.shape[0])
        tail = AttentionParams.of(
            q,
            k,
            softmax_scale=0.3,
            window_size=options["window_size"],
            cu_seqlens_q=cu,
            cu_seqlens_k=cu,
            max_seqlen_q=length,
            max_seqlen_k=length,
            backend="math",
        ).flatten()
        assert len(tail) == len(SCHEMA)
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(forward_op, (q, k, v, sink, *tail), test_utils=tests)
        out, lse = (x.detach() for x in forward_op(q, k, v, sink, *tail))
        tensors = [x.detach() for x in (dout, q, k, v, sink)]
        arguments = (*tensors, out, lse, True, *tail)
        torch.library.opcheck(backward_op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_sink_without_gradient():
    """The zeros of the off-by-one softmax, and frozen sinks."""
    q, k, v, sink, dout = EXAMPLE.tensors(torch.float64)
    frozen = sink.detach()
    out = sink_attention(q, k, v, frozen)
    with_grad = sink_attention(q, k, v, sink)
    assert torch.equal(out, with_grad)
    for value, target in zip(
        torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(with_grad, (q, k, v), dout)
    ):
        assert torch.equal(value, target)


def test_saves_nothing_but_inputs_and_results():
    """q, k, v, sink, out and lse; no score, no mask."""
    q, k, v, sink, _ = EXAMPLE.tensors(torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        sink_attention(q, k, v, sink, window_size=(6, 0))
    expected = 2 * q.numel() + k.numel() + v.numel() + sink.numel() + q.numel() // q.shape[-1]
    assert sum(x.numel() for x in saved) == expected


def h100(**changes):
    properties = dict(device=torch.device("meta"), dtype=torch.bfloat16, head_dim=64)
    tokens = dict(num_tokens_q=8192, num_tokens_k=8192)
    return AttentionParams(**{**properties, **tokens, **changes})


def test_auto_follows_the_table(tmp_path, monkeypatch):
    """By GPU family, kind of call and length; backends that no row names follow."""
    table = {
        "sm90": {
            "causal": [
                {"min_seqlen": 0, "order": ["cudnn", "fa4"]},
                {"min_seqlen": 16384, "order": ["fa4_native", "gone"]},
            ],
            "packed_window": [{"min_seqlen": 0, "order": ["fa2"]}],
        }
    }
    (tmp_path / "table.json").write_text(json.dumps({"cards": table}))
    monkeypatch.setattr(measured_order, "PATH", tmp_path / "table.json")
    monkeypatch.setattr(AttentionParams, "capability", (9, 0))
    measured_order.load.cache_clear()
    try:
        assert measured_order.backend_order(h100())[:3] == ["cudnn", "fa4", "fa4_native"]
        assert measured_order.backend_order(h100(num_tokens_q=20000))[:2] == ["fa4_native", "fa4"]
        assert measured_order.backend_order(h100(packed=True, window_size=(127, 0)))[0] == "fa2"
        assert (
            measured_order.backend_order(h100(window_size=(127, 0)))[0] == measured_order.DEFAULT[0]
        )
        assert measured_order.backend_order(h100(dtype=torch.float32))[0] == "math"
        assert all(sorted(measured_order.backend_order(h100(dtype=d))) == sorted(registry.BACKENDS)
                   for d in (torch.bfloat16, torch.float32))  # fmt: skip
        measured_order.write(
            "sm100", {"causal": [{"min_seqlen": 0, "order": ["fa4"]}]}, {"torch": "x"}
        )
        assert measured_order.load()["cards"]["sm90"] == table["sm90"]
        assert measured_order.load()["cards"]["sm100"]["causal"][0]["order"] == ["fa4"]
    finally:
        measured_order.load.cache_clear()


def test_the_shipped_table():
    kinds = {"causal", "window", "packed_causal", "packed_window", "context_parallel"}
    for card in measured_order.load()["cards"].values():
        for kind, rows in card.items():
            assert kind in kinds
            known = registry.BACKENDS if kind != "context_parallel" else COMM_TYPES
            assert rows[0]["min_seqlen"] == 0
            assert all(name in known for row in rows for name in row["order"])


def test_select_backend(monkeypatch):
    """The first supported one; a named one that is not supported is rejected with its reason."""
    supported = {"cudnn", "math"}
    for name, backend in registry.BACKENDS.items():
        reason = None if name in supported else "it is broken"
        monkeypatch.setattr(backend, "unsupported_reason", lambda params, reason=reason: reason)
    monkeypatch.setattr(AttentionParams, "capability", (9, 0))
    registry._select.cache_clear()
    try:
        assert registry.select_backend(h100()).name == "cudnn"
        assert registry.select_backend(h100(backend="math")).name == "math"
        with pytest.raises(
            ValueError, match="'fa4' cannot run this call: it is broken. Supported here: cudnn"
        ):
            registry.select_backend(h100(backend="fa4"))
    finally:
        registry._select.cache_clear()
