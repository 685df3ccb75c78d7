# Copyright (c) 2026, the megatron-core gptoss authors.

"""Search over the layouts of a model on some GPUs."""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Iterator

from megatron.gpt_oss.arguments.recompute import POLICIES
from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.planner.deprecated import with_old_keys
from megatron.gpt_oss.planner.layout import Layout, Recompute, loss_chunk_of
from megatron.gpt_oss.planner.machines import PER_MACHINE, Machines
from megatron.gpt_oss.planner.memory import (
    CPU_MEMORY_SHARE,
    GB,
    MEMORY_PARTS,
    PHASE_NAMES,
    Memory,
    peak_rank_memory,
    rank_cpu_memory,
)
from megatron.gpt_oss.planner.rates import Rates
from megatron.gpt_oss.planner.time import StepTime, step_time


@dataclass(frozen=True)
class PlanRequest:
    """What `gptoss plan` searches for; None for a parallel size: try all.

    Attributes:
        base: model, GPUs, lengths and all other options of the run.
        gpu_memory: bytes of a GPU for tensors.
        policy: of --memory; None: try all.
        offload: offload the optimizer; None: only if a layout does not fit otherwise.
        backend: of attention.
        per_machine: GPUs of a machine, connected by NVLink.
        cpu_memory: bytes of a machine; None: unknown.
        reserve: bytes of a GPU that are not for tensors.
    """

    base: Layout
    gpu_memory: float
    tp: int | None = None
    etp: int | None = None
    ep: int | None = None
    cp: int | None = None
    pp: int | None = None
    policy: str | None = None
    offload: bool | None = None
    backend: str = "cudnn"
    per_machine: int = PER_MACHINE
    cpu_memory: float | None = None
    reserve: float = 0.0

    @property
    def machines(self) -> Machines:
        """Machines of the GPUs; if they do not divide evenly, those of a dry run."""
        try:
            return Machines.of(self.base.gpus, self.per_machine)
        except UsageError:
            return Machines.guessed(self.base.gpus)


@dataclass(frozen=True)
class Plan:
    """A layout, its memory and its time.

    Attributes:
        cpu_memory: bytes of a machine that the offloaded optimizer takes.
        fits: the GPU's memory is sufficient, and the machine's if known.
        cpu_memory_checked: whether the machine's memory is known or not needed.
    """

    layout: Layout
    memory: Memory
    time: StepTime
    cpu_memory: int
    fits: bool
    cpu_memory_checked: bool

    @property
    def tokens_per_second(self) -> float:
        """Tokens/s/GPU."""
        layout = self.layout
        tokens = layout.global_batch_size * layout.seq_length
        return tokens / self.time.total / layout.gpus

    def as_dict(self) -> dict:
        """Entries for JSON, in bytes and seconds."""
        layout = self.layout
        sizes = ("gpus", "tp", "etp", "ep", "cp", "pp", "dp")
        rest = ("seq_length", "micro_batch_size", "global_batch_size", "microbatches")
        plan = {
            "layout": {name: getattr(layout, name) for name in sizes + rest},
            "memory_policy": layout.policy(),
            "distributed_optimizer": layout.distributed_optimizer,
            "optimizer_offload": layout.offload,
            "memory": self.memory.as_dict(),
            "fits": self.fits if self.cpu_memory_checked or not self.fits else None,
            "cpu_memory_per_machine": self.cpu_memory,
            "seconds": {**vars(self.time), "total": self.time.total},
            "tokens_per_second_per_gpu": self.tokens_per_second,
            "flags": layout.flags(),
        }
        return with_old_keys(plan)


def plan_layout(layout: Layout, request: PlanRequest, rates: Rates | None = None) -> Plan:
    """Compute memory and time of one layout."""
    memory = peak_rank_memory(layout)
    machines = request.machines
    time = step_time(layout, rates, request.backend, machines)
    cpu_memory = rank_cpu_memory(layout) * machines.gpus
    fits = memory.total <= request.gpu_memory and _cpu_excess(cpu_memory, request) <= 0
    checked = not cpu_memory or request.cpu_memory is not None
    return Plan(layout, memory, time, cpu_memory, fits, checked)


def _cpu_excess(needed: int, request: PlanRequest) -> float:
    """Bytes by which the optimizer exceeds a machine's CPU memory; negative if it fits."""
    if request.cpu_memory is None:
        return -1
    return needed - CPU_MEMORY_SHARE * request.cpu_memory


def all_plans(request: PlanRequest) -> list[Plan]:
    """Plan every useful layout with each policy of --memory.

    Returns:
        First the layouts that fit, by time, those with an offloaded optimizer last because its
        rates are assumed; then the others, by memory. The optimizer is offloaded only where a
        layout does not fit otherwise.
    """
    rates = Rates()
    plans = []
    for layout in layouts(request):
        plan = plan_layout(layout, request, rates)
        if request.offload is not True:
            plans.append(plan)
        if request.offload or (request.offload is None and not plan.fits):
            plans.append(plan_layout(replace(layout, offload=1.0), request, rates))

    def order(plan: Plan) -> tuple:
        if plan.fits:
            return 0, plan.layout.offload > 0, plan.time.total
        return 1, False, plan.memory.total

    return sorted(plans, key=order)


def layouts(request: PlanRequest) -> Iterator[Layout]:
    """The layouts to plan, without offload.

    Tensor parallelism stays within a machine, experts are not split or split like the other
    layers, and the optimizer state is sharded over all ranks that would hold copies.
    """
    base = request.base
    policies = [request.policy] if request.policy else list(POLICIES)
    sizes = _parallel_sizes(request)
    for values in itertools.product(*sizes.values()):
        size = dict(zip(sizes, values))
        if request.etp is None and size["etp"] not in (1, size["tp"]):
            continue
        layout = replace(base, **size, sequence_parallel=size["tp"] > 1)
        if layout.unsupported_reason() is None:
            yield from (_with_policy(layout, name) for name in policies)


