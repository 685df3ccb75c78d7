# Copyright (c) 2026, the megatron-core gptoss authors.

"""The experts of one layer, forward and backward: grouped GEMMs, SequentialMLP, one dense GEMM.

    python -m benchmarks.kernels.experts                       all cases, a few minutes on an H100
    python -m benchmarks.kernels.experts --cases 16k 16k-skewed --json benchmarks/results/experts_h100.json
    python -m benchmarks.kernels.experts --cases 131k --profile
    python -m benchmarks.kernels.experts --cases 32k 131k 131k-skewed --only grouped fp8 fp8-same-step
    python -m benchmarks.kernels.experts --smoke               seconds, on the CPU too

32 experts of gpt-oss (2880 x 5760 and 2880 x 2880), bf16, with biases, clamped SwiGLU and router
weights. Rows are routed tokens: a token goes to 4 experts. Balanced counts are equal to within one;
skewed ones are proportional to 1 / (expert + 1), and the last three experts have none.

`grouped` is GroupedExperts, `recompute` the same with --recompute-modules moe_act, `grouped-gemm` its
two grouped GEMMs alone, `grouped-torch` and `grouped-gemm-torch` these with PyTorch's grouped_mm
instead of our kernels, `sequential` SequentialMLP, `dense` the two GEMMs with all tokens at one
expert: the lower bound of the time for these FLOPs. `fp8` is GroupedExperts with --fp8 and quantises
the weights in each call, as with one micro-batch a step; `fp8-same-step` finds them quantised. Values are checked first, with 1,024 routed tokens, against
float64; wrong implementations get no figure. Each implementation is then repeated for a while and
timed by CUDA events on one set of random numbers: GEMMs are limited by the card's power, and a GEMM
after a pause, or after kernels with few FLOPs, runs a tenth faster than in training. TFLOP/s count
the GEMMs alone, 18 x rows x hidden x width for forward and backward. Peak MiB are in addition to
weights, input and output gradient, and include all gradients; saved MiB are allocated between forward
and backward, including the output.
"""

import argparse
import contextlib
import statistics
import time
from dataclasses import dataclass

import torch

from benchmarks.lib import cases, report
from benchmarks.lib.harness import start_alone
from benchmarks.lib.timing import mark, milliseconds
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.grouped_mlp.dispatch import GEMM
from megatron.core.transformer.moe.grouped_mlp.expert_segments import ExpertSegments
from megatron.core.transformer.moe.grouped_mlp.linear import grouped_linear
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.gpt_oss.diagnostics.attention_timing import device
from megatron.gpt_oss.text_table import aligned

DEVICE = device()
# bf16 keeps 8 bits; a GEMM, an activation and a GEMM round in turn. e4m3 keeps 4.
ERROR_LIMIT, FP8_ERROR_LIMIT = 1.5e-2, 0.1
# In the order of the measurements: SequentialMLP's pauses let the card cool.
IMPLEMENTATIONS = (
    "sequential",
    "recompute",
    "grouped-torch",
    "grouped-gemm-torch",
    "dense",
    "grouped-gemm",
    "grouped",
    "fp8",
    "fp8-same-step",
)
GEMMS_ALONE = ("grouped-gemm", "grouped-gemm-torch", "dense")
# Milliseconds that a call is repeated before it is timed, and while it is.
WARM_MS, TIMED_MS = (600, 400) if DEVICE == "cuda" else (0, 100)


@dataclass(frozen=True)
class Case:
    """Routed tokens of one layer and their distribution over experts."""

    name: str
    rows: int
    skewed: bool = False
    experts: int = 32
    hidden: int = 2880
    width: int = 2880

    @property
    def flops(self) -> int:
        """FLOPs of the GEMMs, forward and backward."""
        return 6 * self.rows * self.hidden * 3 * self.width

    def counts(self) -> list[int]:
        """Routed tokens of each expert."""
        shares = [1.0] * self.experts
        if self.skewed:
            empty = min(3, self.experts - 1)
            shares = [1 / (e + 1) for e in range(self.experts - empty)] + [0.0] * empty
        counts = [int(self.rows * share / sum(shares)) for share in shares]
        for missing in range(self.rows - sum(counts)):
            counts[missing % (self.experts - 3 * self.skewed)] += 1
        return counts


