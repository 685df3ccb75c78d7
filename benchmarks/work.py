# Copyright (c) 2026, the megatron-core gptoss authors.

"""The work of gpt-oss in floating point operations, and its parameters; no device is needed.

Forward and backward: 6 a parameter and token outside attention, 12 x seen query-key pairs x heads x
head dim in it. What is computed twice counts once.
"""

from megatron.gpt_oss.presets import Preset


def is_windowed(layer: int) -> bool:
    """Whether the layer of this number (from 0) sees a window only: every second, from 0."""
    return layer % 2 == 0


def linear_flops(preset: Preset, length: int) -> tuple[float, float]:
    """Of a layer's experts, and of its other products (queries to output, router), a sequence."""
    h, heads = preset.hidden_size, preset.num_attention_heads * preset.head_dim
    groups = preset.num_query_groups * preset.head_dim
    experts = preset.num_experts_per_tok * 3 * h * preset.moe_ffn_hidden_size
    others = h * (2 * heads + 2 * groups) + h * preset.num_experts
    return 6.0 * length * experts, 6.0 * length * others


def attention_flops(preset: Preset, length: int, windowed: bool) -> float:
    """Of a layer's scores and their sums, a sequence."""
    window = min(preset.sliding_window, length) if windowed else length
    pairs = window * length - window * (window - 1) / 2
    return 12 * pairs * preset.num_attention_heads * preset.head_dim


def layer_flops(preset: Preset, length: int, windowed: bool) -> float:
    """Of one layer and one sequence."""
    return sum(linear_flops(preset, length)) + attention_flops(preset, length, windowed)


def head_flops(preset: Preset, length: int) -> float:
    """Of the output layer and one sequence."""
    return 6.0 * length * preset.vocab_size * preset.hidden_size


def model_flops(preset: Preset, length: int) -> float:
    """Of the whole model and one sequence."""
    layers = range(preset.num_layers)
    return head_flops(preset, length) + sum(
        layer_flops(preset, length, is_windowed(layer)) for layer in layers
    )


def num_parameters(preset: Preset) -> tuple[int, int]:
    """Of one layer; of embedding, head and the last norm."""
    h, f = preset.hidden_size, preset.moe_ffn_hidden_size
    q = preset.num_attention_heads * preset.head_dim
    kv = 2 * preset.num_query_groups * preset.head_dim
    attention = h * (q + kv) + (q + kv) + q * h + h + preset.num_attention_heads
    router = preset.num_experts * (h + 1)
    experts = preset.num_experts * (3 * h * f + 2 * f + h)
    return attention + router + experts + 2 * h, 2 * preset.vocab_size * h + h
