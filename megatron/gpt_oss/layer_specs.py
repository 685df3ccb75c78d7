# Copyright (c) 2026, the megatron-core gptoss authors.

"""gpt-oss through Megatron's extension points: spec providers and a block spec function.

`GPTModelConfig.transformer_layer_spec` is set to a function that returns the block spec of one
pipeline stage, in which every layer is an MoE layer. To replace attention, experts or norm,
override one method of `GptOssSpecProvider`.
"""

import contextlib
import io
from argparse import ArgumentParser, Namespace
from functools import partial

import torch

from megatron.core.extensions.te_norm import TECheckpointedNorm
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.fusions.fused_bias_residual import get_bias_residual_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.fused_rotary_attention import FusedRotarySelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.grouped_mlp.module import GroupedExperts
from megatron.core.transformer.moe.moe_layer import ExpertsBuilder
from megatron.core.transformer.sink_attention.sink_dot_product_attention import (
    SinkDotProductAttention,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.gpt_oss.arguments.device_connections import set_device_connections
from megatron.gpt_oss.presets import Preset, preset_flags
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelConfig


class GptOssSpecProvider(LocalSpecProvider):
    """Modules of a gpt-oss layer without TransformerEngine."""

    def core_attention(self) -> type:
        """Which module to use for attention"""
        return SinkDotProductAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> ExpertsBuilder:
        """Which module and submodules to use for grouped mlp"""
        if moe_use_grouped_gemm:
            return GroupedExperts
        return super().grouped_mlp_modules(moe_use_grouped_gemm)


class TEGptOssSpecProvider(TESpecProvider):
    """Norms, linears and grouped linears of TransformerEngine; attention of either library.

    Args:
        sink_attention: "megatron" for SinkDotProductAttention, "te" for TransformerEngine's.
    """

    def __init__(self, sink_attention: str = "megatron"):
        self._sink_attention = sink_attention

    def core_attention(self) -> type:
        """Which module to use for attention"""
        return super().core_attention() if self._sink_attention == "te" else SinkDotProductAttention

    def layer_norm(
        self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> type:
        """Which module for layernorm"""
        return TECheckpointedNorm


def gpt_oss_layer_spec(config: TransformerConfig, provider: BackendSpecProvider) -> ModuleSpec:
    """One decoder layer: RMSNorm, attention with a sink, RMSNorm, mixture of experts.

    TransformerEngine fuses the first norm into linear_qkv.
    """
    norm = provider.layer_norm(rms_norm=True, for_qk=False, has_residual=True)
    fused = provider.fuse_layernorm_and_linear()
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if fused else norm,
            self_attention=ModuleSpec(
                module=FusedRotarySelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=(
                        provider.column_parallel_layer_norm_linear()
                        if fused
                        else provider.column_parallel_linear()
                    ),
                    core_attention=provider.core_attention(),
                    linear_proj=provider.row_parallel_linear(),
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_residual_add,
            pre_mlp_layernorm=norm,
            mlp=get_moe_module_spec_for_backend(
                backend=provider,
                num_experts=config.num_moe_experts,
                moe_grouped_gemm=config.moe_grouped_gemm,
            ),
            mlp_bda=get_bias_residual_add,
            # Checkpoints use the names of TransformerEngine's layers, so that either implementation
            # resumes from the other's. Upstream's local spec also renames the norm before the
            # experts, which matches TransformerEngine for dense layers only.
            sharded_state_dict_keys_map=(
                {} if fused else {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
            ),
        ),
    )


def gpt_oss_block_spec(
    config: GPTModelConfig, vp_stage: int | None = None, sink_attention: str = "megatron"
) -> TransformerBlockSubmodules:
    """The block spec of one pipeline stage; the value of `GPTModelConfig.transformer_layer_spec`.

    Windowed and full layers have the same spec: Megatron decides by the layer number.

    Args:
        config: config of the model.
        vp_stage: virtual pipeline stage.
        sink_attention: attention of TransformerEngine's layers; see `TEGptOssSpecProvider`.
    """
    transformer = config.transformer
    if transformer.transformer_impl == "inference_optimized":
        return get_gpt_decoder_block_spec(
            transformer,
            use_transformer_engine=False,
            normalization=transformer.normalization,
            vp_stage=vp_stage,
        )
    if transformer.transformer_impl == "transformer_engine":
        provider = TEGptOssSpecProvider(sink_attention)
    else:
        provider = GptOssSpecProvider()
    num_layers = get_num_layers_to_build(transformer, vp_stage=vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=[gpt_oss_layer_spec(transformer, provider)] * num_layers,
        layer_norm=provider.layer_norm(rms_norm=True, for_qk=False, has_residual=False),
    )


def model_config_from_args(args: Namespace) -> GPTModelConfig:
    """The model config from validated Megatron arguments.

    Uses the block spec of this module unless `--spec` is given.
    """
    config = gpt_config_from_args(args)
    if config.transformer_layer_spec is None:
        config.transformer_layer_spec = gpt_oss_block_spec
        if getattr(args, "sink_attention", "megatron") != "megatron":
            config.transformer_layer_spec = partial(
                gpt_oss_block_spec, sink_attention=args.sink_attention
            )
    return config


def model_config(preset: Preset, sink_attention: str = "megatron", **overrides) -> GPTModelConfig:
    """The model config from a preset, without a command line.

    Uses Megatron's parser and validation, so it equals the config of a command line.

    Args:
        preset: the model.
        sink_attention: value of --sink-attention.
        overrides: Megatron arguments by dest, e.g. `seq_length=128`; parallel sizes must fit the
            process group, if one is initialised.
    Raises:
        TypeError: an override is not an argument of Megatron.
    """
    from megatron.training.arguments import add_megatron_arguments, validate_args

    parser = add_megatron_arguments(ArgumentParser(allow_abbrev=False))
    known = {action.dest for action in parser._actions} | {"expert_fp8_recipe"}  # without a flag
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise TypeError(f"Megatron has no argument {', '.join(unknown)}")
    parser.set_defaults(**{**preset_flags(preset), "micro_batch_size": 1, **overrides})
    args = parser.parse_args([])
    args.sink_attention = sink_attention
    set_device_connections(args)
    ranks = torch.distributed
    args.rank, args.world_size = 0, ranks.get_world_size() if ranks.is_initialized() else 1
    with contextlib.redirect_stdout(io.StringIO()):  # it prints every argument
        validate_args(args)
    return model_config_from_args(args)
