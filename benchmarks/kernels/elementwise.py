# Copyright (c) 2026, the megatron-core gptoss authors.

"""Memory-bound operations, forward and backward: RoPE, bias and residual, RMSNorm.

    python -m benchmarks.kernels.elementwise                    all cases, a minute or two on an H100
    python -m benchmarks.kernels.elementwise --cases rope-32k --json benchmarks/results/elementwise_h100.json
    python -m benchmarks.kernels.elementwise --smoke            seconds, on the CPU too

`rope` computes rotated queries and keys, and values, from the output of linear_qkv, with
gpt-oss-20b's 64 query heads, 8 groups and head dim 64; `residual` adds attention's bias and the
residual (hidden 2880, no dropout); `norm` is RMSNorm. bf16.

`eager` is upstream's path; `compiled` torch.compile (for `residual` that of bias_dropout_fusion);
`triton` this project's kernel; `liger` Liger-Kernel's function for q and k after upstream's split, or
its RMSNorm, if installed; `copy` is one copy of the bytes that the operation has to move: each input
and output gradient read once, each output and input gradient written once.

Values are checked first, with 1,001 tokens, against float64; wrong implementations get no figure.
All are then timed alternately by CUDA events. GB/s count the bytes of `copy`, and are therefore
comparable between implementations; `of copy` is the share of the copy's rate. Saved MiB are allocated
between forward and backward in addition to weights, including the outputs, after the caller has
released the inputs. Error is the largest relative error of outputs and gradients.
"""

import argparse
import functools
import importlib.util
import statistics
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Callable

import torch

from benchmarks.lib import cases
from benchmarks.lib.timing import mark, milliseconds
from megatron.core.fusions import fused_bias_residual, fused_qkv_rotary
from megatron.core.fusions.fused_bias_dropout import (
    bias_dropout_add_fused_train,
    bias_dropout_add_unfused,
)
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.gpt_oss.diagnostics.attention_timing import device
from megatron.gpt_oss.text_table import aligned

DEVICE = device()
HEADS, GROUPS, HEAD_DIM, HIDDEN = 64, 8, 64, 2880
QUERIES = HEADS // GROUPS
MSCALE = 1.3465735902799727  # 0.1 ln(32) + 1
EPSILON = 1e-5
CHECKED_TOKENS = 1001
ERROR_LIMIT = 1e-2  # bf16 keeps 8 bits; eager rounds several times in turn
IMPLEMENTATIONS = ("eager", "compiled", "triton", "liger")
K = 1024


@dataclass(frozen=True)
class Case:
    """One operation on a number of tokens."""

    operation: str
    tokens: int
    batch: int = 1

    @property
    def name(self) -> str:
        size = f"{self.tokens // K}k" if self.tokens >= K else str(self.tokens)
        return f"{self.operation}-{size}" + (f"x{self.batch}" if self.batch > 1 else "")


@dataclass(kw_only=True)
class Row(cases.Row):
    """One row of the table."""

    implementation: str
    forward_ms: float | None
    gb_per_s: float
    of_copy: float
    kept_mib: float | None
    error: float | None


@dataclass
class Problem:
    """Tensors of a case.

    Attributes:
        activations: what comes from the operation before.
        weights: what is there anyway.
        douts: gradients of the outputs.
        floor: bytes that cannot be avoided, forward and backward.
    """

    activations: list[torch.Tensor]
    weights: list[torch.Tensor]
    douts: list[torch.Tensor]
    floor: int


def rope(case: Case) -> tuple[Problem, dict[str, Callable], Callable]:
    """The output of linear_qkv to query, key and value."""
    inv_freq = 150000.0 ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM)
    angles = torch.outer(torch.arange(case.tokens, dtype=torch.float32), inv_freq)
    freqs = torch.cat((angles, angles), dim=-1)[:, None, None, :].to(DEVICE)
    shape = case.tokens, case.batch
    qkv = draw(*shape, GROUPS, (QUERIES + 2) * HEAD_DIM)
    douts = [draw(*shape, heads, HEAD_DIM) for heads in (HEADS, GROUPS, GROUPS)]
    config = SimpleNamespace(
        apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False
    )
    rotate = functools.partial(
        apply_rotary_pos_emb, freqs=freqs, config=config, mscale=MSCALE, cp_group=object()
    )

    def split(qkv):
        """Split like SelfAttention.get_query_key_value_tensors."""
        sizes = [QUERIES * HEAD_DIM, HEAD_DIM, HEAD_DIM]
        query, key, value = torch.split(qkv, sizes, dim=3)
        return query.reshape(*query.shape[:2], -1, HEAD_DIM), key, value

    def eager(qkv):
        query, key, value = split(qkv)
        return rotate(query), rotate(key), value

    def fused(implementation, qkv):
        return fused_qkv_rotary.split_and_rotate(qkv, freqs, QUERIES, MSCALE, implementation)

    def liger(qkv):
        from liger_kernel.ops.rope import LigerRopeFunction

        query, key, value = split(qkv)
        cos, sin = ((f(freqs[:, 0]) * MSCALE).to(qkv.dtype) for f in (torch.cos, torch.sin))
        by_head = (x.permute(1, 2, 0, 3) for x in (query, key))
        rotated = LigerRopeFunction.apply(*by_head, cos.transpose(0, 1), sin.transpose(0, 1))
        return *(x.permute(2, 0, 1, 3) for x in rotated), value

    calls = {
        "eager": eager,
        "compiled": functools.partial(fused, "compiled"),
        "triton": functools.partial(fused, "triton"),
        "liger": liger,
    }
    reference = functools.partial(
        fused_qkv_rotary.split_and_rotate_ref, freqs=freqs, num_queries=QUERIES, mscale=MSCALE
    )
    return Problem([qkv], [], douts, 4 * size(qkv)), calls, reference