CASES = [
    Case("16k", 16_384),
    Case("32k", 32_768),
    Case("131k", 131_072),
    Case("16k-skewed", 16_384, skewed=True),
    Case("131k-skewed", 131_072, skewed=True),
]
TINY = Case("tiny", 96, skewed=True, experts=4, hidden=64, width=48)


@dataclass(kw_only=True)
class Row(cases.Row):
    """One row of the table."""

    implementation: str
    tflops: float
    of_dense: float | None
    peak_mib: float | None
    kept_mib: float | None
    error: float | None


def main() -> None:
    """Run the selected cases, print and write the results."""
    args = parse_arguments()
    one_process()
    cases.run(args, cases.machine(), run_case, table)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; unknown names are rejected."""
    parser = cases.make_parser(__doc__, [case.name for case in CASES], seconds=3.0)
    parser.add_argument(
        "--only",
        nargs="+",
        type=report.current_word,
        choices=IMPLEMENTATIONS,
        default=IMPLEMENTATIONS,
    )
    parser.add_argument("--profile", action="store_true", help="kernels of `grouped`, by time")
    args = parser.parse_args()
    args.chosen = cases.choose(parser, args, CASES, [TINY])
    return args


def run_case(case: Case, args: argparse.Namespace, left_out: list) -> list[Row]:
    """Check values, measure time and memory."""
    short = Case(case.name, min(1024, case.rows), True, case.experts, case.hidden, case.width)
    layers = build(case, args.only)
    parameters = {p for layer in layers.values() for p in layer.parameters()}
    errors, calls = {}, {}
    for name, layer in layers.items():
        with gemm_of(name):
            error = None if name in GEMMS_ALONE else check(short, layer)
        limit = FP8_ERROR_LIMIT if name.startswith("fp8") else ERROR_LIMIT
        if error is not None and not error < limit:
            left_out.append([f"{case.name} {name}", f"WRONG: relative error {error:.1e}"])
            continue
        errors[name] = error
        calls[name] = call_of(name, layer, case)
    tensors = inputs(case)
    times = time_sustained(calls, tensors, parameters, args.seconds)
    if args.profile and "grouped" in calls:
        profile(calls["grouped"], tensors, parameters)
    dense = statistics.median(times["dense"]) if "dense" in times else None
    rows = []
    for name, samples in times.items():
        median = statistics.median(samples)
        clear(parameters)
        with gemm_of(name):
            peak, kept = memory(calls[name], tensors)
        rows.append(
            Row(
                case=case.name,
                implementation=name,
                **cases.milliseconds(samples),
                tflops=case.flops / median / 1e9,
                of_dense=dense and dense / median,
                peak_mib=peak,
                kept_mib=kept,
                error=errors[name],
            )
        )
    return rows


def one_process() -> None:
    """Initialize Megatron's process groups with one process."""
    start_alone("gloo")
    parallel_state.initialize_model_parallel()
    torch.manual_seed(0)
    model_parallel_cuda_manual_seed(0)


