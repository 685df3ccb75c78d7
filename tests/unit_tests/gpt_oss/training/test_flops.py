# Copyright (c) 2026, the megatron-core gptoss authors.

"""Model FLOPs against the multiply-adds that PyTorch counts in transformers' model, and peaks."""

from argparse import Namespace

import pytest
import torch

from megatron.gpt_oss.presets import get_preset, preset_flags
from megatron.gpt_oss.training.metrics.flops import model_flops, peak_of, visible_pairs


def arguments(name, seq_length):
    return Namespace(**{**preset_flags(get_preset(name)), "seq_length": seq_length})


def test_against_pytorchs_count(tmp_path):
    """Forward products of one token sequence, with the attention scores that a mask hides left out."""
    transformers = pytest.importorskip("transformers")
    from torch.utils.flop_counter import FlopCounterMode

    from tests.harness.models import TINY, trained_tensors, write_hf

    length = 300  # beyond the window of 128
    folder = write_hf(tmp_path / "hf", TINY, trained_tensors(TINY))
    model = transformers.GptOssForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, length, dtype=torch.long))
    pairs = sum(
        sum(
            min(query + 1, TINY.sliding_window if layer % 2 == 0 else length)
            for query in range(length)
        )
        for layer in range(TINY.num_layers)
    )
    heads = TINY.num_attention_heads * TINY.head_dim
    full = TINY.num_layers * length * length
    forward = counter.get_total_flops() - 4 * heads * (full - pairs)
    assert model_flops(arguments("tiny", length), length) == pytest.approx(3 * forward, rel=1e-9)


def test_documents():
    """A sequence of one document is the sequence; shorter documents see fewer keys."""
    args = arguments("tiny", 512)
    assert model_flops(args, 1024, 2 * 512**2) == model_flops(args, 1024)
    assert model_flops(args, 1024, 8 * 128**2) == pytest.approx(
        model_flops(arguments("tiny", 128), 1024)
    )
    assert visible_pairs(4) == 10 and visible_pairs(4, 2) == 1 + 2 + 2 + 2


@pytest.mark.parametrize("name, active", [("20b", 3.61e9), ("120b", 5.13e9)])
def test_six_flops_per_active_parameter(name, active):
    """Active parameters as in Table 1 of OpenAI's model card: output layer, not embedding."""
    assert model_flops(arguments(name, 1), 1.0) == pytest.approx(6 * active, rel=2e-3)


def test_peaks():
    assert peak_of("NVIDIA H100 80GB HBM3") == 989.5
    assert peak_of("NVIDIA H100 PCIe") == 756.5
    assert peak_of("NVIDIA GB200") == 2500.0
    assert peak_of("NVIDIA GeForce RTX 3090") is None