def residual(case: Case) -> tuple[Problem, dict[str, Callable], Callable]:
    """Add bias and residual to the output of linear_proj."""
    x, rest, dout = (draw(case.tokens, case.batch, HIDDEN) for _ in range(3))
    unfused = bias_dropout_add_unfused(True)
    calls = {
        "eager": lambda x, rest, bias: (unfused((x, bias), rest, 0.0),),
        "compiled": lambda x, rest, bias: (bias_dropout_add_fused_train((x, bias), rest, 0.0),),
        "triton": lambda x, rest, bias: (fused_bias_residual.add_bias_and_residual(x, bias, rest),),
    }
    # The gradients of both are the output's, which is read for the bias.
    problem = Problem([x, rest], [draw(HIDDEN)], [dout], 4 * size(x))
    return problem, calls, lambda x, rest, bias: (x + bias + rest,)


def norm(case: Case) -> tuple[Problem, dict[str, Callable], Callable]:
    """RMSNorm over the hidden dimension."""
    x, dout = (draw(case.tokens, case.batch, HIDDEN) for _ in range(2))

    def eager(x, weight):
        return (torch.nn.functional.rms_norm(x, (HIDDEN,), weight, EPSILON),)

    def liger(x, weight):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        # 'gemma': everything in fp32, as PyTorch; not in place, the residual needs the input.
        return (LigerRMSNormFunction.apply(x, weight, EPSILON, 0.0, "gemma", False),)

    def in_words(x, weight):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)
        return ((wide * scale * weight).to(x.dtype),)

    calls = {"eager": eager, "compiled": torch.compile(in_words), "liger": liger}
    return Problem([x], [draw(HIDDEN)], [dout], 5 * size(x)), calls, in_words


OPERATIONS = {"rope": rope, "residual": residual, "norm": norm}
CASES = [Case(name, tokens) for name in OPERATIONS for tokens in (4 * K, 32 * K, 128 * K)]
TINY = [Case(name, 65, 2) for name in OPERATIONS]