def build(case: Case, names: list[str]) -> dict[str, torch.nn.Module]:
    """Modules by implementation; the grouped ones share one set of weights."""
    modules = {}
    own = ("sequential", "recompute", "fp8", "fp8-same-step")
    kinds = {name: name if name in own else "grouped" for name in names}
    for kind in dict.fromkeys(kinds.values()):
        config = config_of(case, kind != "sequential", recompute=kind == "recompute")
        config.expert_fp8_recipe = "rowwise" if kind.startswith("fp8") else None
        experts = LocalSpecProvider().grouped_mlp_modules(kind != "sequential")
        modules[kind] = experts(
            case.experts, config, pg_collection=ProcessGroupCollection.use_mpu_process_groups()
        )
        with torch.no_grad():
            for key, parameter in modules[kind].named_parameters():
                parameter.normal_(std=0.5 if key.endswith("bias") else 0.02)
        if kind == "fp8-same-step":
            modules[kind].is_first_microbatch = True
    for kind in set(modules) - {"sequential", "grouped"} if "grouped" in modules else ():
        for linear in ("linear_fc1", "linear_fc2"):
            setattr(modules[kind], linear, getattr(modules["grouped"], linear))
    return {name: modules[kind] for name, kind in kinds.items()}


def config_of(case: Case, grouped: bool, recompute: bool) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=case.hidden,
        num_attention_heads=case.hidden // 8,
        ffn_hidden_size=case.width,
        moe_ffn_hidden_size=case.width,
        num_moe_experts=case.experts,
        moe_router_topk=2,
        moe_grouped_gemm=grouped,
        gated_linear_unit=True,
        activation_func=quick_gelu,
        glu_linear_offset=1.0,
        activation_func_clamp_value=7.0,
        add_bias_linear=True,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        params_dtype=torch.bfloat16,
        bf16=True,
        recompute_granularity="selective" if recompute else None,
        recompute_modules=["moe_act"] if recompute else None,
    )


def inputs(case: Case) -> tuple[torch.Tensor, ...]:
    """Input, output gradient, router probabilities, and tokens per expert on the device."""
    x, dout = (
        torch.randn(case.rows, case.hidden, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)
    )
    probs = torch.rand(case.rows, device=DEVICE).requires_grad_()
    return x.requires_grad_(), dout, probs, torch.tensor(case.counts(), device=DEVICE)


def call_of(name: str, layer: torch.nn.Module, case: Case):
    """A forward as a function of (x, dout, probs, counts) that returns outputs and their gradients.

    The GEMMs alone have inputs and output gradients of their own: no copy between the two.
    """
    if name not in GEMMS_ALONE:
        return lambda x, dout, probs, counts: ([layer(x, counts, probs)[0]], [dout])
    first, second = layer.linear_fc1.weight, layer.linear_fc2.weight
    options = dict(dtype=torch.bfloat16, device=DEVICE)
    activated = torch.randn(case.rows, case.width, **options).requires_grad_()
    dy = torch.randn(case.rows, 2 * case.width, **options)

    one = [weight[0].detach().clone().requires_grad_() for weight in (first, second)]

    def gemms(x, dout, probs, counts):
        for leaf in (activated, *one):
            leaf.grad = None
        if name == "dense":
            return [x @ one[0], activated @ one[1]], [dy, dout]
        groups = ExpertSegments(counts, x.device)
        pairs = (x, first), (activated, second)
        return [grouped_linear(*pair, groups) for pair in pairs], [dy, dout]

    return gemms


