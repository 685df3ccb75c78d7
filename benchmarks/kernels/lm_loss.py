# Copyright (c) 2026, the megatron-core gptoss authors.

"""Head and loss of gpt-oss-20b, forward and backward: all logits at once, and in chunks.

    python -m benchmarks.kernels.lm_loss --json benchmarks/results/lm_loss_h100.json
    python -m benchmarks.kernels.lm_loss --cases 8k --only unchunked chunked-4096
    python -m benchmarks.kernels.lm_loss --smoke                 seconds, on the CPU too

Hidden size 2880, 201,088 logits per token, bf16. `unchunked` is Megatron-Core without
TransformerEngine: the output layer, then VocabParallelCrossEntropy in fp32. `chunked` is
`chunked_lm_loss`, `main_grad` the same with the weight gradient accumulated in fp32 main_grad in the
forward, as in a training run (the other two leave a bf16 gradient that DDP has to accumulate).
Losses and gradients are compared first with float64 on 512 tokens. Times are medians of
CUDA events, measured alternately on fresh random data. Peak MiB are in addition to hidden states,
weight and main_grad; TFLOP/s
count 6 x tokens x 2880 x 201,088.
"""

import argparse
import math
import statistics
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.lib import cases, timing
from benchmarks.lib.harness import start_alone
from megatron.core import device_utils, parallel_state
from megatron.core.fusions.chunked_lm_loss import chunked_lm_loss, lm_loss_ref
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.gpt_oss.diagnostics.attention_timing import device
from megatron.gpt_oss.text_table import aligned

HIDDEN, VOCAB = 2880, 201_088
K, MIB = 1024, 2**20
CHUNKS = (2 * K, 4 * K)
ERROR_LIMIT = 1e-2
FACTOR = 1e-4


@dataclass(frozen=True)
class Case:
    """Tokens of a micro-batch."""

    name: str
    tokens: int
    vocab: int = VOCAB

    @property
    def flops(self) -> int:
        """FLOPs of forward and backward."""
        return 6 * self.tokens * HIDDEN * self.vocab

    def short(self) -> "Case":
        """A case that is small enough for a check in float64."""
        return Case(self.name, min(512, self.tokens), min(8 * K, self.vocab))


CASES = [Case("8k", 8 * K), Case("32k", 32 * K)]
TINY = Case("tiny", 96, vocab=256)


@dataclass(kw_only=True)
class Row(cases.Row):
    """One row of the table."""

    loss: str
    tflops: float
    of_unchunked: float
    peak_mib: float
    error: float


class Head:
    """Tensors of one case."""

    def __init__(self, case: Case):
        bf16 = dict(device=device(), dtype=torch.bfloat16)
        self.hidden = torch.empty(case.tokens, 1, HIDDEN, **bf16)
        self.weight = torch.nn.Parameter(torch.empty(case.vocab, HIDDEN, **bf16).normal_(std=0.02))
        self.weight.grad_added_to_main_grad = False
        self.weight.main_grad = torch.zeros_like(self.weight, dtype=torch.float32)
        self.mask = torch.ones(1, case.tokens, device=device())
        self.factor = torch.tensor(FACTOR, device=device())
        self.refill()

    def refill(self) -> None:
        """Draw new values."""
        self.hidden = self.hidden.detach().normal_().requires_grad_()
        self.labels = torch.randint(self.weight.shape[0], self.mask.shape, device=device())
        self.weight.grad = None


def unchunked(head: Head) -> torch.Tensor:
    """Output layer and loss of GPTModel."""
    logits = head.hidden @ head.weight.t()
    return vocab_parallel_cross_entropy(logits, head.labels.t(), tp_group=None).t()


def chunked(head: Head, size: int, into_main_grad: bool) -> torch.Tensor:
    """`chunked_lm_loss`."""
    factor = head.factor if into_main_grad else None
    return chunked_lm_loss(
        head.hidden,
        head.weight,
        head.labels,
        head.mask,
        chunk_size=size,
        gradient_factor=factor,
    )


IMPLEMENTATIONS = {"unchunked": unchunked}
for _size in CHUNKS:
    IMPLEMENTATIONS[f"chunked-{_size}"] = partial(chunked, size=_size, into_main_grad=False)
    IMPLEMENTATIONS[f"main_grad-{_size}"] = partial(chunked, size=_size, into_main_grad=True)


