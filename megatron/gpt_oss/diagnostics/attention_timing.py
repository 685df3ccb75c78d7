# Copyright (c) 2026, the megatron-core gptoss authors.

"""Time, memory and error of the attention backends, for `gptoss doctor` and the benchmarks.

On the CPU time is measured with time.perf_counter, and memory is not measured.
"""

import math
import random
import statistics
import time
from dataclasses import dataclass, replace
from typing import Callable

import torch
from torch import Tensor

from megatron.core.transformer.sink_attention.api import available_backends, sink_attention
from megatron.core.transformer.sink_attention.attention_params import AttentionParams
from megatron.core.transformer.sink_attention.measured_order import kind_of_mask
from megatron.core.transformer.sink_attention.registry import select_backend
from megatron.gpt_oss.training.metrics.flops import visible_pairs

# GPU cycles of sleep (about 5 ms) before a measurement. The CPU then launches kernels ahead of the
# GPU, as in training, so that launch time does not count for short kernels. With 1 ms, flash-attn-4
# at a window of 128 and 8k tokens measured 0.7 to 1.6 ms.
_SLEEP_CYCLES = 10_000_000


def device() -> str:
    """The device type of all measurements."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Workload:
    """Shapes of one attention layer; the defaults are the heads of gpt-oss.

    Attributes:
        name: name in output.
        seqlen: tokens of a sequence, or of all packed documents.
        documents: lengths of packed documents; None for a dense batch.
        window_size: as in `sink_attention`.
    """

    name: str
    seqlen: int
    batch: int = 1
    documents: tuple[int, ...] | None = None
    window_size: tuple[int, int] | None = None
    heads: int = 64
    groups: int = 8
    dim: int = 64
    dtype: torch.dtype = torch.bfloat16

    @property
    def kind(self) -> str:
        """Key in the table of measured orders."""
        return kind_of_mask(self.window_size is not None, self.documents is not None)

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading dimensions of q, k, v: [s, b], or [t] if packed."""
        return (self.seqlen,) if self.documents else (self.seqlen, self.batch)

    @property
    def pairs(self) -> int:
        """Unmasked query-key pairs of one head over the batch."""
        lengths = self.documents or (self.seqlen,) * self.batch
        window = None if self.window_size is None else self.window_size[0] + 1
        return int(sum(visible_pairs(length, window) for length in lengths))

    @property
    def flops(self) -> int:
        """Model FLOPs of forward and backward: 2 GEMMs of pairs x hn forward, 5 backward."""
        return 14 * self.pairs * self.heads * self.dim

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of query and key."""
        return (*self.lead, self.heads, self.dim), (*self.lead, self.groups, self.dim)

    def unsupported_reasons(self) -> dict[str, str | None]:
        """{backend: None, or the reason why it does not support this workload}."""
        return available_backends(*self.shapes, self.dtype, device(), window_size=self.window_size)

    def selected_backend(self) -> str:
        """Name of the backend that "auto" selects."""
        params = AttentionParams.of_shapes(
            *self.shapes, self.dtype, device(), window_size=self.window_size
        )
        return select_backend(params).name

    def tensors(self) -> tuple[Tensor, ...]:
        """q, k, v, sinks, dout; all but the sinks are uninitialised."""

        def empty(heads):
            return torch.empty(*self.lead, heads, self.dim, dtype=self.dtype, device=device())

        sink = torch.linspace(-4, 8, self.heads, device=device()).requires_grad_()
        leaves = [empty(n).requires_grad_() for n in (self.heads, self.groups, self.groups)]
        return (*leaves, sink, empty(self.heads))

    def short(self) -> "Workload":
        """A workload of the same kind, short enough for a check with plain PyTorch in float64."""
        short = replace(self, seqlen=min(1024, self.seqlen))
        if self.documents and self.seqlen > 1024:
            short = replace(short, documents=(1, 200, 311, 512))
        return short

    def call(self, backend: str, **options) -> Callable:
        """sink_attention as a function of (q, k, v, sinks), with the options of this workload."""
        options = dict(options, window_size=self.window_size, backend=backend)
        if self.documents:
            bounds = torch.tensor([0, *self.documents]).cumsum(0)
            options["cu_seqlens"] = bounds.int().to(device())
            options["max_seqlen"] = max(self.documents)
        return lambda *tensors: sink_attention(*tensors, **options)


@torch.no_grad()
def refill(tensors: tuple[Tensor, ...]) -> None:
    """Fill with new random values: the L2 cache holds none of them, and power draw is realistic."""
    q, k, v, _, dout = tensors
    for x in (q, k, v, dout):
        x.normal_()


def run_once(call: Callable, tensors: tuple[Tensor, ...], with_sink: bool) -> list[Tensor]:
    """Run forward and backward once; returns out and the gradients."""
    q, k, v, sink, dout = tensors
    inputs = (q, k, v, sink) if with_sink else (q, k, v)
    out = call(q, k, v, sink if with_sink else None)
    return [out, *torch.autograd.grad(out, inputs, dout)]


def time_once(call: Callable, tensors: tuple[Tensor, ...], with_sink: bool) -> float:
    """Milliseconds of one forward and backward on new values, measured with CUDA events."""
    refill(tensors)
    if device() == "cpu":
        start = time.perf_counter()
        run_once(call, tensors, with_sink)
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_SLEEP_CYCLES)
    begin.record()
    run_once(call, tensors, with_sink)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def time_interleaved(
    calls: dict[str, tuple[Callable, bool]],
    tensors: tuple[Tensor, ...],
    seconds: float,
    max_rounds: int = 20,
) -> dict[str, list[float]]:
    """Time several calls, interleaved so that all run at the same GPU clocks.

    The order is random in each round: a kernel after one that draws little power runs faster.

    Args:
        calls: {name: (function, whether it takes sinks)}.
        tensors: q, k, v, sinks, dout.
        seconds: limit for all rounds; at least three rounds run.
        max_rounds: limit of rounds.
    Returns:
        {name: milliseconds of each round}.
    """
    times = {name: [] for name in calls}
    for name, (call, with_sink) in calls.items():  # warm-up: plans, workspaces, allocator
        time_once(call, tensors, with_sink)
    spent, rounds = 0.0, 0
    draw = random.Random(0)
    while rounds < 3 or (rounds < max_rounds and spent < seconds * 1e3):
        for name in draw.sample(list(calls), len(calls)):
            call, with_sink = calls[name]
            times[name].append(time_once(call, tensors, with_sink))
            spent += times[name][-1]
        rounds += 1
    return times


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """20 % quantile, median, 80 % quantile."""
    if len(times) < 2:
        return times[0], times[0], times[0]
    cuts = statistics.quantiles(times, n=5, method="inclusive")
    return cuts[0], statistics.median(times), cuts[3]


def peak_memory(
    call: Callable, tensors: tuple[Tensor, ...], with_sink: bool = True
) -> tuple[float, float]:
    """Peak memory of forward and backward in MiB, and the part of it that is kernel workspace.

    The other part is q, k, v, out, lse and their gradients. An example of workspace is the fp32 dq
    of a flash backward.
    """
    if device() == "cpu":
        return math.nan, math.nan
    refill(tensors)
    run_once(call, tensors, with_sink)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = run_once(call, tensors, with_sink)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    q = tensors[0]
    outputs = sum(x.numel() * x.element_size() for x in results) + 4 * q.numel() // q.shape[-1]
    inputs = sum(x.numel() * x.element_size() for x in tensors)
    mib = 2**20
    return (peak - before + inputs) / mib, (peak - before - outputs) / mib


def errors(workload: Workload, backend: str, with_sink: bool = True) -> dict[str, float]:
    """Relative errors (norms) of out and the gradients against backend `math` in float64."""
    tensors = workload.tensors()
    generator = torch.Generator(device=device()).manual_seed(1)
    with torch.no_grad():
        for x in (*tensors[:3], tensors[4]):
            x.normal_(generator=generator)
    values = run_once(workload.call(backend), tensors, with_sink)
    exact = [x.detach().double() for x in tensors]
    exact = tuple(x.requires_grad_(i < 4) for i, x in enumerate(exact))
    expected = run_once(replace(workload, dtype=torch.float64).call("math"), exact, with_sink)
    names = ("out", "dq", "dk", "dv", "dsink")
    return {
        name: ((value.double() - target).norm() / target.norm()).item()
        for name, value, target in zip(names, values, expected)
    }
