# Copyright (c) 2026, the megatron-core gptoss authors.

"""A model without a forward pass, with irregular parameter sizes, and its Adam in one process.

For tests of what the distributed optimizer writes into a checkpoint and reads from it: gradients
are put into the buffers, so that a case takes no more than building, stepping, saving and loading.
"""

from dataclasses import dataclass
from typing import Dict, Optional, Tuple

import torch

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import MegatronModule, TransformerConfig

STEPS, LR, BETAS, EPS = 3, 0.1, (0.9, 0.95), 1e-8
NUM_EXPERTS = 4
# Neither 64, at which parameters begin, nor 128 divides them.
SIZES = {"a": (7, 19), "b": (3,), "c": (65, 3), "d": (129,), "e": (1,), "f": (40, 17), "g": (5, 5)}
EXPERT_SIZES = {"expert_a": (5, 9), "expert_b": (13,)}  # of one expert


@dataclass(frozen=True)
class Case:
    """How a model is built; every rank has the same.

    Attributes:
        bucket_size: elements after which a bucket is full; None: one bucket a buffer.
        sharding_type: of the checkpoint.
        expert_parallel: 0 for a model without experts.
        fp32: names of parameters that are fp32 where the others are bf16; None: all are fp32.
        frozen: names of parameters without gradients.
        sizes: of the parameters.
    """

    bucket_size: Optional[int] = None
    sharding_type: str = "fully_reshardable"
    expert_parallel: int = 0
    fp32: Optional[Tuple[str, ...]] = None
    frozen: Tuple[str, ...] = ()
    sizes: Tuple[Tuple[str, Tuple[int, ...]], ...] = tuple(SIZES.items())
    mem_efficient: bool = False

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if self.fp32 is None or name in self.fp32 else torch.bfloat16


def initial(case: Case) -> Dict[str, torch.Tensor]:
    """All parameters; those of the experts with the experts as first dimension."""
    shapes = dict(case.sizes)
    if case.expert_parallel:
        shapes |= {name: (NUM_EXPERTS, *shape) for name, shape in EXPERT_SIZES.items()}
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=generator).to(case.dtype(name))
        for name, shape in shapes.items()
    }


def gradients(case: Case, step: int) -> Dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {
        name: torch.randn(value.shape, generator=generator) for name, value in initial(case).items()
    }


def reference(case: Case, steps: int = STEPS) -> Dict[str, Dict[str, torch.Tensor]]:
    """PyTorch's Adam in fp32: name -> param, exp_avg, exp_avg_sq."""
    parameters = {
        name: torch.nn.Parameter(value.float())
        for name, value in initial(case).items()
        if name not in case.frozen
    }
    adam = torch.optim.AdamW(parameters.values(), lr=LR, betas=BETAS, eps=EPS, weight_decay=0)
    for step in range(steps):
        for name, parameter in parameters.items():
            parameter.grad = gradients(case, step)[name]
        adam.step()
    return {
        name: {
            "param": parameter.detach(),
            **{key: adam.state[parameter][key] for key in ("exp_avg", "exp_avg_sq")},
        }
        for name, parameter in parameters.items()
    }


class OddModel(MegatronModule):
    def __init__(self, config, case: Case):
        super().__init__(config)
        self.experts = slice(None)
        if case.expert_parallel:
            local = NUM_EXPERTS // parallel_state.get_expert_model_parallel_world_size()
            first = local * parallel_state.get_expert_model_parallel_rank()
            self.experts = slice(first, first + local)
        for name, value in initial(case).items():
            is_expert = name in EXPERT_SIZES
            value = (value[self.experts] if is_expert else value).clone()
            parameter = torch.nn.Parameter(value, requires_grad=name not in case.frozen)
            # As the layers of experts mark theirs.
            parameter.allreduce = not (is_expert and case.expert_parallel > 1)
            self.register_parameter(name, parameter)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        ep_rank = parallel_state.get_expert_model_parallel_rank()
        ep_size = parallel_state.get_expert_model_parallel_world_size()
        state = {}
        for name, parameter in self.named_parameters():
            if name in EXPERT_SIZES:
                offsets = ((0, ep_rank, ep_size),)
                replica = parallel_state.get_expert_data_parallel_rank()
            else:
                offsets = ()
                replica = parallel_state.get_data_parallel_rank()
            state[prefix + name] = ShardedTensor.from_rank_offsets(
                prefix + name, parameter, *offsets, replica_id=(0, 0, replica)
            )
        return state


