# Copyright (c) 2026, the megatron-core gptoss authors.

"""`gptoss plan`: which layouts of a preset fit some GPUs, and what a step takes."""

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
    memory_of_this_machine,
)
from megatron.gpt_oss.planner.memory import GB, HOST_SHARE, beside_tensors, card_memory
from megatron.gpt_oss.planner.search import Wanted, advice, all_plans
from megatron.gpt_oss.planner.table import command_line, plans_table, sources
from megatron.gpt_oss.presets import PRESETS, get_preset

# Tokens a GPU that a step has at least by default: the optimizer's time is then small.
TOKENS_PER_GPU = 65536
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
        f"if it has a GPU. The planner uses {HOST_SHARE:.0%} of it",
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


def wanted_of(args: argparse.Namespace) -> Wanted:
    """What a command line asks for.

    Raises:
        UsageError: a number is out of range, or the GPUs do not spread evenly over machines.
    """
    names = ("gpus", "gpu_memory", "micro_batch_size", "expert_load", "gpus_per_machine")
    optional = ("seq_length", "global_batch_size", "host_memory", *_SIZES)
    for name in (*names, *optional):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            wrong = "positive" if value <= 0 else "a finite number"
            raise UsageError(f"--{name.replace('_', '-')} {value} is not {wrong}.")
    reserve = beside_tensors(args.gpus) if args.gpu_reserve is None else args.gpu_reserve * GB
    memory = card_memory(args.gpu_memory)
    if not 0 <= reserve < memory:
        raise UsageError(
            f"--gpu-memory {args.gpu_memory:g} leaves no memory for tensors: {reserve / GB:g} GB "
            "are reserved for CUDA, NCCL and allocator fragmentation (--gpu-reserve)."
        )
    Machines.of(args.gpus, args.gpus_per_machine)
    host = args.host_memory * GB if args.host_memory is not None else None
    if host is None and has_gpu():
        host = memory_of_this_machine()
    preset = get_preset(args.preset, args.preset_layers)
    length = args.seq_length or preset.seq_length
    batch = args.global_batch_size
    if batch is None:
        unit = args.gpus * args.micro_batch_size
        batch = unit * max(1, -(-TOKENS_PER_GPU // (length * args.micro_batch_size)))
    base = Layout(
        preset,
        args.gpus,
        seq_length=length,
        micro_batch_size=args.micro_batch_size,
        global_batch_size=batch,
        grad_bytes=2 if args.grad_reduce_in_bf16 else 4,
        expert_load=args.expert_load,
    )
    return Wanted(
        base,
        memory - reserve,
        **{name: getattr(args, name) for name in _SIZES},
        policy=args.memory,
        offload=args.offload,
        backend=args.attention,
        per_machine=args.gpus_per_machine,
        host_memory=host,
        reserve=reserve,
    )


def run(args: argparse.Namespace) -> None:
    """Print the plan.

    Raises:
        UsageError: no layout is possible, or none fits (after the table of the nearest).
    """
    wanted = wanted_of(args)
    plans = all_plans(wanted)
    if not plans:
        raise UsageError(_impossible(wanted))
    if args.memory_only:
        plans.sort(key=lambda plan: (not plan.fits, plan.memory.total))
    fitting = [plan for plan in plans if plan.fits]
    if args.json:
        print(json.dumps(_as_json(args, wanted, plans), indent=1))
    else:
        base = wanted.base
        print(
            f"gpt-oss {args.preset}, {base.preset.num_layers} layers, on {base.gpus} x "
            f"{args.gpu_memory:g} GB, {base.global_batch_size} x {base.seq_length} tokens per "
            f"step: {_count(fitting, len(plans))}.\n"
        )
        print(plans_table(plans[: args.rows or None], times=not args.memory_only))
        print(
            "\nGB: peak memory of the peak-memory rank. Activations, logits and the optimizer step are\n"
            "the maximum of each; these maxima occur in different phases.\n"
            f"{wanted.gpu_memory / GB:.1f} GB are for tensors, {wanted.reserve / GB:g} for CUDA, NCCL and "
            "allocator fragmentation."
        )
    if not fitting:
        raise UsageError(advice(wanted, plans))
    if not args.json:
        if not args.memory_only:
            print(f"\n{sources()}; attention: {args.attention}.")
        print("\n".join(["", *_notes(plans[0], wanted.machines)]))
        print(f"\n{command_line(plans[0].layout, wanted.machines)}")


def _count(fitting, total: int) -> str:
    """How many layouts fit, and how many of them only if the host does."""
    unchecked = sum(not plan.host_checked for plan in fitting)
    text = f"{len(fitting) - unchecked} of {total} layouts fit"
    if unchecked:
        text += f", {unchecked} more if a machine has enough CPU memory for the optimizer (CPU GB)"
    return text


def _notes(best, machines: Machines) -> list[str]:
    """What stands above the command, a sentence a line."""
    notes = []
    if not best.host_checked:
        notes.append(
            f"The optimizer takes {best.host / GB:.0f} GB of CPU memory on each machine, which was "
            "not checked: give --host-memory GB."
        )
    elif best.host:
        notes.append(f"The optimizer takes {best.host / GB:.0f} GB of CPU memory on each machine.")
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


def _as_json(args: argparse.Namespace, wanted: Wanted, plans) -> dict:
    rows = [plan.as_dict() for plan in plans]
    if args.memory_only:
        for row in rows:
            del row["seconds"], row["tokens_per_second_per_gpu"]
    best = rows[0] if plans[0].fits else None
    return {
        "preset": args.preset,
        "gpu_memory": wanted.gpu_memory,
        "machines": vars(wanted.machines),
        "best": best,
        "command": command_line(plans[0].layout, wanted.machines) if best else None,
        "layouts": rows,
    }


def _impossible(wanted: Wanted) -> str:
    """Why not a single layout can be made of what is given."""
    given = {name: getattr(wanted, name) or 1 for name in _SIZES}
    problem = replace(wanted.base, **given).problem()
    shown = " ".join(f"--{name} {size}" for name, size in given.items() if size > 1)
    reason = problem or (
        f"no layout of {wanted.base.gpus} GPUs is compatible with a global batch of "
        f"{wanted.base.global_batch_size}."
    )
    return f"No layout is possible{' with ' + shown if shown else ''}: {reason}"