def main() -> None:
    """Run the selected cases, print and write the results."""
    args = parse_arguments()
    start_group()
    cases.run(args, cases.machine(), run_case, table)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; unknown names are rejected."""
    parser = cases.make_parser(__doc__, [case.name for case in CASES], seconds=None)
    parser.add_argument("--only", nargs="+", choices=IMPLEMENTATIONS, default=[*IMPLEMENTATIONS])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    args.chosen = cases.choose(parser, args, CASES, [TINY])
    return args


def start_group() -> None:
    """Start the process group that Megatron's cross entropy needs."""
    start_alone()
    parallel_state.initialize_model_parallel()


def run_case(case: Case, args: argparse.Namespace, left_out: list) -> list[Row]:
    """Check values, measure time and memory of each implementation."""
    errors = {name: check(case.short(), IMPLEMENTATIONS[name]) for name in args.only}
    times, peaks = {name: [] for name in args.only}, {}
    for repeat in range(args.repeats + 1):
        for name in list(times):
            if device() == "cuda":
                torch.cuda.empty_cache()
            head = Head(case)
            try:
                step(IMPLEMENTATIONS[name], head)  # the allocator's pool is filled
                ms, peaks[name] = timed(IMPLEMENTATIONS[name], head)
            except torch.OutOfMemoryError:
                left_out.append([f"{case.name} {name}", "out of memory"])
                del times[name]
                continue
            finally:
                del head
            if repeat:
                times[name].append(ms)
    base = statistics.median(times["unchunked"]) if "unchunked" in times else math.nan
    return [
        Row(
            case=case.name,
            loss=name,
            **cases.milliseconds(samples),
            tflops=case.flops / statistics.median(samples) / 1e9,
            of_unchunked=statistics.median(samples) / base,
            peak_mib=peaks[name],
            error=errors[name],
        )
        for name, samples in times.items()
    ]


def step(function, head: Head) -> torch.Tensor:
    """Compute losses, and gradients of their weighted sum."""
    losses = function(head)
    ((losses * head.mask).sum() * head.factor).backward()
    return losses


def check(case: Case, function) -> float:
    """Largest relative error of losses and gradients against float64."""
    head = Head(case)
    losses = step(function, head)
    exact = [x.detach().double().requires_grad_() for x in (head.hidden, head.weight)]
    expected = lm_loss_ref(*exact, head.labels)
    (expected.sum() * FACTOR).backward()
    added = head.weight.grad_added_to_main_grad
    dweight = head.weight.main_grad if added else head.weight.grad
    worst = 0.0
    for value, target in (
        (losses, expected),
        (head.hidden.grad, exact[0].grad),
        (dweight, exact[1].grad),
    ):
        worst = max(worst, ((value.double() - target).norm() / target.norm()).item())
    if not worst < ERROR_LIMIT:
        raise SystemExit(f"wrong: relative error {worst:.1e}")
    return worst


def timed(function, head: Head) -> tuple[float, float]:
    """Milliseconds, and peak MiB in addition to what was allocated before (nan on the CPU)."""
    head.refill()
    device_utils.synchronize()
    on_gpu = device() == "cuda"
    if on_gpu:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    begin = timing.mark()
    step(function, head)
    taken = timing.milliseconds(begin, timing.mark())
    return taken, (torch.cuda.max_memory_allocated() - before) / MIB if on_gpu else math.nan


def table(rows: list[Row]) -> str:
    """Aligned columns with units in the header."""
    lines = [["case", "loss", "ms", "p20", "p80", "TFLOP/s", "of unchunked", "peak MiB", "error"]]
    for row in rows:
        figures = [f"{x:.2f}" for x in (row.ms, row.ms_p20, row.ms_p80)]
        figures += [f"{row.tflops:.0f}", f"{row.of_unchunked:.3f}", f"{row.peak_mib:.0f}"]
        lines.append([row.case, row.loss, *figures, f"{row.error:.1e}"])
    return aligned(lines, left=(0, 1))


if __name__ == "__main__":
    main()
