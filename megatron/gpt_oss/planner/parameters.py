# Copyright (c) 2026, the megatron-core gptoss authors.

"""Number of parameters of a rank."""

from megatron.gpt_oss.planner.layout import Layout


def stage_layers(layout: Layout, stage: int) -> list[int]:
    """The layers of a pipeline rank, numbered from 0."""
    count = layout.preset.num_layers // (layout.pp * layout.virtual_stages)
    return [
        (chunk * layout.pp + stage) * count + layer
        for chunk in range(layout.virtual_stages)
        for layer in range(count)
    ]


def layer_parameters(layout: Layout) -> tuple[dict[str, int], dict[str, int]]:
    """Elements by parameter name of one layer on one rank: outside and inside experts."""
    preset, tp, etp, experts = layout.preset, layout.tp, layout.etp, layout.local_experts
    h, f = preset.hidden_size, preset.moe_ffn_hidden_size
    q = preset.num_attention_heads * preset.head_dim // tp
    kv = preset.num_query_groups * preset.head_dim // tp
    dense = {
        "input_layernorm.weight": h,
        "self_attention.linear_qkv.weight": (q + 2 * kv) * h,
        "self_attention.linear_qkv.bias": q + 2 * kv,
        "self_attention.core_attention.softmax_offset": preset.num_attention_heads // tp,
        "self_attention.linear_proj.weight": h * q,
        "self_attention.linear_proj.bias": h,
        "pre_mlp_layernorm.weight": h,
        "mlp.router.weight": preset.num_experts * h,
        "mlp.router.bias": preset.num_experts,
    }
    expert = {
        "mlp.experts.linear_fc1.weight": experts * h * 2 * f // etp,
        "mlp.experts.linear_fc1.bias": experts * 2 * f // etp,
        "mlp.experts.linear_fc2.weight": experts * h * f // etp,
        "mlp.experts.linear_fc2.bias": experts * h,
    }
    return dense, expert


def expert_fp8_copies(layout: Layout, stage: int) -> int:
    """Bytes of the experts' weights in e4m3, in both layouts, on a rank of a pipeline stage."""
    if not layout.expert_fp8:
        return 0
    _, expert = layer_parameters(layout)
    weights = sum(size for name, size in expert.items() if name.endswith(".weight"))
    return 2 * weights * len(stage_layers(layout, stage))


def rank_parameters(layout: Layout, stage: int) -> tuple[int, int]:
    """Elements on a rank of a pipeline stage: outside and inside experts."""
    preset = layout.preset
    dense, expert = (sum(tensors.values()) for tensors in layer_parameters(layout))
    layers = len(stage_layers(layout, stage))
    vocabulary = preset.vocab_size // layout.tp * preset.hidden_size
    ends = vocabulary * ((stage == 0) + (stage == layout.pp - 1))
    final_norm = preset.hidden_size * (stage == layout.pp - 1)
    return layers * dense + ends + final_norm, layers * expert
