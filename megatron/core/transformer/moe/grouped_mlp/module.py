# Copyright (c) 2026, the megatron-core gptoss authors.

"""All local experts of a layer as two grouped GEMMs, without TransformerEngine.

Replaces SequentialMLP with --moe-grouped-gemm: same maths, initial weights and checkpoints.

Shapes: t tokens routed to the local experts, e local experts, h hidden (or latent) size,
f expert width of this expert tensor parallel rank.
"""

from functools import partial
from typing import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from megatron.core import activations, device_utils
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.fusions import fused_bias_geglu
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import (
    _initialize_affine_weight_cpu,
    _initialize_affine_weight_gpu,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.expert_bias import count_bias_once
from megatron.core.transformer.moe.grouped_mlp.activation import ClampedSwiGLU, weighted_bias_swiglu
from megatron.core.transformer.moe.grouped_mlp.checkpoint import (
    ExpertSharding,
    expert_extra_states,
    expert_factory,
)
from megatron.core.transformer.moe.grouped_mlp.expert_segments import ExpertSegments
from megatron.core.transformer.moe.grouped_mlp.experts_fp8 import (
    QuantizedMatrices,
    check_experts_fp8,
    config_fp8_recipe,
    experts_fp8,
)
from megatron.core.transformer.moe.grouped_mlp.linear import grouped_linear
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import divide


class GroupedExperts(MegatronModule):
    """The local experts of one layer.

    Args:
        num_local_experts: e.
        config: of the model.
        pg_collection: process groups; `ep`, `expt_tp` and `expt_dp` are used.
        name: of the module, unused.
    Raises:
        ValueError: the config has an option that these experts do not support.
    """

    # The dispatcher may leave the counts on the device: grouped kernels do not wait for them.
    takes_counts_on_device = True

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
    ):
        super().__init__(config=config)
        _check_supported(config)
        self.num_local_experts = num_local_experts
        self.ep_group = pg_collection.ep
        self.tp_group = pg_collection.expt_tp
        self.dp_group = pg_collection.expt_dp
        hidden_size = getattr(config, "moe_latent_size", None) or config.hidden_size
        # Gate and up are each split over the expert tensor parallel ranks.
        parts = 2 if config.gated_linear_unit else 1
        width = config.moe_ffn_hidden_size
        self.linear_fc1 = GroupedLinear(
            num_local_experts, hidden_size, parts * width, "output", config, self.tp_group, parts
        )
        self.linear_fc2 = GroupedLinear(
            num_local_experts, width, hidden_size, "input", config, self.tp_group
        )
        if config.perform_initialization:
            # In the order of SequentialMLP, for the same random numbers.
            for expert in range(num_local_experts):
                self.linear_fc1.initialize(expert, config.init_method)
                self.linear_fc2.initialize(expert, config.output_layer_init_method)
        self.swiglu = _swiglu_of(config)
        self.fp8 = config_fp8_recipe(config) is not None
        if self.fp8:
            check_experts_fp8(config, self.swiglu, self.linear_fc2.weight)
        # None until a schedule marks the first micro-batch of each step: without that, weights may
        # change at any time.
        self.is_first_microbatch: bool | None = None
        self._quantized = None
        self.activation_recompute = (
            config.recompute_granularity == "selective" and "moe_act" in config.recompute_modules
        )

    def forward(
        self,
        permuted_local_hidden_states: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        permuted_probs: torch.Tensor,
    ) -> tuple[torch.Tensor, None]:
        """Run every expert on its routed tokens.

        Args:
            permuted_local_hidden_states: [t, h], sorted by expert.
            tokens_per_expert: [e], an integer type, on any device.
            permuted_probs: [t], the router's weights.
        Returns:
            [t, h], each token scaled by its probability, partial sums over the expert tensor
            parallel group; and None, as the bias is included.
        """
        x, probs = permuted_local_hidden_states, permuted_probs
        segments = ExpertSegments(tokens_per_expert, x.device)
        if self.config.moe_apply_probs_on_input:
            assert self.config.moe_router_topk == 1, (
                "`moe_apply_probs_on_input` only works with `moe_router_topk`=1."
            )
            x = (probs[:, None] * x).to(x.dtype)
            probs = torch.ones_like(probs)

        bias = self.linear_fc1.bias
        output_bias = count_bias_once(self.linear_fc2.bias, self.tp_group)
        if self.fp8:
            weights = self.linear_fc1.weight, self.linear_fc2.weight
            quantized = self._quantized_weights(weights)
            biases = bias, output_bias
            return experts_fp8(x, probs, weights, biases, quantized, segments, self.swiglu), None
        y = self.linear_fc1(x, segments)
        if not (self.activation_recompute and self.training):
            y = self._activate(y, bias, probs, segments)
            return self.linear_fc2(y, segments, output_bias, probs), None
        recompute_fn = partial(self._activate, y.detach(), bias, probs.detach(), segments)
        y = self._activate(y, bias, probs, segments, recompute=True)
        with recompute_in_backward(y, recompute_fn):
            return self.linear_fc2(y, segments, output_bias, probs), None

    def _quantized_weights(self, weights):
        """Both weights in e4m3, once for all micro-batches of a step if these are marked.

        Always in eval mode: a sample after the optimizer step is no micro-batch of a schedule.
        """
        known = self.training and self.is_first_microbatch is False
        if self._quantized is None or not known:
            self._quantized = None  # its memory is free for the new ones
            self._quantized = tuple(QuantizedMatrices.of(weight) for weight in weights)
        if self.is_first_microbatch:
            self.is_first_microbatch = False
        return self._quantized

    def _activate(self, y, bias, probs, segments, recompute=False):
        if self.swiglu is not None:
            return weighted_bias_swiglu(y, bias, probs, segments, self.swiglu)
        if recompute:
            return checkpoint(
                _activate_unfused, y, bias, probs, segments, self.config, use_reentrant=False
            )
        return _activate_unfused(y, bias, probs, segments, self.config)

    def backward_dw(self) -> None:
        """Do nothing: the backward computes wgrad."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Checkpoint entries, interchangeable with SequentialMLP's and TEGroupedMLP's."""
        sharding = ExpertSharding(
            first_expert=self.ep_group.rank() * self.num_local_experts,
            num_experts=self.ep_group.size() * self.num_local_experts,
            sharded_offsets=tuple(sharded_offsets),
            tp_rank=self.tp_group.rank(),
            tp_size=self.tp_group.size(),
            dp_rank=self.dp_group.rank(),
            singleton=(metadata or {}).get("singleton_local_shards", False),
        )
        entries = {}
        for linear_name, linear in self.named_children():
            for name, parameter in linear.named_parameters():
                name = f"{linear_name}.{name}"
                entries[prefix + name] = expert_factory(
                    parameter, prefix, name, sharding, *linear.checkpoint_split(parameter)
                )
            entries.update(
                expert_extra_states(prefix, linear_name, self.num_local_experts, sharding)
            )
        return entries


