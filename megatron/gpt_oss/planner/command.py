# Copyright (c) 2026, the megatron-core gptoss authors.

"""`gptoss plan`: the layouts of a preset that fit a number of GPUs, their memory and time."""

import argparse
import json
from dataclasses import replace

from megatron.gpt_oss.arguments.recompute import POLICIES
from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.planner.layout import Layout
from megatron.gpt_oss.planner.machines import (
    PER_MACHINE,
    Machines,
    has_gpu,
    this_machine_memory,
)
from megatron.gpt_oss.planner.memory import CPU_MEMORY_SHARE, GB, card_memory, default_reserve
from megatron.gpt_oss.planner.search import Plan, PlanRequest, advice, all_plans
from megatron.gpt_oss.planner.table import command_line, plans_table, sources
from megatron.gpt_oss.presets import PRESETS, get_preset

# Default minimum of tokens per GPU and step, which keeps the share of the optimizer small.
TOKENS_PER_GPU = 65536
# Of any number of the command line.
_LARGEST = 10**9
BACKENDS = ("cudnn", "fa4", "aten_fa2")
_SIZES = {
    "tp": "tensor-model-parallel-size",
    "etp": "expert-tensor-parallel-size",
    "ep": "expert-model-parallel-size",
    "cp": "context-parallel-size",
    "pp": "pipeline-model-parallel-size",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `gptoss plan`."""
    parser.add_argument("--preset", required=True, metavar="NAME", help=", ".join(PRESETS))
    parser.add_argument("--preset-layers", type=int, metavar="N", help="override the depth")
    parser.add_argument("--gpus", type=int, required=True, metavar="N")
    parser.add_argument(
        "--gpu-memory",
        type=float,
        default=80.0,
        metavar="GB",
        help="memory in the name of the card; an H100 (80) has 84.9e9 bytes, an H200 (141) "
        "150.1e9; any other number is taken in units of 10^9 bytes",
    )
    parser.add_argument(
        "--gpu-reserve",
        type=float,
        metavar="GB",
        help="part of --gpu-memory for CUDA, NCCL and allocator fragmentation; by default 5 on one "
        "or two GPUs, 8 on more",
    )
    parser.add_argument(
        "--host-memory",
        type=float,
        metavar="GB",
        help="CPU memory of a machine, for an offloaded optimizer; by default that of this machine "
        f"if it has a GPU. The planner uses {CPU_MEMORY_SHARE:.0%} of it",
    )
    parser.add_argument("--seq-length", type=int, metavar="TOKENS", help="set by the preset")
    parser.add_argument("--micro-batch-size", type=int, default=1, metavar="N")
    parser.add_argument(
        "--global-batch-size",
        type=int,
        metavar="N",
        help=f"sequences per step; by default {TOKENS_PER_GPU} tokens per GPU, 1 at least",
    )
    parser.add_argument("--memory", choices=list(POLICIES), help="only this policy")
    for short, name in _SIZES.items():
        parser.add_argument(f"--{short}", f"--{name}", type=int, metavar="N", dest=short)
    parser.add_argument(
        "--offload",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="offload the optimizer to CPU memory; by default only if nothing else fits",
    )
    parser.add_argument("--grad-reduce-in-bf16", action="store_true", help="gradients in bf16")
    parser.add_argument(
        "--expert-load",
        type=float,
        default=1.0,
        metavar="X",
        help="load imbalance: routed tokens of the most loaded GPU over the mean",
    )
    parser.add_argument("--attention", choices=BACKENDS, default="cudnn", help="whose rates to use")
    parser.add_argument("--gpus-per-machine", type=int, default=PER_MACHINE, metavar="N")
    parser.add_argument("--rows", type=int, default=12, help="rows of the table; 0: all")
    parser.add_argument("--memory-only", action="store_true", help="omit times; sort by memory")
    parser.add_argument("--json", action="store_true", help="all layouts, in bytes and seconds")
    parser.set_defaults(run=run)


def request_from_args(args: argparse.Namespace) -> PlanRequest:
    """Check the flags.

    Raises:
        UsageError: a number is out of range, or the GPUs do not divide evenly over machines.
    """
    _check_numbers(args)
    Machines.of(args.gpus, args.gpus_per_machine)
    cpu_memory = args.host_memory * GB if args.host_memory is not None else None
    if cpu_memory is None and has_gpu():
        cpu_memory = this_machine_memory()
    reserve = _reserve(args)
    return PlanRequest(
        _base_layout(args),
        card_memory(args.gpu_memory) - reserve,
        **{name: getattr(args, name) for name in _SIZES},
        policy=args.memory,
        offload=args.offload,
        backend=args.attention,
        per_machine=args.gpus_per_machine,
        cpu_memory=cpu_memory,
        reserve=reserve,
    )


def _check_numbers(args: argparse.Namespace) -> None:
    names = ("gpus", "gpu_memory", "micro_batch_size", "expert_load", "gpus_per_machine")
    optional = ("seq_length", "global_batch_size", "host_memory", *_SIZES)
    for name in (*names, *optional):
        value = getattr(args, name)
        if value is not None and not 0 < value <= _LARGEST:
            raise UsageError(
                f"--{name.replace('_', '-')} {value}: expected more than 0, at most {_LARGEST:,}."
            )


def _reserve(args: argparse.Namespace) -> float:
    """Bytes of a GPU for CUDA, NCCL and fragmentation of the allocator."""
    reserve = default_reserve(args.gpus) if args.gpu_reserve is None else args.gpu_reserve * GB
    if not 0 <= reserve < card_memory(args.gpu_memory):
        raise UsageError(
            f"--gpu-memory {args.gpu_memory:g} leaves no memory for tensors: {reserve / GB:g} GB "
            "are reserved for CUDA, NCCL and allocator fragmentation (--gpu-reserve)."
        )
    return reserve


def _base_layout(args: argparse.Namespace) -> Layout:
    """The run without parallel sizes and policy."""
    preset = get_preset(args.preset, args.preset_layers)
    length = args.seq_length or preset.seq_length
    batch = args.global_batch_size
    if batch is None:
        unit = args.gpus * args.micro_batch_size
        batch = unit * max(1, -(-TOKENS_PER_GPU // (length * args.micro_batch_size)))
    return Layout(
        preset,
        args.gpus,
        seq_length=length,
        micro_batch_size=args.micro_batch_size,
        global_batch_size=batch,
        grad_bytes=2 if args.grad_reduce_in_bf16 else 4,
        expert_load=args.expert_load,
    )


def run(args: argparse.Namespace) -> None:
    """Print the plan.

    Raises:
        UsageError: no layout is possible, or none fits (after the table of the closest ones).
    """
    request = request_from_args(args)
    plans = all_plans(request)
    if not plans:
        raise UsageError(_impossible(request))
    if args.memory_only:
        plans.sort(key=lambda plan: (not plan.fits, plan.memory.total))
    if args.json:
        print(json.dumps(_as_json(args, request, plans), indent=1))
    else:
        print(_table_text(args, request, plans))
    if not any(plan.fits for plan in plans):
        raise UsageError(advice(request, plans))
    if not args.json:
        if not args.memory_only:
            print(f"\n{sources()}; attention: {args.attention}.")
        print("\n".join(["", *_notes(plans[0], request.machines)]))
        print(f"\n{command_line(plans[0].layout, request.machines)}")


def _table_text(args: argparse.Namespace, request: PlanRequest, plans: list[Plan]) -> str:
    base = request.base
    fitting = [plan for plan in plans if plan.fits]
    return (
        f"gpt-oss {args.preset}, {base.preset.num_layers} layers, on {base.gpus} x "
        f"{args.gpu_memory:g} GB, {base.global_batch_size} x {base.seq_length} tokens per "
        f"step: {_count(fitting, len(plans))}.\n\n"
        f"{plans_table(plans[: args.rows or None], times=not args.memory_only)}\n"
        "\nGB: peak memory of the peak-memory rank. Activations, logits and the optimizer step are\n"
        "the maximum of each; these maxima occur in different phases.\n"
        f"{request.gpu_memory / GB:.1f} GB are for tensors, {request.reserve / GB:g} for CUDA, NCCL "
        "and allocator fragmentation."
    )


def _count(fitting: list[Plan], total: int) -> str:
    """How many layouts fit, and how many more if the unknown CPU memory is sufficient."""
    unchecked = sum(not plan.cpu_memory_checked for plan in fitting)
    text = f"{len(fitting) - unchecked} of {total} layouts fit"
    if unchecked:
        text += f", {unchecked} more if a machine has enough CPU memory for the optimizer (CPU GB)"
    return text


def _notes(best: Plan, machines: Machines) -> list[str]:
    """Sentences above the command."""
    notes = []
    if not best.cpu_memory_checked:
        notes.append(
            f"The optimizer takes {best.cpu_memory / GB:.0f} GB of CPU memory on each machine, which was "
            "not checked: give --host-memory GB."
        )
    elif best.cpu_memory:
        notes.append(
            f"The optimizer takes {best.cpu_memory / GB:.0f} GB of CPU memory on each machine."
        )
    if machines.count > 1:
        notes.append(f"{machines}: run the same command on each machine.")
    notes.append(
        "Add data, weights and schedule: --data-path, --load-hf, --run-dir, --train-iters, --lr."
    )
    notes.append(
        "On any machine `python pretrain_gpt_oss.py` with these flags and "
        f"--dry-run {machines.as_if()} shows their memory and time."
    )
    return notes


def _as_json(args: argparse.Namespace, request: PlanRequest, plans: list[Plan]) -> dict:
    rows = [plan.as_dict() for plan in plans]
    if args.memory_only:
        for row in rows:
            del row["seconds"], row["tokens_per_second_per_gpu"]
    best = rows[0] if plans[0].fits else None
    return {
        "preset": args.preset,
        "gpu_memory": request.gpu_memory,
        "machines": vars(request.machines),
        "best": best,
        "command": command_line(plans[0].layout, request.machines) if best else None,
        "layouts": rows,
    }


def _impossible(request: PlanRequest) -> str:
    """The error if no layout is possible with the given sizes."""
    given = {name: getattr(request, name) or 1 for name in _SIZES}
    unsupported = replace(request.base, **given).unsupported_reason()
    shown = " ".join(f"--{name} {size}" for name, size in given.items() if size > 1)
    reason = unsupported or (
        f"no layout of {request.base.gpus} GPUs is compatible with a global batch of "
        f"{request.base.global_batch_size}."
    )
    return f"No layout is possible{' with ' + shown if shown else ''}: {reason}"
