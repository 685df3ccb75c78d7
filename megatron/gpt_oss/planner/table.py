# Copyright (c) 2026, the megatron-core gptoss authors.

"""Plans as text: one row a layout, one breakdown, a command line."""

from typing import Sequence

from megatron.gpt_oss.planner.layout import Layout
from megatron.gpt_oss.planner.machines import Machines
from megatron.gpt_oss.planner.memory import BESIDE_TENSORS, GB, HOST_SHARE
from megatron.gpt_oss.planner.rates import Rates
from megatron.gpt_oss.planner.search import Plan, shown

SIZES = ("tp", "etp", "ep", "cp", "pp", "dp")
PARTS = ("parameters", "gradients", "optimizer", "activations", "logits", "step")
_SHORT = ("params", "grads", "optim", "activ", "logits", "step")


def plans_table(plans: Sequence[Plan], times: bool = True) -> str:
    """One aligned row a plan; memory in GB of 10^9 bytes."""
    on_host = any(plan.host for plan in plans)
    header = [*map(str.upper, SIZES), "memory", "optimizer", *_SHORT, "GB"]
    header += ["CPU GB", "fits"] if on_host else ["fits"]
    header += ["s/step", "tokens/s/GPU"] if times else []
    header.append("peak at")
    rows = [header]
    for plan in plans:
        layout, memory = plan.layout, plan.memory
        row = [str(getattr(layout, name)) for name in SIZES]
        row += [layout.policy(), _optimizer(layout)]
        row += [f"{getattr(memory, name) / GB:.1f}" for name in PARTS]
        row.append(f"{memory.total / GB:.1f}")
        row += [f"{plan.host / GB:.0f}"] if on_host else []
        row.append(_verdict(plan))
        if times:
            row += [f"{plan.time.total:.2f}", f"{plan.tokens_per_second:.0f}"]
        row.append(memory.moment)
        rows.append(row)
    return aligned(rows)


def _verdict(plan: Plan) -> str:
    if not plan.fits:
        return "no"
    return "yes" if plan.host_checked else "CPU?"


def _gb(size: float) -> str:
    return f"{size / GB:.2f} GB"


def aligned(rows: Sequence[Sequence[str]], header: bool = True) -> str:
    """Columns of equal width; what begins with a digit stands to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    numeric = [all(cell[:1].isdigit() for cell in column[header:]) for column in zip(*rows)]
    lines = (
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric)
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _optimizer(layout: Layout) -> str:
    where = "CPU" if layout.offload == 1 else f"{layout.offload:.0%} CPU" if layout.offload else ""
    return where or ("sharded" if layout.distributed_optimizer else "replicated")


def breakdown(
    plan: Plan, gpu_memory: float | None, machines: Machines, machine_memory: float | None = None
) -> str:
    """Memory and time of one plan, a line a part.

    Args:
        gpu_memory: bytes; None where the card is not known.
        machines: of the run. machine_memory: bytes of one; None where it is not known.
    """
    memory, layout = plan.memory, plan.layout
    held = [[name, _gb(getattr(memory, name))] for name in PARTS[:3]]
    held.append(["always", _gb(sum(getattr(memory, name) for name in PARTS[:3]))])
    if memory.host:
        held.append(["CPU memory", _gb(memory.host)])
    moments = sorted(memory.moments.items(), key=lambda item: -item[1])
    text = [
        shown(layout),
        f"\nMemory of the peak-memory rank (pipeline rank {memory.stage}):",
        aligned(held, header=False),
        "in addition, by phase:",
        aligned([[name, _gb(size)] for name, size in moments], header=False),
        f"Peak: {_gb(memory.total)}.",
    ]
    if gpu_memory is not None:
        left = gpu_memory - memory.total
        verdict = f"{_gb(left)} free" if left >= 0 else f"exceeded by {_gb(-left)}"
        text.append(
            f"The GPU has {_gb(gpu_memory)}: {verdict}. CUDA, NCCL and allocator fragmentation "
            f"take 3 to {BESIDE_TENSORS // GB} GB."
        )
    if plan.host:
        text.append(_on_the_host(plan.host, machines.gpus, machine_memory))
    spent = [[name, f"{seconds:.3f} s"] for name, seconds in vars(plan.time).items() if seconds]
    text += [
        f"\nLower bound of the time per step, {layout.microbatches} micro-batches of "
        f"{layout.micro_batch_size} x {layout.seq_length} tokens:",
        aligned([*spent, ["total", f"{plan.time.total:.3f} s"]], header=False),
        f"{plan.tokens_per_second:.0f} tokens/s/GPU",
    ]
    return "\n".join(text)


def _on_the_host(need: int, ranks: int, memory: float | None) -> str:
    text = f"The optimizer takes {_gb(need)} of CPU memory per machine ({ranks} ranks)"
    if memory is None:
        return f"{text}, which was not checked."
    room = HOST_SHARE * memory - need
    verdict = f"exceeded by {_gb(-room)}" if room < 0 else f"{_gb(room)} free"
    return f"{text}; this machine has {_gb(memory)}, {HOST_SHARE:.0%} usable: {verdict}."


def command_line(layout: Layout, machines: Machines) -> str:
    """The torchrun command of a layout, the same on each machine."""
    lines = machines.torchrun("pretrain_gpt_oss.py")
    lines += [f"    {flag}" for flag in layout.flags()]
    return " \\\n".join(lines)


def sources() -> str:
    """Where the rates come from, one line."""
    found = Rates().data["sources"].values()
    cards = sorted({source["gpu"] for source in found})
    return f"Rates of {', '.join(cards)}: " + ", ".join(source["file"] for source in found)