class GroupedLinear(torch.nn.Module):
    """One linear layer of all local experts, its weight split over expert tensor parallel ranks.

    Args:
        num_experts: e.
        input_size, output_size: of the whole layer.
        split: 'output' or 'input', the side that is split, as in ColumnParallelLinear and
            RowParallelLinear.
        config: of the model.
        tp_group: the expert tensor parallel group.
        parts: matrices that are concatenated on the output (gate and up), each of them split.
    """

    def __init__(self, num_experts, input_size, output_size, split, config, tp_group, parts=1):
        super().__init__()
        self.full_size = (output_size, input_size)
        self.config, self.tp_group, self.split, self.parts = config, tp_group, split, parts
        if split == "output":
            output_size = divide(output_size, tp_group.size())
        else:
            input_size = divide(input_size, tp_group.size())
        on_cpu = config.use_cpu_initialization
        device = torch.device("cpu") if on_cpu else device_utils.current_device()

        def empty(*shape):
            tensor = torch.empty(num_experts, *shape, device=device, dtype=config.params_dtype)
            return torch.nn.Parameter(tensor)

        # The names end as those of a linear layer: weight decay leaves out what ends in '.bias'.
        self.weight = empty(input_size, output_size)
        axis = 2 if split == "output" else 1
        set_tensor_model_parallel_attributes(self.weight, True, axis, parts)
        self.bias = empty(output_size) if config.add_bias_linear else None
        if self.bias is not None:
            if split == "output":
                set_tensor_model_parallel_attributes(self.bias, True, 1, parts)
            if config.perform_initialization:
                torch.nn.init.zeros_(self.bias)
        # Which gradients are averaged over which ranks, as in ColumnParallelLinear.
        own_groups = (
            config.expert_model_parallel_size > 1
            or config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        )
        for parameter in self.parameters():
            parameter.allreduce = not own_groups
        self.register_load_state_dict_pre_hook(_drop_extra_states)

    @torch.no_grad()
    def initialize(self, expert: int, init_method: Callable[[torch.Tensor], None]) -> None:
        """Initialise one expert's weight as ColumnParallelLinear and RowParallelLinear do."""
        matrix = self.weight[expert].t().contiguous()
        axis = 0 if self.split == "output" else 1
        if self.config.use_cpu_initialization:
            _initialize_affine_weight_cpu(
                matrix,
                *self.full_size,
                matrix.shape[axis],
                axis,
                init_method,
                stride=self.parts,
                params_dtype=self.config.params_dtype,
                rank=self.tp_group.rank(),
                world_size=self.tp_group.size(),
            )
        else:
            _initialize_affine_weight_gpu(
                matrix, init_method, axis, stride=self.parts, is_expert=True
            )
        self.weight[expert].copy_(matrix.t())

    def forward(
        self,
        x: torch.Tensor,
        segments: ExpertSegments,
        bias: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`grouped_linear` with this weight, and the given bias instead of this layer's."""
        return grouped_linear(x, self.weight, segments, bias, scale)

    def checkpoint_split(self, parameter: torch.Tensor) -> tuple[int | None, int]:
        """Arguments of `expert_factory`: the axis that is split, and the parts on it."""
        if self.split == "output":
            return 0, self.parts
        return (1 if parameter is self.weight else None), 1


def recompute_in_backward(
    tensor: torch.Tensor, recompute_fn: Callable[[], torch.Tensor]
) -> torch.autograd.graph.saved_tensors_hooks:
    """A context whose operations recompute `tensor` in their backward instead of saving it.

    tensor_parallel.CheckpointWithoutOutput is similar, but needs a C++ compiler at run time.

    Args:
        tensor: the tensor that is not saved.
        recompute_fn: returns the same values; called without gradients.
    """
    address, shape = tensor.data_ptr(), tensor.shape  # a reference would keep the tensor alive

    def pack(saved):
        return recompute_fn if saved.data_ptr() == address and saved.shape == shape else saved

    def unpack(packed):
        if packed is not recompute_fn:
            return packed
        with torch.no_grad():
            return recompute_fn()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _drop_extra_states(module, state_dict, prefix, *unused) -> None:
    for key in [key for key in state_dict if key.startswith(prefix + "_extra_state")]:
        del state_dict[key]


def _swiglu_of(config: TransformerConfig) -> ClampedSwiGLU | None:
    """The constants of the fused activation; None if the config has another activation."""
    if not config.gated_linear_unit:
        return None
    if config.activation_func in (activations.quick_gelu, fused_bias_geglu.quick_gelu):
        alpha = 1.702
    elif config.activation_func is F.silu:
        alpha = 1.0
    else:
        return None
    return ClampedSwiGLU(alpha, config.activation_func_clamp_value, config.glu_linear_offset)


def _activate_unfused(y, bias, probs, segments, config):
    """Any activation of the config, unfused, as in MLP."""
    dtype = y.dtype
    if bias is not None:
        y = y + bias.index_select(0, segments.owners(y.shape[0]))
    if config.gated_linear_unit:
        gate, up = y.chunk(2, dim=-1)
        if (limit := config.activation_func_clamp_value) is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        y = config.activation_func(gate) * (up + config.glu_linear_offset)
    else:
        y = config.activation_func(y)
    return (y * probs[:, None]).to(dtype)


def _check_supported(config: TransformerConfig) -> None:
    def option(name):
        return getattr(config, name, None)  # older versions do not have all of these

    offloaded = {"expert_fc1", "moe_act", "fused_group_mlp"} & set(option("offload_modules") or ())
    refused = {
        "fp8": config.fp8,
        "fp4": config.fp4,
        "use_te_activation_func": config.use_te_activation_func,
        "moe_mlp_glu_interleave_size": option("moe_mlp_glu_interleave_size"),
        "delay_wgrad_compute": config.delay_wgrad_compute,
        "overlap_dispatch_backward_with_experts_wgrad": option(
            "overlap_dispatch_backward_with_experts_wgrad"
        ),
        "offload_modules": (
            sorted(offloaded) if option("fine_grained_activation_offloading") else ()
        ),
        "moe_paged_stash": option("moe_paged_stash"),
    }
    for name, value in refused.items():
        if value:
            raise ValueError(
                f"GroupedExperts does not support {name} = {value}. Use TransformerEngine's "
                "experts (--transformer-impl transformer_engine), or switch it off."
            )
