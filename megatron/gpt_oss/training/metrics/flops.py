# Copyright (c) 2026, the megatron-core gptoss authors.
"""Model FLOPs of a step, and the BF16 peak of a GPU.

Counted are the GEMMs of the model, forward and backward (three times the forward), a multiply-add
as two FLOPs. Recomputation is not counted, and a windowed layer counts only the keys in its window;
upstream counts the attention of every layer as full.
"""

from argparse import Namespace
from typing import NamedTuple

from megatron.gpt_oss.presets import windowed_layers

# Peak of dense BF16 GEMMs in TFLOP/s by CUDA's name of the card; the first name that matches. From
# NVIDIA's data sheets, which give the double where they assume 2:4 sparsity: A100 (2021), H100
# (2023: SXM 1979, NVL 1671, PCIe 1513), H200 (2024: SXM 1979, NVL 1671), L40S (733), DGX and
# GB200 NVL72 (2024: 4.5 and 5 PFLOP/s per GPU).
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


class LinearFlops(NamedTuple):
    """FLOPs per token, forward and backward: a layer's experts, its other linears, output layer."""

    experts: float
    dense: float
    head: float


def visible_pairs(length: float, window: int | None = None) -> float:
    """Query-key pairs of causal attention in one document.

    Args:
        length: tokens of the document.
        window: keys that a query sees, itself included; None: all.
    """
    if window is None or length <= window:
        return length * (length + 1) / 2
    return window * (window + 1) / 2 + (length - window) * window


def linear_flops(args: Namespace) -> LinearFlops:
    """FLOPs of the linear layers.

    Args:
        args: Megatron's arguments of a gpt-oss.
    """
    hidden, heads = args.hidden_size, args.num_attention_heads * args.kv_channels
    kv = args.num_query_groups * args.kv_channels
    router = hidden * args.num_experts
    return LinearFlops(
        experts=6 * args.moe_router_topk * 3 * hidden * args.moe_ffn_hidden_size,
        dense=6 * (hidden * (2 * heads + 2 * kv) + router),
        head=6 * hidden * args.padded_vocab_size,
    )


def attention_flops(args: Namespace, pairs: float) -> float:
    """FLOPs of one layer's q k^T and p v, forward and backward, for so many query-key pairs."""
    return 12 * pairs * args.num_attention_heads * args.kv_channels


def model_flops(args: Namespace, num_tokens: float, squares: float | None = None) -> float:
    """FLOPs of the model over `num_tokens` tokens, forward and backward.

    Args:
        args: Megatron's arguments of a gpt-oss.
        num_tokens: tokens of a step, over all ranks.
        squares: sum of the squared document lengths, where attention stays within documents; a
            windowed layer then counts as if documents were of one length. None: sequences of
            --seq-length.
    """
    linear = linear_flops(args)
    per_token = args.num_layers * (linear.experts + linear.dense) + linear.head
    length = args.seq_length if squares is None else squares / max(num_tokens, 1)
    documents = num_tokens / max(length, 1)
    num_windowed = sum(windowed_layers(vars(args), args.num_layers))
    pairs = (args.num_layers - num_windowed) * visible_pairs(length)
    if num_windowed:
        pairs += num_windowed * visible_pairs(length, args.window_size[0] + 1)
    return per_token * num_tokens + attention_flops(args, pairs) * documents


def peak_tflops(args: Namespace) -> float | None:
    """Dense BF16 peak of this card in TFLOP/s; None on a CPU, in fp32, or for an unlisted card."""
    # The planner uses this module without torch.
    import torch

    from megatron.core import device_utils

    if not device_utils.is_cuda() or not args.bf16:
        return None
    return peak_of(torch.cuda.get_device_name())


def peak_of(card: str) -> float | None:
    """Dense BF16 peak in TFLOP/s by CUDA's name of a card, e.g. 'NVIDIA H100 80GB HBM3'."""
    return next((peak for name, peak in PEAK_BF16_TFLOPS if name in card), None)
