# Copyright (c) 2026, the megatron-core gptoss authors.

"""pretrain_gpt_oss.py --dry-run: memory and time of a command line.

The flags pass Megatron's validation. No process group, model or directory is created.
"""

import contextlib
import io
import logging
import os
from argparse import Namespace

import torch

from megatron.core.transformer.sink_attention import available_backends
from megatron.gpt_oss.arguments.flags import DRY_RUN
from megatron.gpt_oss.arguments.megatron_validation import validate_for_plan
from megatron.gpt_oss.arguments.run_spec import RunSpec
from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.planner.layout import Layout
from megatron.gpt_oss.planner.machines import TORCHRUN, Machines, this_machine_memory
from megatron.gpt_oss.planner.memory import GB
from megatron.gpt_oss.planner.parameters import layer_parameters, stage_layers
from megatron.gpt_oss.planner.rates import Rates
from megatron.gpt_oss.planner.search import PlanRequest, plan_layout
from megatron.gpt_oss.planner.table import breakdown, sources
from megatron.gpt_oss.training.launcher_variables import as_rank_of


def dry_run(spec: RunSpec) -> None:
    """Print memory and time of a run on rank 0.

    Raises:
        UsageError: the command line is invalid, or the planner does not support the model.
    """
    machines = _machines(spec)
    args = validated(spec, machines.ranks)
    if args.rank == 0:
        print(report(args, machines), flush=True)
        if (line := spec.untested_line()) is not None:
            print(line, flush=True)


def _machines(spec: RunSpec) -> Machines:
    """The machines that --dry-run names, or those of torchrun."""
    if spec.dry_run != TORCHRUN:
        return spec.dry_run
    ranks, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if "LOCAL_WORLD_SIZE" in os.environ and ranks % local == 0:
        return Machines(ranks // local, local)
    return Machines.guessed(ranks)


def validated(spec: RunSpec, gpus: int) -> Namespace:
    """Validate the arguments of a run for so many GPUs, without output.

    Raises:
        UsageError: Megatron or our checks reject them.
    """
    # Megatron prints every argument.
    with contextlib.redirect_stdout(io.StringIO()), as_rank_of(gpus):
        spec.args.rank, spec.args.world_size = int(os.environ["RANK"]), gpus
        logging.disable(logging.WARNING)
        try:
            return validate_for_plan(spec)
        finally:
            logging.disable(logging.NOTSET)


def report(args: Namespace, machines: Machines | None = None) -> str:
    """The text of a dry run.

    Args:
        args: validated arguments.
        machines: eight GPUs each by default.
    """
    machines = machines or Machines.guessed(args.world_size)
    layout = Layout.from_args(args)
    if (reason := layout.unsupported_reason()) is not None:
        raise UsageError(f"{DRY_RUN}: {reason}")
    memory = machine_memory = None
    if torch.cuda.is_available():
        memory = float(torch.cuda.get_device_properties(0).total_memory)
        machine_memory = this_machine_memory()
    backend = _backend(layout)
    request = PlanRequest(
        layout, memory or float("inf"), backend=backend, per_machine=machines.gpus
    )
    plan = plan_layout(layout, request)
    text = f"{args.preset}, {args.num_layers} layers, {args.world_size} GPUs"
    text += f" ({machines})\n" if machines.count > 1 else "\n"
    text += f"{breakdown(plan, memory, machines, machine_memory)}\n"
    text += f"{sources()}; attention: {backend}."
    if left_out := not_counted(args):
        text += f"\nNot in these figures: {'; '.join(left_out)}."
    return text


def _backend(layout: Layout) -> str:
    """The attention backend whose rates apply: FlashAttention 4 if it runs here, else cuDNN."""
    preset = layout.preset
    heads = preset.num_attention_heads // layout.tp, preset.num_query_groups // layout.tp
    shape = (layout.seq_length, layout.micro_batch_size)
    if torch.cuda.is_available():
        query, key = ((*shape, number, preset.head_dim) for number in heads)
        if available_backends(query, key)["fa4"] is None:
            return "fa4"
    return "cudnn"


def not_counted(args: Namespace) -> list[str]:
    """What the planner does not model of the given flags."""
    found = {
        f"--transformer-impl {args.transformer_impl} (counted as local{_te_words(args)})": (
            args.transformer_impl != "local"
        ),
        "the time that --fp8 saves (the memory counts it)": args.expert_fp8_recipe is not None,
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
    """Measured memory and time of TransformerEngine relative to the local layers."""
    if args.transformer_impl != "transformer_engine":
        return ""
    words, recipe = "", "bf16"
    if args.fp8:
        recipe = getattr(args.fp8_recipe, "value", args.fp8_recipe)
        words = (
            f"; the FP8 copies of the weights take {fp8_copies(Layout.from_args(args)) / GB:.2f} GB"
        )
    ratios = Rates().transformer_engine(recipe)
    if ratios is None:
        return f"{words}; {recipe} was not measured"
    fast, slow = ratios["time"]
    times = f"{fast:.2f} to {slow:.2f} times its time"
    return f"{words}; two layers of 20b took {ratios['memory']:.2f} times its memory, {times}"


def fp8_copies(layout: Layout) -> int:
    """Bytes of TransformerEngine's FP8 copies of the weights, rowwise and columnwise.

    The router, embedding and head are not copied; scales of blocks, 1/4096 of it, are not counted.
    """
    dense, expert = layer_parameters(layout)
    weights = sum(
        size
        for name, size in (dense | expert).items()
        if ".linear_" in name and name.endswith(".weight")
    )
    return 2 * weights * len(stage_layers(layout, 0))