def check(case: Case, layer: torch.nn.Module) -> float:
    """Largest relative error of output, input gradient and router weight gradient."""
    x, dout, probs, counts = inputs(case)
    out = layer(x, counts, probs)[0]
    found = [out, *torch.autograd.grad(out, (x, probs), dout)]
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, probs)]
    pieces = []
    for e, (rows, p) in enumerate(zip(*(leaf.split(case.counts()) for leaf in leaves))):
        w1, b1, w2, b2 = (tensor.double() for tensor in weights(layer, e))
        gate, up = (rows @ w1 + b1).chunk(2, dim=1)
        gate, up = gate.clamp(max=7), up.clamp(-7, 7)
        pieces.append((((up + 1) * gate * torch.sigmoid(1.702 * gate)) @ w2 + b2) * p[:, None])
    expected = torch.cat(pieces)
    expected = [expected, *torch.autograd.grad(expected, leaves, dout.double())]
    return max(
        ((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)
    )


def weights(layer: torch.nn.Module, expert: int) -> tuple[torch.Tensor, ...]:
    """weight [in, out] and bias of both linear layers of an expert."""
    if hasattr(layer, "local_experts"):
        fc1, fc2 = layer.local_experts[expert].linear_fc1, layer.local_experts[expert].linear_fc2
        return (
            fc1.weight.detach().t(),
            fc1.bias.detach(),
            fc2.weight.detach().t(),
            fc2.bias.detach(),
        )
    return tuple(
        parameter[expert].detach()
        for linear in (layer.linear_fc1, layer.linear_fc2)
        for parameter in (linear.weight, linear.bias)
    )


def run_once(call, tensors) -> None:
    """Run forward and backward; .grad is cleared before."""
    x, _, probs, _ = tensors
    x.grad = probs.grad = None
    torch.autograd.backward(*call(*tensors))


def clear(parameters) -> None:
    """Remove the gradients of the weights, so that the backward does not accumulate."""
    for parameter in parameters:
        parameter.grad = None


def time_sustained(calls: dict, tensors, parameters, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each call, `TIMED_MS` of them after `WARM_MS` of the same, then the next
    call's, until `seconds` are over (two rounds at least)."""
    times = {name: [] for name in calls}
    begin, rounds = time.perf_counter(), 0
    while rounds < 2 or time.perf_counter() - begin < seconds:
        for name, call in calls.items():
            with gemm_of(name):
                once = statistics.median(time_some(2, call, tensors, parameters))
                time_some(max(1, round(WARM_MS / once)), call, tensors, parameters)
                count = max(3, round(TIMED_MS / once))
                times[name] += time_some(count, call, tensors, parameters)
        rounds += 1
    return times


def gemm_of(name: str):
    """Context in which `-torch` implementations use PyTorch's grouped_mm."""
    if not name.endswith("-torch"):
        return contextlib.nullcontext()
    return GEMM.prefer("grouped_mm")


def time_some(count: int, call, tensors, parameters) -> list[float]:
    """Milliseconds of calls without a pause between them."""
    marks = [mark()]
    for _ in range(count):
        clear(parameters)
        run_once(call, tensors)
        marks.append(mark())
    return [milliseconds(*pair) for pair in zip(marks, marks[1:])]


def memory(call, tensors) -> tuple[float | None, float | None]:
    """Peak MiB in addition to inputs and outputs, and MiB saved between forward and backward."""
    if DEVICE == "cpu":
        return None, None
    x, _, probs, _ = tensors
    x.grad = probs.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs, gradients = call(*tensors)
    kept = torch.cuda.memory_allocated() - before
    torch.autograd.backward(outputs, gradients)
    peak = torch.cuda.max_memory_allocated() - before
    return peak / 2**20, kept / 2**20


def profile(call, tensors, parameters) -> None:
    """Print the kernel times of one forward and backward."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    clear(parameters)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE == "cuda")
    with torch_profile(activities=activities) as found:
        run_once(call, tensors)
    key = "self_cuda_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=70))


def table(rows: list[Row]) -> str:
    """Aligned columns with units in the header."""
    head = ["case", "experts", "ms", "p20", "p80", "TFLOP/s", "of dense", "peak MiB", "kept MiB"]
    lines = [[*head, "error"]]
    for row in rows:
        figures = [f"{x:.3f}" for x in (row.ms, row.ms_p20, row.ms_p80)] + [f"{row.tflops:.0f}"]
        for value, style in (
            (row.of_dense, ".3f"),
            (row.peak_mib, ".0f"),
            (row.kept_mib, ".0f"),
            (row.error, ".1e"),
        ):
            figures.append("-" if value is None else format(value, style))
        lines.append([row.case, row.implementation, *figures])
    return "\n" + aligned(lines, left=(0, 1))


if __name__ == "__main__":
    main()
