# Copyright (c) 2026, the megatron-core gptoss authors.

"""Every sensible layout of a model on some GPUs, and the best of those that fit."""

import math
from dataclasses import dataclass, replace
from typing import Iterator

from megatron.gpt_oss.arguments.recompute import POLICIES
from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.planner.layout import Layout, Recompute, loss_chunk_of
from megatron.gpt_oss.planner.machines import PER_MACHINE, Machines
from megatron.gpt_oss.planner.memory import GB, HOST_SHARE, Memory, fullest_rank, host_memory
from megatron.gpt_oss.planner.rates import Rates
from megatron.gpt_oss.planner.time import StepTime, step_time


@dataclass(frozen=True)
class Wanted:
    """What is asked for; a size that is None is to be found.

    Attributes:
        base: model, GPUs, lengths and all that is given.
        gpu_memory: bytes for tensors.
        tp, etp, ep, cp, pp: given sizes.
        policy: a word of --memory.
        offload: whether the optimizer's state may go to the host; None: where nothing else fits.
        backend: of attention. per_machine: GPUs of a machine, which NVLink joins.
        host_memory: bytes of a machine; None: not known.
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
    host_memory: float | None = None
    reserve: float = 0.0

    @property
    def machines(self) -> Machines:
        """Of the GPUs; where these do not spread evenly over machines, as a dry run has them."""
        try:
            return Machines.of(self.base.gpus, self.per_machine)
        except UsageError:
            return Machines.guessed(self.base.gpus)


@dataclass(frozen=True)
class Plan:
    """A layout, its memory and its time.

    Attributes:
        host: bytes of a machine's memory that the optimizer takes.
        fits: the GPU's memory is enough, and the machine's where it is known.
        host_checked: whether the machine's memory is known or not needed.
    """

    layout: Layout
    memory: Memory
    time: StepTime
    host: int
    fits: bool
    host_checked: bool

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU."""
        layout = self.layout
        tokens = layout.global_batch_size * layout.seq_length
        return tokens / self.time.total / layout.gpus

    def as_dict(self) -> dict:
        """For JSON: bytes and seconds."""
        layout = self.layout
        sizes = ("gpus", "tp", "etp", "ep", "cp", "pp", "dp")
        rest = ("seq_length", "micro_batch_size", "global_batch_size", "microbatches")
        return {
            "layout": {name: getattr(layout, name) for name in sizes + rest},
            "memory_policy": layout.policy(),
            "distributed_optimizer": layout.distributed_optimizer,
            "optimizer_offload": layout.offload,
            "memory": self.memory.as_dict(),
            "fits": self.fits if self.host_checked or not self.fits else None,
            "host_memory_per_machine": self.host,
            "seconds": {**vars(self.time), "total": self.time.total},
            "tokens_per_second_per_gpu": self.tokens_per_second,
            "flags": layout.flags(),
        }


def plan_of(layout: Layout, wanted: Wanted, rates: Rates | None = None) -> Plan:
    """Memory and time of one layout."""
    memory = fullest_rank(layout)
    machines = wanted.machines
    time = step_time(layout, rates, wanted.backend, machines)
    host = host_memory(layout) * machines.gpus
    fits = memory.total <= wanted.gpu_memory and _host_excess(host, wanted) <= 0
    return Plan(layout, memory, time, host, fits, not host or wanted.host_memory is not None)


def _host_excess(host: int, wanted: Wanted) -> float:
    """Bytes by which the optimizer misses a machine's memory; negative where it fits."""
    return -1 if wanted.host_memory is None else host - HOST_SHARE * wanted.host_memory


def all_plans(wanted: Wanted) -> list[Plan]:
    """Every sensible layout, once for each policy of --memory; those that fit first.

    Those that fit come in the order of their time, with the optimizer on the host after the
    others: its rates are assumed. It goes there only where a layout does not fit otherwise. Those
    that do not fit come in the order of their memory.
    """
    rates = Rates()
    plans = []
    for layout in layouts(wanted):
        here = plan_of(layout, wanted, rates)
        if wanted.offload is not True:
            plans.append(here)
        if wanted.offload or (wanted.offload is None and not here.fits):
            plans.append(plan_of(replace(layout, offload=1.0), wanted, rates))

    def order(plan: Plan) -> tuple:
        if plan.fits:
            return 0, plan.layout.offload > 0, plan.time.total
        return 1, False, plan.memory.total

    return sorted(plans, key=order)


