# Copyright (c) 2026, the megatron-core gptoss authors.

"""Model FLOPs of a preset per sequence, forward and backward, and its number of parameters."""

from argparse import Namespace

from megatron.gpt_oss.planner.layout import Layout
from megatron.gpt_oss.planner.parameters import layer_parameters, rank_parameters
from megatron.gpt_oss.presets import Preset, architecture_flags
from megatron.gpt_oss.training.metrics import flops


def linear_flops(preset: Preset, length: int) -> flops.LinearFlops:
    """FLOPs of the linear layers: a layer's experts, a layer's other linears, the output layer."""
    return flops.LinearFlops(*(length * count for count in flops.linear_flops(_args(preset))))


def attention_flops(preset: Preset, length: int, windowed: bool) -> float:
    """FLOPs of one layer's attention."""
    pairs = flops.visible_pairs(length, preset.sliding_window if windowed else None)
    return flops.attention_flops(_args(preset), pairs)


def layer_flops(preset: Preset, length: int, windowed: bool) -> float:
    """FLOPs of one layer."""
    linear = linear_flops(preset, length)
    return linear.experts + linear.dense + attention_flops(preset, length, windowed)


def model_flops(preset: Preset, length: int) -> float:
    """FLOPs of the model."""
    return flops.model_flops(_args(preset, seq_length=length), length)


def num_parameters(preset: Preset) -> tuple[int, int]:
    """Parameters of one layer; of embedding, output layer and final norm."""
    layout = Layout(preset, gpus=1)
    layer = sum(sum(tensors.values()) for tensors in layer_parameters(layout))
    return layer, sum(rank_parameters(layout, 0)) - preset.num_layers * layer


def _args(preset: Preset, **other) -> Namespace:
    """Megatron's arguments of a preset."""
    return Namespace(**architecture_flags(preset), **other)
