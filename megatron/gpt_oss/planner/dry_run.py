# Copyright (c) 2026, the megatron-core gptoss authors.

"""pretrain_gpt_oss.py --dry-run: memory and time of exactly the flags given, and no training.

The flags go through Megatron's own validation; no process group is made, no model, no folder.
"""

import contextlib
import io
import logging
import os
from argparse import Namespace
from collections.abc import Iterator

import torch

from megatron.core.transformer.sink_attention import available_backends
from megatron.gpt_oss.arguments.flags import DRY_RUN
from megatron.gpt_oss.arguments.megatron_validation import validate_for_plan
from megatron.gpt_oss.arguments.run_spec import RunSpec
from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.planner.layout import Layout, Recompute
from megatron.gpt_oss.planner.machines import TORCHRUN, Machines, memory_of_this_machine
from megatron.gpt_oss.planner.memory import GB
from megatron.gpt_oss.planner.parameters import layer_parameters, stage_layers
from megatron.gpt_oss.planner.search import Wanted, plan_of
from megatron.gpt_oss.planner.table import breakdown, sources
from megatron.gpt_oss.presets import Preset

# What two layers of 20b and head took of TransformerEngine's 2.20.2 over the local route, by
# --fp8-recipe: peak memory without AdamW's state, time of forward and backward in the faster and the
# slower of two runs (benchmarks/results/te_layers_forward_backward_h100x2.json, te_layers_h100x2.json).
TE_OVER_LOCAL = {
    None: (1.08, 1.23, 2.13),
    "tensorwise": (1.22, 1.47, 1.85),
    "blockwise": (1.38, 1.36, 1.41),
}


def dry_run(spec: RunSpec) -> None:
    """Print on rank 0 what a run needs.

    Raises:
        UsageError: the command line cannot be run, or the planner does not know the model.
    """
    machines = _machines(spec)
    args = validated(spec, machines.ranks)
    if args.rank == 0:
        print(report(args, machines), flush=True)
        if (line := spec.untested_line()) is not None:
            print(line, flush=True)


