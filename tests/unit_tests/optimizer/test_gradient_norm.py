# Copyright (c) 2026, the megatron-core gptoss authors.

"""Gradient norm and count of zeros of sharded models, against the unsharded gradients.

Every parameter of a gpt-oss GPTModel (router, experts with biases, sinks, norms, q/k/v biases) is
given its part of a random gradient that is made without a layout.
"""

import re
from dataclasses import dataclass

import pytest
import torch

pytestmark = pytest.mark.ranks(4)

NUM_LAYERS = 2
NUM_EXPERTS = 4


@dataclass(frozen=True)
class Layout:
    """Parallel sizes; the remaining factor of the four ranks is data parallel."""

    tp: int = 1
    ep: int = 1
    etp: int = 1
    pp: int = 1
    cp: int = 1
    sp: bool = False


LAYOUTS = {
    "dp4": Layout(),
    "ep2": Layout(ep=2),
    "ep2-pp2": Layout(ep=2, pp=2),
    "tp2-etp1": Layout(tp=2),
    "tp2-etp2-sp": Layout(tp=2, etp=2, sp=True),
    "tp2-ep2-etp1-sp": Layout(tp=2, ep=2, sp=True),
    "tp2-ep4-etp1-sp": Layout(tp=2, ep=4, sp=True),
    "tp2-ep2-etp2": Layout(tp=2, ep=2, etp=2),
    "tp2-ep2-etp1-pp2-sp": Layout(tp=2, ep=2, pp=2, sp=True),
    "tp2-etp1-pp2-sp": Layout(tp=2, pp=2, sp=True),
    "tp4-ep2-etp2-sp": Layout(tp=4, ep=2, etp=2, sp=True),
    "tp4-ep4-etp1-sp": Layout(tp=4, ep=4, sp=True),
    "tp2-cp2-ep2-etp1-sp": Layout(tp=2, cp=2, ep=2, sp=True),
    "etp2": Layout(etp=2),
}


def build_model(layout, dtype, model_kwargs=None, **overrides):
    """GPTModel of this rank on the local spec; `overrides` are of its config."""
    from megatron.core import parallel_state as ps
    from megatron.core.fusions.fused_bias_geglu import quick_gelu
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    fields = dict(
        num_layers=NUM_LAYERS,
        hidden_size=16,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=4,
        ffn_hidden_size=24,
        moe_ffn_hidden_size=24,
        num_moe_experts=NUM_EXPERTS,
        moe_router_topk=2,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        gated_linear_unit=True,
        activation_func=quick_gelu,
        add_bias_linear=True,
        bias_dropout_fusion=False,
        normalization="RMSNorm",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        softmax_type="learnable",
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        transformer_impl="local",
        use_cpu_initialization=True,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
    )
    config = TransformerConfig(**{**fields, **overrides})
    arguments = dict(
        vocab_size=64,
        max_sequence_length=32,
        pre_process=ps.is_pipeline_first_stage(),
        post_process=ps.is_pipeline_last_stage(),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    model = GPTModel(
        config,
        get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm"),
        **{**arguments, **(model_kwargs or {})},
    )
    return config, model.bfloat16() if dtype is torch.bfloat16 else model


def global_name(name, model):
    """The name in a model that is not split over pipeline or experts."""
    from megatron.core import parallel_state as ps

    def of_layer(match):
        return f"layers.{model.decoder.layers[int(match[1])].layer_number - 1}."

    def of_expert(match):
        first = ps.get_expert_model_parallel_rank() * len_local
        return f"local_experts.{first + int(match[1])}."

    len_local = NUM_EXPERTS // ps.get_expert_model_parallel_world_size()
    name = re.sub(r"layers\.(\d+)\.", of_layer, name)
    return re.sub(r"local_experts\.(\d+)\.", of_expert, name)


def split(name, local_shape):
    """(axis or None, number of parts, this rank's part) of a parameter."""
    from megatron.core import parallel_state as ps

    if "local_experts" in name:
        rank = ps.get_expert_tensor_parallel_rank()
        parts = ps.get_expert_tensor_parallel_world_size()
    else:
        rank = ps.get_tensor_model_parallel_rank()
        parts = ps.get_tensor_model_parallel_world_size()
    if re.search(r"linear_(qkv|fc1)|softmax_offset|word_embeddings|output_layer", name):
        return 0, parts, rank
    if re.search(r"linear_(proj|fc2)\.weight", name):
        return 1, parts, rank
    return None, 1, 0


def whole_gradient(name, shape):
    """A random gradient with some zeros, the same on every rank."""
    seed = sum(ord(letter) * (31**place % 9973) for place, letter in enumerate(name))
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(shape, generator=generator)
    return gradient * (torch.rand(shape, generator=generator) > 0.2)


def gradients_of(layout):
    """{name: gradient} of what this rank's parameters are parts of, and each parameter's part."""
    from megatron.core import parallel_state as ps
    from megatron.core import tensor_parallel
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    ps.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    whole, found = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        for distributed in (False, True):
            config, model = build_model(layout, dtype)
            ddp_config = DistributedDataParallelConfig(
                use_distributed_optimizer=distributed, grad_reduce_in_fp32=True
            )
            ddp = DistributedDataParallel(config, ddp_config, model)
            optimizer = get_megatron_optimizer(
                OptimizerConfig(
                    optimizer="adam",
                    lr=1e-3,
                    bf16=dtype is torch.bfloat16,
                    params_dtype=dtype,
                    use_distributed_optimizer=distributed,
                    log_num_zeros_in_grad=True,
                ),
                [ddp],
            )
            for name, param in model.named_parameters():
                name = global_name(name, model)
                axis, parts, rank = split(name, param.shape)
                shape = list(param.shape)
                if axis is not None:
                    shape[axis] *= parts
                whole[name] = whole_gradient(name, shape)
                part = whole[name] if axis is None else whole[name].chunk(parts, axis)[rank]
                param.main_grad.copy_(part)
            optimizer.prepare_grads()
            what = f"{str(dtype)[6:]}{', distributed optimizer' if distributed else ''}"
            found[what] = float(optimizer.get_grad_norm()), int(optimizer.count_zeros())
    return whole, found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm(layout, ranks):
    """Gradients of experts on other TP ranks than the first were left out, copies counted twice."""
    results = ranks.run(gradients_of, LAYOUTS[layout], world_size=4)
    whole = {name: gradient for result in results for name, gradient in result[0].items()}
    assert len([name for name in whole if "experts" in name]) == NUM_LAYERS * NUM_EXPERTS * 4
    flat = torch.cat([gradient.flatten() for gradient in whole.values()]).double()
    expected = flat.norm().item(), int((flat == 0).sum())
    for rank, (_, found) in enumerate(results):
        for what, (norm, zeros) in found.items():
            assert norm == pytest.approx(expected[0], rel=1e-5), (rank, what)
            assert zeros == expected[1], (rank, what)
