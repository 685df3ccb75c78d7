# Copyright (c) 2026, the megatron-core gptoss authors.

"""`gptoss plan`: which layouts of a preset fit some GPUs, and what a step takes."""

import argparse
import json
from dataclasses import replace

from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.memory_policy import POLICIES
from megatron.gpt_oss.plan.layout import Layout
from megatron.gpt_oss.plan.memory import GB
from megatron.gpt_oss.plan.search import Wanted, advice, all_plans
from megatron.gpt_oss.plan.table import command_line, plans_table, sources
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
    parser.add_argument("--preset-layers", type=int, metavar="N", help="another depth")
    parser.add_argument("--gpus", type=int, required=True, metavar="N")
    parser.add_argument(
        "--gpu-memory",
        type=float,
        default=80.0,
        metavar="GB",
        help="of 10^9 bytes, for tensors: the number in the card's name leaves CUDA and NCCL 5 GB "
        "on an 80 GB H100; several GPUs may want 8, so that 77 is safe there",
    )
    parser.add_argument("--seq-length", type=int, metavar="TOKENS", help="the preset's by default")
    parser.add_argument("--micro-batch-size", type=int, default=1, metavar="N")
    parser.add_argument(
        "--global-batch-size",
        type=int,
        metavar="N",
        help=f"sequences a step; by default {TOKENS_PER_GPU} tokens a GPU, one sequence at least",
    )
    parser.add_argument("--memory", choices=list(POLICIES), help="only this policy")
    for short, name in _SIZES.items():
        parser.add_argument(f"--{short}", f"--{name}", type=int, metavar="N", dest=short)
    parser.add_argument(
        "--offload",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="the optimizer on the host; where nothing else fits by default",
    )
    parser.add_argument("--grad-reduce-in-bf16", action="store_true", help="gradients in bf16")
    parser.add_argument(
        "--expert-load",
        type=float,
        default=1.0,
        metavar="X",
        help="tokens of the busiest GPU's experts over the mean",
    )
    parser.add_argument("--attention", choices=BACKENDS, default="cudnn", help="whose rates")
    parser.add_argument("--gpus-per-machine", type=int, default=8, metavar="N")
    parser.add_argument("--rows", type=int, default=12, help="of the table; 0: all")
    parser.add_argument("--memory-only", action="store_true", help="no times; the leanest first")
    parser.add_argument("--json", action="store_true", help="all layouts, in bytes and seconds")
    parser.set_defaults(run=run)


def wanted_of(args: argparse.Namespace) -> Wanted:
    """What a command line asks for.

    Raises:
        UsageError: a number is out of range.
    """
    names = ("gpus", "gpu_memory", "micro_batch_size", "expert_load", "gpus_per_machine")
    optional = ("seq_length", "global_batch_size", *_SIZES)
    for name in (*names, *optional):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UsageError(f"--{name.replace('_', '-')} {value} is not positive.")
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
        args.gpu_memory * GB,
        **{name: getattr(args, name) for name in _SIZES},
        policy=args.memory,
        offload=args.offload,
        backend=args.attention,
        per_machine=args.gpus_per_machine,
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
        plans.sort(key=lambda plan: plan.memory.total)
    fitting = [plan for plan in plans if plan.fits]
    if args.json:
        print(json.dumps(_as_json(args, plans), indent=1))
    else:
        base = wanted.base
        print(
            f"gpt-oss {args.preset}, {base.preset.num_layers} layers, on {base.gpus} x "
            f"{args.gpu_memory:g} GB, {base.global_batch_size} x {base.seq_length} tokens a step: "
            f"{len(fitting)} of {len(plans)} layouts fit.\n"
        )
        print(plans_table(plans[: args.rows or None], times=not args.memory_only))
        print(
            "\nGB of the fullest GPU at its fullest moment: activations, logits and the optimizer's "
            "step are\nthe most that each takes, not at the same moment."
        )
    if not fitting:
        nearest = min(plans, key=lambda plan: plan.memory.total)
        raise UsageError(advice(wanted, nearest))
    if not args.json:
        if not args.memory_only:
            print(f"\n{sources()}; attention: {args.attention}.")
        print(f"\n{command_line(plans[0].layout)}")


def _as_json(args: argparse.Namespace, plans) -> dict:
    rows = [plan.as_dict() for plan in plans]
    if args.memory_only:
        for row in rows:
            del row["seconds"], row["tokens_per_second_per_gpu"]
    best = rows[0] if rows[0]["fits"] else None
    return {
        "preset": args.preset,
        "gpu_memory": args.gpu_memory * GB,
        "best": best,
        "command": command_line(plans[0].layout) if best else None,
        "layouts": rows,
    }


def _impossible(wanted: Wanted) -> str:
    """Why not a single layout can be made of what is given."""
    given = {name: getattr(wanted, name) or 1 for name in _SIZES}
    problem = replace(wanted.base, **given).problem()
    shown = " ".join(f"--{name} {size}" for name, size in given.items() if size > 1)
    reason = problem or (
        f"no split of {wanted.base.gpus} GPUs goes with a global batch of "
        f"{wanted.base.global_batch_size}."
    )
    return f"No layout is possible{' with ' + shown if shown else ''}: {reason}"
