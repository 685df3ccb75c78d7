# Copyright (c) 2026, the megatron-core gptoss authors.

"""The planner's bytes against real objects: saved tensors, weights, buffers, optimizer.

On the CPU, which differs from a GPU in the norms, which PyTorch decomposes here.
"""

import dataclasses

import pytest
import torch

from megatron.gpt_oss.planner.layout import Layout, Recompute
from megatron.gpt_oss.planner.memory import StageActivations, optimizer_memory, stage_memory
from megatron.gpt_oss.planner.parameters import rank_parameters
from megatron.gpt_oss.presets import get_preset
from tests.harness.live_memory import balanced_routing

# No two sizes alike; small, so that activations are not hidden by what a process has anyway.
ODD = dataclasses.replace(
    get_preset("tiny", 3),
    hidden_size=160,
    num_attention_heads=8,
    num_query_groups=2,
    head_dim=32,
    moe_ffn_hidden_size=208,
    vocab_size=384,
    sliding_window=24,
)


def _layout(world_size=1, policy="fast", **sizes):
    # A model without DDP has no main_grad, to which the loss in chunks would add.
    chunk, grad_bytes = (0, 4) if policy == "fast" else (64, 2)
    options = dict(seq_length=256, micro_batch_size=2, global_batch_size=64, grad_bytes=grad_bytes)
    options |= dict(sequence_parallel=sizes.get("tp", 1) > 1, **sizes)
    return Layout(
        ODD, world_size, recompute=Recompute.from_policy(policy), loss_chunk=chunk, **options
    )


def _model_arguments(layout):
    recompute = layout.recompute
    return dict(
        tensor_model_parallel_size=layout.tp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        pipeline_model_parallel_size=layout.pp,
        sequence_parallel=layout.sequence_parallel,
        cp_comm_type=[layout.cp_comm_type],
        seq_length=layout.seq_length,
        bf16=True,
        moe_grouped_gemm=True,
        moe_router_force_load_balancing=True,
        recompute_granularity=recompute.granularity,
        recompute_modules=list(recompute.modules) or None,
        recompute_method=recompute.method,
        recompute_num_layers=recompute.num_layers if recompute.method else None,
        expert_fp8_recipe="rowwise" if layout.expert_fp8 else None,
    )


def _start(layout):
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
    )
    model_parallel_cuda_manual_seed(1)


def _builder(layout):
    from megatron.gpt_oss.layer_specs import model_config

    config = model_config(layout.preset, **_model_arguments(layout))
    config.finalize()
    return config.get_builder_cls()(config)


def saved_bytes(layout):
    """Bytes of the storages that autograd saves in a forward and loss, without weights."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.gpt_oss.training.output_processor import chunked_loss_processor

    _start(layout)
    model = _builder(layout).build_model(ProcessGroupCollection.use_mpu_process_groups())
    model = model.bfloat16().train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        copy_of_weight = tensor.dtype == torch.float8_e4m3fn and tensor.dim() == 3
        if storage.data_ptr() not in weights and not copy_of_weight:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    length = layout.seq_length // layout.cp
    ids = torch.randint(layout.preset.vocab_size, (layout.micro_batch_size, length))
    positions = torch.arange(length).expand_as(ids)
    options = {}
    if layout.loss_chunk:
        options["output_processor"] = chunked_loss_processor(layout.loss_chunk)
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with hooks, balanced_routing():
        losses = model(ids, positions, None, labels=ids, loss_mask=torch.ones(ids.shape), **options)
    assert losses.requires_grad
    return sum(saved.values())


def state_bytes(layout):
    """Bytes of weights, gradient buffers, and the optimizer's state of this rank."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.process_groups_config import ProcessGroupCollection

    _start(layout)
    model = _builder(layout).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(),
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=layout.grad_bytes == 4,
            use_distributed_optimizer=layout.distributed_optimizer,
        ),
        data_parallel_random_init=False,
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-4,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=layout.distributed_optimizer,
        ),
        model,
    )
    optimizer.step()
    chunk = model[0]
    state = 0
    for one in optimizer.chained_optimizers:
        for group in one.optimizer.param_groups:
            state += sum(p.numel() * p.element_size() for p in group["params"])
        for tensors in one.optimizer.state.values():
            state += sum(t.nbytes for t in tensors.values() if t.dim())
    buffers = chunk.buffers + chunk.expert_parallel_buffers
    return (
        sum(p.nbytes for p in chunk.parameters()),
        sum(buffer.grad_data.nbytes for buffer in buffers),
        state,
    )


SAVED = {
    "fast": _layout(),
    "balanced": _layout(policy="balanced"),
    "lean": _layout(policy="lean"),
    "one-sequence": _layout(micro_batch_size=1),
    "two-layers-of-three": dataclasses.replace(
        _layout(), recompute=Recompute("full", (), "block", 2)
    ),
    "two-layers-a-unit": dataclasses.replace(
        _layout(), recompute=Recompute("full", (), "uniform", 2)
    ),
    "recompute-moe": dataclasses.replace(_layout(), recompute=Recompute("selective", ("moe",))),
    "fp8": _layout(expert_fp8=True),
    "fp8-ep2-balanced": _layout(2, "balanced", ep=2, expert_fp8=True),
    "fp8-recompute-moe": dataclasses.replace(
        _layout(expert_fp8=True), recompute=Recompute("selective", ("moe",))
    ),
    "tp2-ep2": _layout(2, tp=2, ep=2),
    "tp2-etp2-balanced": _layout(2, "balanced", tp=2, etp=2),
    "tp2-lean": _layout(2, "lean", tp=2, ep=2),
    "cp2-all-gather-ep2": _layout(2, cp=2, ep=2, cp_comm_type="all_gather"),
    "cp2-ring": _layout(2, cp=2, cp_comm_type="p2p", micro_batch_size=1),
    "cp2-heads": _layout(2, cp=2, cp_comm_type="a2a"),
}


@pytest.mark.parametrize("case", SAVED)
def test_saved(ranks, case):
    """What autograd saves of a micro-batch."""
    layout = SAVED[case]
    measured = ranks.run(saved_bytes, layout, world_size=layout.gpus)
    measured = sum(measured) / len(measured)
    stage = StageActivations(layout, 0, device="cpu")
    tokens = 8 * stage.sizes.tokens
    expected = stage.saved + stage.head.saved + tokens
    assert expected == pytest.approx(measured, rel=0.005)


STATE = {
    "one-rank": _layout(),
    "one-rank-bf16-gradients": _layout(grad_bytes=2),
    "dp2": _layout(2),
    "dp2-replicated-optimizer": _layout(2, distributed_optimizer=False),
    "tp2-etp2": _layout(2, tp=2, etp=2),
    "tp2-ep2": _layout(2, tp=2, ep=2),
    "ep2": _layout(2, ep=2),
    "cp2": _layout(2, cp=2),
}


@pytest.mark.parametrize("case", STATE)
def test_weights_gradients_optimizer(ranks, case):
    """Exact but for the padding of buffers and shards that end within a bucket."""
    layout = STATE[case]
    measured = ranks.run(state_bytes, layout, world_size=layout.gpus)
    dense, expert = rank_parameters(layout, 0)
    memory = stage_memory(layout, 0)
    optimizer = optimizer_memory(layout, dense, expert).gpu
    assert {weights for weights, _, _ in measured} == {memory.parameters}
    for _, gradients, _ in measured:
        assert memory.gradients == pytest.approx(gradients, rel=2e-3)
    mean = sum(state for _, _, state in measured) / len(measured)
    assert optimizer == pytest.approx(mean, rel=2e-3)
