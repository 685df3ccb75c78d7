# Copyright (c) 2026, the megatron-core gptoss authors.

"""Small MoE layers with either kind of experts, and an independent reference of the experts."""

import torch

from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.gpt_oss.checkpoint.load_hf import sharded_tensors

# No two alike, and each splits over two ranks.
HIDDEN, WIDTH, EXPERTS, TOPK = 24, 16, 4, 2


def moe_layer(grouped, dtype=torch.float64, **overrides):
    """A MoELayer of this rank with the local spec; GroupedExperts or SequentialMLP."""
    settings = dict(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        ffn_hidden_size=40,
        moe_ffn_hidden_size=WIDTH,
        num_moe_experts=EXPERTS,
        moe_router_topk=TOPK,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        moe_router_dtype="fp64" if dtype == torch.float64 else "fp32",
        gated_linear_unit=True,
        activation_func=quick_gelu,
        glu_linear_offset=1.0,
        activation_func_clamp_value=7.0,
        add_bias_linear=True,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        use_cpu_initialization=True,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
    )
    config = TransformerConfig(**{**settings, **overrides}, moe_grouped_gemm=grouped)
    build = get_moe_module_spec(False, config.num_moe_experts, grouped)
    if isinstance(build, ModuleSpec):  # before 0.18
        return build_module(build, config=config, layer_number=1)
    args = (config, *getattr(build, "args", ()))
    return build.func(*args, layer_number=1, **build.keywords)


def randomize(layer, seed=0):
    """Values past the clamp on both sides, biases that carry some over it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            scale = 3.0 if "linear_fc1.bias" in name else 0.8
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(scale * noise)


def by_place(layer, gradients=False):
    """{(key, global offset): tensor} of the layer, as a checkpoint has it.

    Args:
        gradients: of the parameters, through the map that their checkpoint entries apply.
    """
    entries = layer.sharded_state_dict("layer.")
    if gradients:
        for entry in entries.values():
            if hasattr(entry, "build_fn") or isinstance(entry.data, torch.nn.Parameter):
                entry.data = entry.data.grad
    return {(part.key, part.global_offset): part.data for part in sharded_tensors(entries)}


def copy_weights(source, target):
    """The weights of one layer into another of the same parallel layout."""
    source, target = by_place(source), by_place(target)
    assert source.keys() == target.keys()
    with torch.no_grad():
        for place, tensor in target.items():
            tensor.copy_(source[place])


def experts_ref(x, weight1, bias1, weight2, bias2, counts, probs):
    """Reference of gpt-oss' experts as a loop over experts; the shapes of GroupedExperts."""
    outputs = []
    for e, (rows, p) in enumerate(zip(x.split(counts), probs.split(counts))):
        gate, up = (rows @ weight1[e] + bias1[e]).chunk(2, dim=-1)
        gate = torch.minimum(gate, torch.tensor(7.0).to(gate))
        up = torch.clip(up, -7, 7)
        hidden = (up + 1) * (gate / (1 + torch.exp(-1.702 * gate)))
        outputs.append((hidden @ weight2[e] + bias2[e]) * p[:, None])
    return torch.cat(outputs)