def _machines(spec: RunSpec) -> Machines:
    """Those that --dry-run asks for, or torchrun's."""
    if spec.dry_run != TORCHRUN:
        return spec.dry_run
    ranks, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if "LOCAL_WORLD_SIZE" in os.environ and ranks % local == 0:
        return Machines(ranks // local, local)
    return Machines.guessed(ranks)


def validated(spec: RunSpec, gpus: int) -> Namespace:
    """The arguments of a run as on so many GPUs, and nothing printed.

    Raises:
        UsageError: they cannot be run.
    """
    with contextlib.redirect_stdout(io.StringIO()), _world_of(gpus):  # it prints every argument
        spec.args.rank, spec.args.world_size = int(os.environ["RANK"]), gpus
        logging.disable(logging.WARNING)
        try:
            return validate_for_plan(spec)
        finally:
            logging.disable(logging.NOTSET)


@contextlib.contextmanager
def _world_of(gpus: int) -> Iterator[None]:
    """The variables of a launcher of so many ranks, which Megatron's validation reads, too."""
    before = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    os.environ["WORLD_SIZE"] = str(gpus)
    for name in ("RANK", "LOCAL_RANK"):
        os.environ.setdefault(name, "0")
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def report(args: Namespace, machines: Machines | None = None) -> str:
    """The text of a dry run.

    Args:
        args: validated ones.
        machines: of its ranks; of eight GPUs by default.
    """
    machines = machines or Machines.guessed(args.world_size)
    layout = layout_of(args)
    if (problem := layout.problem()) is not None:
        raise UsageError(f"{DRY_RUN}: {problem}")
    memory = machine_memory = None
    if torch.cuda.is_available():
        memory = float(torch.cuda.get_device_properties(0).total_memory)
        machine_memory = memory_of_this_machine()
    backend = _backend(layout)
    wanted = Wanted(layout, memory or float("inf"), backend=backend, per_machine=machines.gpus)
    plan = plan_of(layout, wanted)
    text = f"{args.preset}, {args.num_layers} layers, {args.world_size} GPUs"
    text += f" ({machines})\n" if machines.count > 1 else "\n"
    text += f"{breakdown(plan, memory, machines, machine_memory)}\n"
    text += f"{sources()}; attention: {backend}."
    if left_out := not_counted(args):
        text += f"\nNot in these figures: {'; '.join(left_out)}."
    return text


def _backend(layout: Layout) -> str:
    """The attention kernels whose rates hold: FlashAttention 4 where it runs, or PyTorch's own."""
    preset = layout.preset
    heads = preset.num_attention_heads // layout.tp, preset.num_query_groups // layout.tp
    shape = (layout.seq_length, layout.micro_batch_size)
    if torch.cuda.is_available():
        query, key = ((*shape, number, preset.head_dim) for number in heads)
        if available_backends(query, key)["fa4"] is None:
            return "fa4"
    return "cudnn"


def layout_of(args: Namespace) -> Layout:
    """The planner's view of validated arguments.

    Raises:
        UsageError: the model has no experts.
    """
    if not args.num_experts:
        raise UsageError(f"{DRY_RUN} supports only MoE models. Give --preset or --num-experts.")
    preset = Preset(
        name=args.preset,
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups or args.num_attention_heads,
        head_dim=args.kv_channels,
        num_experts=args.num_experts,
        moe_ffn_hidden_size=args.moe_ffn_hidden_size or args.ffn_hidden_size,
        vocab_size=args.padded_vocab_size,
        seq_length=args.seq_length,
        num_experts_per_tok=args.moe_router_topk,
        sliding_window=args.window_size[0] + 1 if args.window_size else args.seq_length,
    )
    granularity = args.recompute_granularity
    modules = args.recompute_modules or (["core_attn"] if granularity == "selective" else [])
    full_layer = 1 if len(args.cp_comm_type) > 1 else 0
    return Layout(
        preset,
        args.world_size,
        tp=args.tensor_model_parallel_size,
        etp=args.expert_tensor_parallel_size or args.tensor_model_parallel_size,
        ep=args.expert_model_parallel_size,
        cp=args.context_parallel_size,
        pp=args.pipeline_model_parallel_size,
        virtual_stages=args.virtual_pipeline_model_parallel_size or 1,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        global_batch_size=args.global_batch_size,
        sequence_parallel=args.sequence_parallel,
        recompute=Recompute(
            granularity,
            tuple(modules) if granularity == "selective" else (),
            args.recompute_method if granularity == "full" else None,
            args.recompute_num_layers or 1,
        ),
        mlp_chunks=getattr(args, "mlp_chunks_for_training", None) or 1,
        loss_chunk=args.lm_loss_chunk_size,
        distributed_optimizer=args.use_distributed_optimizer,
        offload=args.optimizer_offload_fraction if args.optimizer_cpu_offload else 0.0,
        grad_bytes=4 if args.accumulate_allreduce_grads_in_fp32 else 2,
        overlap=args.overlap_grad_reduce and args.overlap_param_gather,
        cp_comm_type=args.cp_comm_type[full_layer],
    )


def not_counted(args: Namespace) -> list[str]:
    """What the flags ask for and the planner does not model, in a few words each."""
    found = {
        f"--transformer-impl {args.transformer_impl} (counted as local{_te_words(args)})": (
            args.transformer_impl != "local"
        ),
        "weights that are not bf16 (counted as --bf16)": not args.bf16,
        "SequentialMLP (counted as --moe-grouped-gemm)": not args.moe_grouped_gemm,
        "fully sharded weights": args.use_megatron_fsdp or args.use_torch_fsdp2,
        "uneven split of the layers over pipeline stages": any(
            getattr(args, name, None)
            for name in (
                "decoder_first_pipeline_num_layers",
                "decoder_last_pipeline_num_layers",
                "pipeline_model_parallel_layout",
                "account_for_embedding_in_pipeline_split",
                "account_for_loss_in_pipeline_split",
            )
        ),
        "tied embedding and output weights": not args.untie_embeddings_and_output_weights,
        f"--optimizer {args.optimizer} (counted as adam)": args.optimizer != "adam",
        "activations offloaded to CPU memory": bool(
            getattr(args, "fine_grained_activation_offloading", False)
            or getattr(args, "cpu_offloading", False)
        ),
        f"--moe-token-dispatcher-type {args.moe_token_dispatcher_type} (counted as alltoall)": (
            args.moe_token_dispatcher_type != "alltoall"
        ),
    }
    return [text for text, there in found.items() if there]


def _te_words(args: Namespace) -> str:
    """What TransformerEngine is known to take beyond the local route."""
    if args.transformer_impl != "transformer_engine":
        return ""
    words, recipe = "", None
    if args.fp8:
        recipe = getattr(args.fp8_recipe, "value", args.fp8_recipe)
        words = f"; the FP8 copies of the weights take {fp8_copies(layout_of(args)) / GB:.2f} GB"
    if recipe not in TE_OVER_LOCAL:
        return f"{words}; {recipe} was not measured"
    memory, fast, slow = TE_OVER_LOCAL[recipe]
    times = f"{fast:.2f} to {slow:.2f} times its time"
    return f"{words}; two layers of 20b took {memory:.2f} times its memory, {times}"


def fp8_copies(layout: Layout) -> int:
    """Bytes in which TransformerEngine keeps a step's FP8 weights: by rows and by columns.

    The router, embedding and head stay as they are; scales of blocks, 1/4096 of it, are left out.
    """
    tensors = dict(item for part in layer_parameters(layout) for item in part.items())
    weights = sum(
        size
        for name, size in tensors.items()
        if name.split("linear_")[-1] in ("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")
    )
    return 2 * weights * len(stage_layers(layout, 0))