def layouts(wanted: Wanted) -> Iterator[Layout]:
    """The layouts to look at, without offload.

    Tensor parallelism stays within a machine, experts are whole or split as the rest is, and the
    optimizer's state is always split over the ranks that would hold copies of it.
    """
    base = wanted.base
    preset, gpus = base.preset, base.gpus
    powers = [2**i for i in range(gpus.bit_length()) if gpus % 2**i == 0]
    stages = [n for n in range(1, gpus + 1) if gpus % n == 0 and preset.num_layers % n == 0]
    policies = [wanted.policy] if wanted.policy else list(POLICIES)
    in_machine = [n for n in powers if wanted.machines.holds(n)]
    for tp in [wanted.tp] if wanted.tp else in_machine:
        for cp in [wanted.cp] if wanted.cp else powers:
            for pp in [wanted.pp] if wanted.pp else stages:
                for etp in [wanted.etp] if wanted.etp else sorted({1, tp}):
                    for ep in [wanted.ep] if wanted.ep else powers:
                        layout = replace(
                            base, tp=tp, etp=etp, ep=ep, cp=cp, pp=pp, sequence_parallel=tp > 1
                        )
                        if layout.problem() is None:
                            yield from (_with_policy(layout, name) for name in policies)


def _with_policy(layout: Layout, name: str) -> Layout:
    return replace(layout, recompute=Recompute.of_policy(name), loss_chunk=loss_chunk_of(name))


def advice(wanted: Wanted, plans: list[Plan]) -> str:
    """What is wrong where nothing fits: by how much the nearest misses, and what would help."""

    def excesses(plan: Plan) -> tuple[float, float]:
        return (
            max(0.0, plan.memory.total - wanted.gpu_memory),
            max(0.0, _host_excess(plan.host, wanted)),
        )

    nearest = min(plans, key=lambda plan: sum(excesses(plan)))
    need, have = nearest.memory.total, wanted.gpu_memory
    layout = nearest.layout
    too_much, host_too_much = excesses(nearest)
    helps = []
    if too_much:
        helps.append(f"GPUs of {math.ceil((need + wanted.reserve) / GB)} GB")
    if host_too_much:
        helps.append(f"machines with {math.ceil(nearest.host / HOST_SHARE / GB)} GB of memory")
    for factor in (2, 4, 8, 16, 32):
        gpus = layout.gpus * factor
        batch = wanted.base.global_batch_size * factor
        more = replace(wanted, base=replace(wanted.base, gpus=gpus, global_batch_size=batch))
        if gpus % -(-gpus // wanted.per_machine) == 0 and _any_fits(more):
            helps.append(f"{gpus} GPUs")
            break
    if wanted.base.grad_bytes == 4:
        if _any_fits(replace(wanted, base=replace(wanted.base, grad_bytes=2))):
            helps.append("--grad-reduce-in-bf16")
    length = wanted.base.seq_length // 2
    while length >= 1024:
        if _any_fits(replace(wanted, base=replace(wanted.base, seq_length=length))):
            helps.append(f"--seq-length {length}")
            break
        length //= 2
    given = [
        f"--{name}"
        for name in ("tp", "etp", "ep", "cp", "pp", "policy")
        if getattr(wanted, name) is not None
    ]
    if wanted.offload is False:
        given.append("--no-offload")
    if given:
        helps.append(f"dropping {', '.join(given)}".replace("--policy", "--memory"))
    text = f"No layout fits. The closest ({shown(layout)}) needs "
    if too_much:
        text += (
            f"{need / GB:.1f} GB per GPU, {too_much / GB:.1f} GB more than the "
            f"{have / GB:.1f} GB for tensors, mainly {largest_part(nearest.memory)}; peak at: "
            f"{nearest.memory.moment}"
        )
    if host_too_much:
        text += (
            f"{' and ' * bool(too_much)}{nearest.host / GB:.0f} GB of CPU memory per machine "
            f"for the optimizer, more than {HOST_SHARE:.0%} of {wanted.host_memory / GB:.0f} GB"
        )
    return f"{text}. Possible changes: {'; or '.join(helps)}."


def _any_fits(wanted: Wanted) -> bool:
    gpus = wanted.machines.gpus
    offloads = {None: (1.0, 0.0), False: (0.0,), True: (1.0,)}[wanted.offload]
    for layout in layouts(wanted):
        for offload in offloads:
            tried = replace(layout, offload=offload)
            if _host_excess(host_memory(tried) * gpus, wanted) > 0:
                continue
            if fullest_rank(tried).total <= wanted.gpu_memory:
                return True
    return False


def shown(layout: Layout) -> str:
    """A layout in a few words."""
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
    """The largest of a rank's parts."""
    parts = ("parameters", "gradients", "optimizer", "activations", "logits", "step")
    return max(parts, key=lambda name: getattr(memory, name))
