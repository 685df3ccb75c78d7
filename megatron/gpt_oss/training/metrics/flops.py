# Copyright (c) 2026, the megatron-core gptoss authors.
"""Model FLOPs of a step, and what a GPU could do in the time.

Counted are the products of the model itself, forward and backward (three times the forward), each
multiply-add as two: what a kernel computes twice, activation recomputation included, is not work of
the model. Upstream's count takes every layer's attention as full.
"""

from argparse import Namespace

import torch

from megatron.core import device_utils

# Peak of dense BF16 products, TFLOP/s, by what CUDA calls the card; the first name that fits. From
# NVIDIA's data sheets, which give the double where they assume 2:4 sparsity: A100 (2021), H100
# (2023: SXM 1979, NVL 1671, PCIe 1513), H200 (2024: SXM 1979, NVL 1671), L40S (733), DGX and
# GB200 NVL72 (2024: 4.5 and 5 PFLOP/s a GPU).
PEAK_BF16_TFLOPS = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("H200 NVL", 835.5),
    ("H200", 989.5),
    ("H100 NVL", 835.5),
    ("H100 PCIe", 756.5),
    ("H100", 989.5),
    ("A100", 312.0),
    ("L40S", 366.5),
)


def visible_pairs(length: float, window: int | None = None) -> float:
    """Query-key pairs that causal attention sees in one document; a query sees itself."""
    if window is None or length <= window:
        return length * (length + 1) / 2
    return window * (window + 1) / 2 + (length - window) * window


def model_flops(args: Namespace, num_tokens: float, squares: float | None = None) -> float:
    """FLOPs of the model over `num_tokens` tokens, forward and backward.

    Args:
        args: Megatron's arguments of a gpt-oss.
        num_tokens: tokens of a step, over all ranks.
        squares: sum of the squared document lengths, where attention stays within documents; a
            windowed layer then counts as if documents were of one length. None: sequences of
            --seq-length.
    """
    hidden, heads = args.hidden_size, args.num_attention_heads * args.kv_channels
    kv = args.num_query_groups * args.kv_channels
    layer = hidden * (2 * heads + 2 * kv)  # q, k, v and o
    layer += hidden * args.num_experts
    layer += args.moe_router_topk * 3 * hidden * args.moe_ffn_hidden_size
    products = args.num_layers * layer + hidden * args.padded_vocab_size

    length = args.seq_length if squares is None else squares / max(num_tokens, 1)
    documents = num_tokens / max(length, 1)
    num_windowed = sum(is_windowed(args, number) for number in range(1, args.num_layers + 1))
    pairs = (args.num_layers - num_windowed) * visible_pairs(length)
    if num_windowed:
        pairs += num_windowed * visible_pairs(length, args.window_size[0] + 1)
    # q k^T and p v: two products a pair, each of a head's length.
    return 3 * 2 * (products * num_tokens + 2 * heads * pairs * documents)


def is_windowed(args: Namespace, layer_number: int) -> bool:
    """Whether a layer (from 1) attends within the window; as Megatron decides."""
    from megatron.core.transformer.utils import is_layer_window_attention

    return is_layer_window_attention(args.window_size, args.window_attn_skip_freq, layer_number)


def peak_tflops(args: Namespace) -> float | None:
    """Dense BF16 peak of this card, or None: on a CPU, in fp32, or a card that is not listed."""
    if not device_utils.is_cuda() or not args.bf16:
        return None
    return peak_of(torch.cuda.get_device_name())


def peak_of(card: str) -> float | None:
    """The peak of a card by CUDA's name of it, e.g. 'NVIDIA H100 80GB HBM3'."""
    return next((peak for name, peak in PEAK_BF16_TFLOPS if name in card), None)
