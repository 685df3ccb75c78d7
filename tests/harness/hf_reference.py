# Copyright (c) 2026, the megatron-core gptoss authors.

"""A small Hugging Face gpt-oss as the independent reference of the layer tests.

The map from Hugging Face to Megatron names and layouts is linear, so that the same function
carries parameters and gradients. It is written down here once more, apart from the checkpoint
converter, because a reference that shares code with what it checks proves little.
"""

import torch
from transformers import GptOssConfig, GptOssForCausalLM

WINDOW = 5

# Irregular sizes: hidden != expert width, grouped heads, head size not hidden / heads.
SIZES = dict(
    vocab_size=96,
    hidden_size=40,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=16,
    num_local_experts=4,
    num_experts_per_tok=2,
    sliding_window=WINDOW,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
)
YARN = dict(
    rope_type="yarn",
    rope_theta=150000.0,
    factor=4.0,
    original_max_position_embeddings=128,
    beta_fast=32.0,
    beta_slow=1.0,
    truncate=False,
)


def hf_model(dtype=torch.float64, seed=1234, **sizes):
    """A gpt-oss with large sinks, with every bias set, and with gates past the clamp."""
    config = GptOssConfig(
        **{**SIZES, **sizes},
        rope_parameters=dict(YARN),
        tie_word_embeddings=False,
        attn_implementation="eager",
        experts_implementation="eager",
        pad_token_id=None,
    )
    model = GptOssForCausalLM(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            if name.endswith("sinks"):
                signs = torch.tensor([8.0, -8.0, 0.0, 2.0]).repeat(param.numel() // 4)
                param.copy_(signs + noise * 0.1)
            elif "norm" in name:
                param.copy_(1 + 0.2 * noise)
            elif "gate_up_proj" in name:
                param.copy_(0.8 * noise)
            else:
                param.copy_(0.2 * noise)
    return model


def merge_qkv(q, k, v, num_groups):
    """Per key/value group: its queries, its key, its value (Megatron's linear_qkv rows)."""
    q, k, v = (t.reshape(num_groups, -1, *t.shape[1:]) for t in (q, k, v))
    return torch.cat([q, k, v], dim=1).flatten(0, 1)


def moe_to_megatron(tensors, prefix, target):
    """GptOssMLP to MoELayer with SequentialMLP; `tensors` holds parameters or gradients."""
    out = {f"{target}router.weight": tensors[f"{prefix}router.weight"]}
    out[f"{target}router.bias"] = tensors[f"{prefix}router.bias"]
    for expert in range(tensors[f"{prefix}router.bias"].numel()):
        to = f"{target}experts.local_experts.{expert}."
        for kind, suffix in (("weight", ""), ("bias", "_bias")):
            gate_up = tensors[f"{prefix}experts.gate_up_proj{suffix}"][expert]
            down = tensors[f"{prefix}experts.down_proj{suffix}"][expert]
            # [in, 2 * out], gate and up interleaved -> [gate rows; up rows].
            gate_up = torch.cat([gate_up[..., ::2], gate_up[..., 1::2]], dim=-1)
            out[f"{to}linear_fc1.{kind}"] = gate_up.mT if gate_up.dim() == 2 else gate_up
            out[f"{to}linear_fc2.{kind}"] = down.mT if down.dim() == 2 else down
    return out


def to_megatron(tensors, num_layers, num_groups):
    """GptOssForCausalLM to GPTModel on the local spec, with the model split over nothing."""
    out = {
        "embedding.word_embeddings.weight": tensors["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": tensors["model.norm.weight"],
        "output_layer.weight": tensors["lm_head.weight"],
    }
    for i in range(num_layers):
        hf, to = f"model.layers.{i}.", f"decoder.layers.{i}."
        attention = f"{hf}self_attn."
        out[f"{to}input_layernorm.weight"] = tensors[f"{hf}input_layernorm.weight"]
        out[f"{to}pre_mlp_layernorm.weight"] = tensors[f"{hf}post_attention_layernorm.weight"]
        out[f"{to}self_attention.core_attention.softmax_offset"] = tensors[f"{attention}sinks"]
        for kind in ("weight", "bias"):
            q, k, v = (tensors[f"{attention}{name}_proj.{kind}"] for name in "qkv")
            out[f"{to}self_attention.linear_qkv.{kind}"] = merge_qkv(q, k, v, num_groups)
            out[f"{to}self_attention.linear_proj.{kind}"] = tensors[f"{attention}o_proj.{kind}"]
        out.update(moe_to_megatron(tensors, f"{hf}mlp.", f"{to}mlp."))
    return out