def main() -> None:
    """Run the selected cases, print and write the results."""
    args = parse_arguments()
    torch.manual_seed(0)
    cases.run(args, cases.machine(), run_case, table)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; unknown names are rejected."""
    names = [*OPERATIONS, *(case.name for case in CASES)]
    parser = cases.make_parser(__doc__, names, seconds=2.0)
    parser.add_argument("--only", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS)
    args = parser.parse_args()
    of_operation = {
        name: [case.name for case in CASES if case.operation == name] for name in OPERATIONS
    }
    if args.cases:
        args.cases = [name for word in args.cases for name in of_operation.get(word, [word])]
    args.chosen = cases.choose(parser, args, CASES, TINY)
    return args


def run_case(case: Case, args: argparse.Namespace, left_out: list) -> list[Row]:
    """Check values, measure time and memory."""
    make = OPERATIONS[case.operation]
    short, short_calls, reference = make(Case(case.operation, min(CHECKED_TOKENS, case.tokens), 2))
    problem, calls, _ = make(case)
    errors, chosen = {}, {}
    for name, call in calls.items():
        if name not in args.only:
            continue
        reason = missing(name)
        if reason is None:
            try:
                errors[name] = check(short, short_calls[name], reference)
                if not errors[name] < ERROR_LIMIT:
                    reason = f"WRONG: relative error {errors[name]:.1e}"
            except Exception as error:  # another release of a library, a compiler that fails
                reason = (
                    f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                )
        if reason is None:
            chosen[name] = call
        else:
            left_out.append([f"{case.name} {name}", reason])
    # The check's shape is forgotten: a training run compiles for the one that it has.
    torch._dynamo.reset()
    samples = time_interleaved(chosen, problem, args.seconds)
    copy = statistics.median(total for total, _ in samples["copy"])
    rows = []
    for name, pairs in samples.items():
        times = [total for total, _ in pairs]
        median = statistics.median(times)
        is_copy = name == "copy"
        rows.append(
            Row(
                case=case.name,
                implementation=name,
                **cases.milliseconds(times),
                forward_ms=None if is_copy else statistics.median(forward for _, forward in pairs),
                gb_per_s=problem.floor / median / 1e6,
                of_copy=copy / median,
                kept_mib=None if is_copy else kept(chosen[name], problem),
                error=errors.get(name),
            )
        )
    return rows


def missing(name: str) -> str | None:
    """The reason why an implementation cannot run here."""
    if name == "liger" and importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    if name != "eager" and DEVICE == "cpu":
        return "needs a CUDA device"
    if name == "compiled" and not fused_qkv_rotary.can_compile():
        return "torch.compile is switched off, or there is no C++ compiler"
    return None


def draw(*shape: int) -> torch.Tensor:
    """Normally distributed bf16 numbers."""
    return torch.randn(*shape, dtype=torch.bfloat16, device=DEVICE)


def size(tensor: torch.Tensor) -> int:
    """Bytes of tensors."""
    return tensor.numel() * tensor.element_size()


def check(problem: Problem, call: Callable, reference: Callable) -> float:
    """Largest relative error of outputs and gradients."""
    results = []
    for function, dtype in ((call, torch.bfloat16), (reference, torch.float64)):
        leaves = [
            x.detach().to(dtype).requires_grad_() for x in (*problem.activations, *problem.weights)
        ]
        # Not leaves: what works in place may.
        outputs = function(*(leaf * 1 for leaf in leaves))
        douts = [dout.to(dtype) for dout in problem.douts]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, douts)])
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True))


def time_interleaved(calls: dict, problem: Problem, seconds: float) -> dict[str, list]:
    """[forward and backward, forward] milliseconds of each call and of a copy, interleaved."""
    activations, weights = (
        [x.detach().requires_grad_() for x in tensors]
        for tensors in (problem.activations, problem.weights)
    )
    # A copy reads and writes: half of the bytes.
    source = torch.empty(problem.floor // 2, dtype=torch.uint8, device=DEVICE).fill_(1)
    target = torch.empty_like(source)
    calls = {"copy": None, **calls}
    times = {name: [] for name in calls}
    for warm_up in (3, 0):
        begin = time.perf_counter()
        while min(map(len, times.values())) < (warm_up or 5) or (
            not warm_up and time.perf_counter() - begin < seconds
        ):
            for name, call in calls.items():
                if call is None:
                    times[name].append(time_once(lambda: target.copy_(source), None))
                    continue
                for leaf in (*activations, *weights):
                    leaf.grad = None
                forward = functools.partial(call, *activations, *weights)
                backward = functools.partial(
                    torch.autograd.grad,
                    inputs=(*activations, *weights),
                    grad_outputs=problem.douts,
                )
                times[name].append(time_once(forward, backward))
        if warm_up:
            times = {name: [] for name in calls}
    return times


def time_once(forward: Callable, backward: Callable | None) -> tuple[float, float]:
    marks = []
    if DEVICE == "cuda":
        torch.cuda._sleep(10_000_000)  # about 5 ms: the host gets ahead, as it is in training
    marks.append(mark())
    outputs = forward()
    marks.append(mark())
    if backward is not None:
        backward(outputs)
        marks.append(mark())
    return milliseconds(marks[0], marks[-1]), milliseconds(marks[0], marks[1])


def kept(call: Callable, problem: Problem) -> float | None:
    """MiB saved between forward and backward."""
    if DEVICE == "cpu":
        return None
    leaves = [x.detach().requires_grad_() for x in problem.activations]
    weights = [x.detach().requires_grad_() for x in problem.weights]
    before = torch.cuda.memory_allocated()
    # Not leaves, which the graph would keep: something that only the operation may hold on to.
    outputs = call(*(leaf + 0 for leaf in leaves), *weights)
    after = torch.cuda.memory_allocated()
    del outputs
    return (after - before) / 2**20


def table(rows: list[Row]) -> str:
    """Aligned columns with units in the header."""
    head = ["case", "by", "ms", "p20", "p80", "forward ms", "GB/s", "of copy", "kept MiB", "error"]
    lines = [head]
    for row in rows:
        line = [row.case, row.implementation]
        for value, style in (
            (row.ms, ".3f"),
            (row.ms_p20, ".3f"),
            (row.ms_p80, ".3f"),
            (row.forward_ms, ".3f"),
            (row.gb_per_s, ".0f"),
            (row.of_copy, ".3f"),
            (row.kept_mib, ".0f"),
            (row.error, ".1e"),
        ):
            line.append("-" if value is None else format(value, style))
        lines.append(line)
    return "\n" + aligned(lines, left=(0, 1))


if __name__ == "__main__":
    main()