def _parallel_sizes(request: PlanRequest) -> dict[str, list[int]]:
    """Sizes to try by field of Layout: the given one, or all that can divide the GPUs."""
    gpus, num_layers = request.base.gpus, request.base.preset.num_layers
    powers = [2**i for i in range(gpus.bit_length()) if gpus % 2**i == 0]
    stages = [n for n in range(1, gpus + 1) if gpus % n == 0 and num_layers % n == 0]
    tensor = [request.tp] if request.tp else [n for n in powers if request.machines.holds(n)]
    return {
        "tp": tensor,
        "cp": [request.cp] if request.cp else powers,
        "pp": [request.pp] if request.pp else stages,
        "etp": [request.etp] if request.etp else sorted({1, *tensor}),
        "ep": [request.ep] if request.ep else powers,
    }


def _with_policy(layout: Layout, name: str) -> Layout:
    return replace(layout, recompute=Recompute.from_policy(name), loss_chunk=loss_chunk_of(name))


def advice(request: PlanRequest, plans: list[Plan]) -> str:
    """The error if no layout fits: how much the closest one lacks, and what would help."""

    def excess(plan: Plan) -> tuple[float, float]:
        """Bytes that a GPU lacks, and that a machine's CPU memory lacks."""
        return (
            max(0.0, plan.memory.total - request.gpu_memory),
            max(0.0, _cpu_excess(plan.cpu_memory, request)),
        )

    closest = min(plans, key=lambda plan: sum(excess(plan)))
    missing = _missing_memory(closest, request, *excess(closest))
    changes = [*_larger_machines(closest, request, *excess(closest)), *_other_runs(request)]
    return (
        f"No layout fits. The closest ({describe(closest.layout)}) needs {missing}. "
        f"Possible changes: {'; or '.join(changes)}."
    )


def _missing_memory(plan: Plan, request: PlanRequest, gpu: float, cpu: float) -> str:
    parts = []
    if gpu:
        parts.append(
            f"{plan.memory.total / GB:.1f} GB per GPU, {gpu / GB:.1f} GB more than the "
            f"{request.gpu_memory / GB:.1f} GB for tensors, mainly {largest_part(plan.memory)}; "
            f"peak at: {PHASE_NAMES[plan.memory.peak_phase]}"
        )
    if cpu:
        parts.append(
            f"{plan.cpu_memory / GB:.0f} GB of CPU memory per machine for the optimizer, more "
            f"than {CPU_MEMORY_SHARE:.0%} of {request.cpu_memory / GB:.0f} GB"
        )
    return " and ".join(parts)


def _larger_machines(plan: Plan, request: PlanRequest, gpu: float, cpu: float) -> list[str]:
    changes = []
    if gpu:
        changes.append(f"GPUs of {math.ceil((plan.memory.total + request.reserve) / GB)} GB")
    if cpu:
        needed = math.ceil(plan.cpu_memory / CPU_MEMORY_SHARE / GB)
        changes.append(f"machines with {needed} GB of memory")
    return changes


def _other_runs(request: PlanRequest) -> list[str]:
    """Changes of GPUs or flags with which some layout fits."""
    base = request.base
    changes = []
    for factor in (2, 4, 8, 16, 32):
        gpus = base.gpus * factor
        more = replace(base, gpus=gpus, global_batch_size=base.global_batch_size * factor)
        even = gpus % -(-gpus // request.per_machine) == 0
        if even and _any_fits(replace(request, base=more)):
            changes.append(f"{gpus} GPUs")
            break
    if base.grad_bytes == 4 and _any_fits(replace(request, base=replace(base, grad_bytes=2))):
        changes.append("--grad-reduce-in-bf16")
    length = base.seq_length // 2
    while length >= 1024:
        if _any_fits(replace(request, base=replace(base, seq_length=length))):
            changes.append(f"--seq-length {length}")
            break
        length //= 2
    if given := _given_flags(request):
        changes.append(f"dropping {', '.join(given)}")
    return changes


def _given_flags(request: PlanRequest) -> list[str]:
    flags = [f"--{name}" for name in ("tp", "etp", "ep", "cp", "pp") if getattr(request, name)]
    if request.policy is not None:
        flags.append("--memory")
    if request.offload is False:
        flags.append("--no-offload")
    return flags


def _any_fits(request: PlanRequest) -> bool:
    gpus = request.machines.gpus
    offloads = {None: (1.0, 0.0), False: (0.0,), True: (1.0,)}[request.offload]
    for layout, offload in itertools.product(layouts(request), offloads):
        tried = replace(layout, offload=offload)
        if _cpu_excess(rank_cpu_memory(tried) * gpus, request) > 0:
            continue
        if peak_rank_memory(tried).total <= request.gpu_memory:
            return True
    return False


def describe(layout: Layout) -> str:
    """Parallel sizes and policy of a layout, in one line."""
    sizes = {
        "TP": layout.tp,
        "ETP": layout.etp,
        "EP": layout.ep,
        "CP": layout.cp,
        "PP": layout.pp,
        "DP": layout.dp,
    }
    text = " ".join(f"{name} {size}" for name, size in sizes.items() if size > 1 or name == "DP")
    return f"{text}, {layout.policy()}{', optimizer in CPU memory' if layout.offload else ''}"


def largest_part(memory: Memory) -> str:
    """What takes most of a rank's memory."""
    return max(MEMORY_PARTS, key=lambda name: getattr(memory, name)).replace("_", " ")
