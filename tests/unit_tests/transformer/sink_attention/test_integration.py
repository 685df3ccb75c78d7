# Copyright (c) 2026, the megatron-core gptoss authors.

"""sink_attention under PyTorch's machinery, and the choice of "auto"."""

import json

import pytest
import torch

from megatron.core.transformer.sink_attention import autotable, registry, sink_attention
from megatron.core.transformer.sink_attention.attention_params import Case
from tests.harness.attention_reference import SMALL, Example, gradients

EXAMPLE = Example(tokens=20, batch=2, heads=4, groups=2, dim=8, window=7)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    """Recomputed, the same bits."""
    q, k, v, sink, dout = EXAMPLE.tensors(torch.float32)

    def attention(*tensors):
        return sink_attention(*tensors, window=7)

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
        out = sink_attention(q, k, v, sink, window=7)
    half = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    expected = sink_attention(*half, sink, window=7)
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
        tail = (cu, cu, length, length, 0.3, example.window, True, False, "math")
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(forward_op, (q, k, v, sink, *tail), test_utils=tests)
        out, lse = (x.detach() for x in forward_op(q, k, v, sink, *tail))
        tensors = [x.detach() for x in (dout, q, k, v, sink)]
        arguments = (*tensors, out, lse, *tail, True)
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
        sink_attention(q, k, v, sink, window=7)
    expected = 2 * q.numel() + k.numel() + v.numel() + sink.numel() + q.numel() // q.shape[-1]
    assert sum(x.numel() for x in saved) == expected


def h100(**changes):
    facts = dict(
        device=torch.device("meta"), dtype=torch.bfloat16, batch=1, seqlen_q=8192, seqlen_k=8192,
        num_heads=64, num_kv_heads=8, head_dim=64,
    )  # fmt: skip
    return Case(**{**facts, **changes})


def test_auto_follows_the_table(tmp_path, monkeypatch):
    """By card, kind of mask and length; what the table leaves out comes after it."""
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
    monkeypatch.setattr(autotable, "PATH", tmp_path / "table.json")
    monkeypatch.setattr(Case, "capability", (9, 0))
    autotable.load.cache_clear()
    try:
        assert autotable.order(h100())[:3] == ["cudnn", "fa4", "fa4_native"]
        assert autotable.order(h100(seqlen_q=20000))[:2] == ["fa4_native", "fa4"]
        assert autotable.order(h100(packed=True, window=128))[0] == "fa2"
        assert autotable.order(h100(window=128))[0] == autotable.DEFAULT[0]
        assert autotable.order(h100(dtype=torch.float32))[0] == "math"
        assert all(sorted(autotable.order(h100(dtype=d))) == sorted(registry.BACKENDS)
                   for d in (torch.bfloat16, torch.float32))  # fmt: skip
        autotable.write("sm100", {"causal": [{"min_seqlen": 0, "order": ["fa4"]}]}, {"torch": "x"})
        assert autotable.load()["cards"]["sm90"] == table["sm90"]
        assert autotable.load()["cards"]["sm100"]["causal"][0]["order"] == ["fa4"]
    finally:
        autotable.load.cache_clear()


def test_the_shipped_table():
    for card in autotable.load()["cards"].values():
        for kind, rows in card.items():
            assert kind in ("causal", "window", "packed_causal", "packed_window")
            assert rows[0]["min_seqlen"] == 0
            assert all(name in registry.BACKENDS for row in rows for name in row["order"])


def test_choose(monkeypatch):
    """The first that is able; a named one that is not able is refused with its reason."""
    able = {"cudnn", "math"}
    for name, backend in registry.BACKENDS.items():
        reason = None if name in able else "it is broken"
        monkeypatch.setattr(backend, "why_not", lambda case, reason=reason: reason)
    monkeypatch.setattr(Case, "capability", (9, 0))
    registry.choose.cache_clear()
    try:
        assert registry.choose(h100()).name == "cudnn"
        assert registry.choose(h100(), "math").name == "math"
        with pytest.raises(
            ValueError, match="'fa4' cannot run this call: it is broken. Able here: cudnn"
        ):
            registry.choose(h100(), "fa4")
    finally:
        registry.choose.cache_clear()
