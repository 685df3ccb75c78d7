# Copyright (c) 2026, the megatron-core gptoss authors.

"""The work of gpt-oss in floating point operations, and its parameters; no device is needed.

Forward and backward: 6 a parameter and token outside attention, 12 x seen query-key pairs x heads x
head dim in it. What is computed twice counts once.
"""

from megatron.gpt_oss.planner.layout import Layout
from megatron.gpt_oss.planner.parameters import layer_parameters, rank_parameters
from megatron.gpt_oss.presets import Preset
from megatron.gpt_oss.training.metrics.flops import visible_pairs


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
    pairs = visible_pairs(length, preset.sliding_window if windowed else None)
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
    layout = Layout(preset, gpus=1)
    layer = sum(sum(tensors.values()) for tensors in layer_parameters(layout))
    return layer, sum(rank_parameters(layout, 0)) - preset.num_layers * layer