def build(case: Case):
    """Returns (model wrapped by DDP, optimizer) on the default process group's ranks."""
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            expert_model_parallel_size=case.expert_parallel or 1, create_gloo_process_groups=True
        )
    config = TransformerConfig(
        num_layers=1,
        hidden_size=4,
        num_attention_heads=1,
        use_cpu_initialization=True,
        expert_model_parallel_size=case.expert_parallel or 1,
        num_moe_experts=NUM_EXPERTS if case.expert_parallel else None,
    )
    model = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            overlap_grad_reduce=case.bucket_size is not None,
            bucket_size=case.bucket_size,
            grad_reduce_in_fp32=True,
        ),
        OddModel(config, case),
    )
    bf16 = case.fp32 is not None
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            lr=LR,
            weight_decay=0.0,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_eps=EPS,
            clip_grad=0.0,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=True,
        ),
        [model],
    )
    for group in optimizer.param_groups:
        group["lr"] = LR
    return model, optimizer


def train(case: Case, model, optimizer, first: int = 0, steps: int = STEPS) -> None:
    """Steps with the gradients that every rank has, which need no reduction."""
    for step in range(first, first + steps):
        values = gradients(case, step)
        for name, parameter in model.module.named_parameters():
            if parameter.requires_grad:
                value = values[name]
                value = value[model.module.experts] if name in EXPERT_SIZES else value
                parameter.main_grad.copy_(value)
        optimizer.step()


def content_metadata(case: Case) -> dict:
    return {
        "distrib_optim_sharding_type": case.sharding_type,
        "distrib_optim_fully_reshardable_mem_efficient": case.mem_efficient,
        "chained_optim_avoid_prefix": True,
    }


def sharded_state(case: Case, model, optimizer, is_loading: bool) -> dict:
    model_state = model.module.sharded_state_dict()
    return {
        "model": model_state,
        "optimizer": optimizer.sharded_state_dict(
            model_state, is_loading=is_loading, metadata=content_metadata(case)
        ),
    }


def save(case: Case, directory: str) -> None:
    """Train and save; what a rank reads of uninitialised memory is NaN."""
    empty = torch.empty
    torch.empty = lambda *args, **kwargs: _poison(empty(*args, **kwargs))
    try:
        model, optimizer = build(case)
        train(case, model, optimizer)
        dist_checkpointing.save(sharded_state(case, model, optimizer, False), directory)
    finally:
        torch.empty = empty


def _poison(tensor):
    return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor


def load(case: Case, directory: str, further_steps: int = 0) -> dict:
    """Load, train on, and return what this rank has: name -> (global start, key -> flat values).

    The start is the element of the whole parameter, all experts, with which the values begin.
    """
    model, optimizer = build(case)
    state = dist_checkpointing.load(sharded_state(case, model, optimizer, True), directory)
    model.module.load_state_dict(state["model"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    train(case, model, optimizer, STEPS, further_steps)
    names = {parameter: name for name, parameter in model.module.named_parameters()}
    found = {}
    for part in optimizer.chained_optimizers:
        for parameter in part.model_param_gbuf_map:
            name = names[parameter]
            start = part._get_model_param_range_map(parameter)["param"].start
            if name in EXPERT_SIZES:
                start += model.module.experts.start * parameter[0].numel()
            tensors = part._get_main_param_and_optimizer_states(parameter)
            found[name] = (
                start,
                {
                    key: tensors[key].detach().float().clone()
                    for key in ("param", "exp_avg", "exp_avg_sq")
                },
            )
    return found


def assemble(case: Case, shards: list) -> Dict[str, Dict[str, torch.Tensor]]:
    """Whole parameters and moments out of what `load` returned on every rank; NaN: no rank had it."""
    whole = {
        name: {
            key: torch.full((value.numel(),), float("nan"))
            for key in ("param", "exp_avg", "exp_avg_sq")
        }
        for name, value in initial(case).items()
        if name not in case.frozen
    }
    for found in shards:
        for name, (start, tensors) in found.items():
            for key, tensor in tensors.items():
                whole[name][key][start : start + tensor.numel()] = tensor
    return whole
