# Copyright (c) 2026, the megatron-core gptoss authors.

"""Plans as text: a table of layouts, the breakdown of one layout, a command line."""

from typing import Sequence

from megatron.gpt_oss.planner.layout import Layout
from megatron.gpt_oss.planner.machines import Machines
from megatron.gpt_oss.planner.memory import (
    CPU_MEMORY_SHARE,
    GB,
    MEMORY_PARTS,
    PHASE_NAMES,
    RESERVE,
)
from megatron.gpt_oss.planner.rates import ATTENTION, CONTEXT, EXPERTS, Rates
from megatron.gpt_oss.planner.search import Plan, describe
from megatron.gpt_oss.planner.time import TIME_NAMES
from megatron.gpt_oss.text_table import aligned

SIZES = ("tp", "etp", "ep", "cp", "pp", "dp")
# Columns of MEMORY_PARTS.
_SHORT = ("params", "grads", "optim", "activ", "logits", "step")


def plans_table(plans: Sequence[Plan], times: bool = True) -> str:
    """A row per plan; memory in GB of 10^9 bytes."""
    offloads = any(plan.cpu_memory for plan in plans)
    header = [*map(str.upper, SIZES), "memory", "optimizer", *_SHORT, "GB"]
    header += ["CPU GB", "fits"] if offloads else ["fits"]
    header += ["s/step", "tokens/s/GPU"] if times else []
    header.append("peak at")
    rows = [header]
    for plan in plans:
        layout, memory = plan.layout, plan.memory
        row = [str(getattr(layout, name)) for name in SIZES]
        row += [layout.policy(), _optimizer(layout)]
        row += [f"{getattr(memory, name) / GB:.1f}" for name in MEMORY_PARTS]
        row.append(f"{memory.total / GB:.1f}")
        row += [f"{plan.cpu_memory / GB:.0f}"] if offloads else []
        row.append(_verdict(plan))
        if times:
            row += [f"{plan.time.total:.2f}", f"{plan.tokens_per_second:.0f}"]
        row.append(PHASE_NAMES[memory.peak_phase])
        rows.append(row)
    return aligned(rows)


def _verdict(plan: Plan) -> str:
    if not plan.fits:
        return "no"
    return "yes" if plan.cpu_memory_checked else "CPU?"


def _gb(size: float) -> str:
    return f"{size / GB:.2f} GB"


def _optimizer(layout: Layout) -> str:
    where = "CPU" if layout.offload == 1 else f"{layout.offload:.0%} CPU" if layout.offload else ""
    return where or ("sharded" if layout.distributed_optimizer else "replicated")


def breakdown(
    plan: Plan, gpu_memory: float | None, machines: Machines, machine_memory: float | None = None
) -> str:
    """Memory and time of one plan.

    Args:
        gpu_memory: bytes; None: unknown.
        machine_memory: bytes of CPU memory of a machine; None: unknown.
    """
    text = [describe(plan.layout), "", *_memory_lines(plan)]
    if gpu_memory is not None:
        left = gpu_memory - plan.memory.total
        verdict = f"{_gb(left)} free" if left >= 0 else f"exceeded by {_gb(-left)}"
        text.append(
            f"The GPU has {_gb(gpu_memory)}: {verdict}. CUDA, NCCL and allocator fragmentation "
            f"take 3 to {RESERVE // GB} GB."
        )
    if plan.cpu_memory:
        text.append(_cpu_memory_line(plan.cpu_memory, machines.gpus, machine_memory))
    return "\n".join([*text, "", *_time_lines(plan)])


def _memory_lines(plan: Plan) -> list[str]:
    memory = plan.memory
    static = {name: getattr(memory, name) for name in ("parameters", "gradients", "optimizer")}
    static["always"] = sum(static.values())
    if memory.cpu_memory:
        static["CPU memory"] = memory.cpu_memory
    phases = {PHASE_NAMES[name]: phase.total for name, phase in memory.phases.present().items()}
    phases = dict(sorted(phases.items(), key=lambda item: -item[1]))
    return [
        f"Memory of the peak-memory rank (pipeline rank {memory.stage}):",
        aligned([[name, _gb(size)] for name, size in static.items()], header=False),
        "in addition, by phase:",
        aligned([[name, _gb(size)] for name, size in phases.items()], header=False),
        f"Peak: {_gb(memory.total)}.",
    ]


def _time_lines(plan: Plan) -> list[str]:
    layout = plan.layout
    parts = {TIME_NAMES[name]: seconds for name, seconds in vars(plan.time).items() if seconds}
    parts["total"] = plan.time.total
    return [
        f"Lower bound of the time per step, {layout.microbatches} micro-batches of "
        f"{layout.micro_batch_size} x {layout.seq_length} tokens:",
        aligned([[name, f"{seconds:.3f} s"] for name, seconds in parts.items()], header=False),
        f"{plan.tokens_per_second:.0f} tokens/s/GPU",
    ]


def _cpu_memory_line(need: int, ranks: int, memory: float | None) -> str:
    text = f"The optimizer takes {_gb(need)} of CPU memory per machine ({ranks} ranks)"
    if memory is None:
        return f"{text}, which was not checked."
    room = CPU_MEMORY_SHARE * memory - need
    verdict = f"exceeded by {_gb(-room)}" if room < 0 else f"{_gb(room)} free"
    return f"{text}; this machine has {_gb(memory)}, {CPU_MEMORY_SHARE:.0%} usable: {verdict}."


def command_line(layout: Layout, machines: Machines) -> str:
    """The torchrun command of a layout; it is the same on each machine."""
    lines = machines.torchrun("pretrain_gpt_oss.py")
    lines += [f"    {flag}" for flag in layout.flags()]
    return " \\\n".join(lines)


def sources() -> str:
    """The benchmark results from which the rates of a step come, in one line."""
    sources = Rates().data["sources"]
    found = [sources[name] for name in (ATTENTION, EXPERTS, CONTEXT)]
    cards = sorted({source["gpu"] for source in found})
    return f"Rates of {', '.join(cards)}: " + ", ".join(source["file"] for source in found)
