# Copyright (c) 2026, the megatron-core gptoss authors.

"""GPTModel with sink_attention against transformers: which layers use it, packed documents.

test_parity.py compares the rest, and runs on sink_attention as well.
"""

import pytest
import torch

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.sink_attention import megatron_module
from megatron.gpt_oss.checkpoint.load_hf import load_hf
from tests.harness.models import ODD, trained_tensors, write_hf

transformers = pytest.importorskip("transformers")


@pytest.fixture
def models(make_model, tmp_path):
    folder = write_hf(tmp_path / "hf", ODD, trained_tensors(ODD))
    reference = transformers.GptOssForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    model = make_model(ODD, seq_length=97)
    load_hf([model], folder)
    return model.eval(), reference.eval()


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of every call of sink_attention."""
    seen = []
    original = megatron_module.sink_attention

    def recorded(*tensors, **options):
        seen.append(options)
        return original(*tensors, **options)

    monkeypatch.setattr(megatron_module, "sink_attention", recorded)
    return seen


def error(value, expected):
    return ((value - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def test_every_layer_is_on_it(models, calls):
    """Windowed and full layers in turn, a micro batch of 2."""
    model, reference = models
    ids = torch.randint(ODD.vocab_size, (2, 60), generator=torch.Generator().manual_seed(0))
    logits = model(ids, torch.arange(60).expand(2, -1), None)
    window = (ODD.sliding_window - 1, 0)
    assert [call["window_size"] for call in calls] == [window, None, window]
    assert error(logits, reference(ids).logits) < 1e-5


def test_packed_documents(models, calls):
    """Each document as if it were alone: rotation, window and mask restart; gradients too."""
    model, reference = models
    bounds = [0, 40, 41, 97]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=56,
        max_seqlen_kv=56,
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(ODD.vocab_size, (1, 97), generator=generator)
    positions = torch.cat([torch.arange(b - a) for a, b in zip(bounds, bounds[1:])])[None]
    logits = model(ids, positions, None, packed_seq_params=params)
    expected = [reference(ids[:, a:b]).logits for a, b in zip(bounds, bounds[1:])]
    expected = torch.cat(expected, dim=1)
    assert len(calls) == 3 and all(call["cu_seqlens"] is cu_seqlens for call in calls)
    assert error(logits, expected) < 1e-5
    weights = torch.randn(expected.shape, generator=generator)
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    for layer, theirs in zip(model.decoder.layers, reference.model.layers):
        sinks = layer.self_attention.core_attention.softmax_offset.grad
        assert error(sinks, theirs.self_attn.sinks.grad) < 1e-4
