# Copyright (c) 2026, the megatron-core gptoss authors.

"""A training step of gpt-oss-20b on one GPU, extrapolated from one layer of each kind.

    python -m benchmarks.training.train_step --json benchmarks/results/train_step_h100.json
    python -m benchmarks.training.train_step --cases 4k --profile
    python -m benchmarks.training.train_step --smoke                    (CPU, a minute)

24 layers do not fit on one card. Three models are therefore trained in this process: a windowed
layer, a full layer, and both, each with embedding, head, loss and AdamW step, all 32 experts at full
width, bf16 with fp32 gradients, master weights and moments. From their times

    full = both - windowed,   windowed = both - full,   head = windowed + full - both
    step = head + 12 x windowed + 12 x full

which is reported as extrapolated. AdamW's time, measured per parameter, is divided over 65,536
tokens. Routing is balanced by force, as in others' published figures, or left to a router whose bias
is `-log(expert + 1)` (`skewed`): the first expert gets 8 times its share.

`tokens/s` is per GPU. Model TFLOP/s count 6 per parameter and token and the visible query-key pairs,
without recomputation. Peak GiB is torch's for the model with both layers, including AdamW's step;
planned GiB is the plan of `gptoss plan`.

Cases that run only by name: `4k-fp8`, `32k-fp8` (the experts in FP8), `32k-parts` (experts in recomputed chunks), `32k-lean` (all of a layer
recomputed), and `-offload` (saved tensors are offloaded by benchmarks/lib/activation_offload.py).

Last, three layers and head are trained with increasing sequence lengths until the memory is full:
`lean` (experts in recomputed chunks), `fast` (no recomputation), `sequential` (SequentialMLP and all
logits at once, as upstream's local path, with our attention: upstream's saves s x s scores).
"""

import argparse
import contextlib
import io
import logging
import os
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import torch

from benchmarks.lib import report
from benchmarks.lib.activation_offload import MINIMUM_BYTES, ActivationOffload
from benchmarks.lib.flops import model_flops, num_parameters
from benchmarks.lib.harness import Trainer, make_batch, start_alone, timed
from megatron.core import device_utils
from megatron.gpt_oss.planner.layout import Layout, Recompute
from megatron.gpt_oss.planner.memory import peak_rank_memory
from megatron.gpt_oss.presets import get_preset
from megatron.gpt_oss.text_table import aligned

K = 1024
STEP_TOKENS = 64 * K
GIB = 2**30
# Experts in four recomputed chunks: at 128k the routed tokens alone are 20 GB.
EXPERTS_IN_PARTS = dict(
    recompute_granularity="selective", recompute_modules=["moe"], mlp_chunks_for_training=4
)
POLICY_LEAN = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
MODELS = {"windowed": [1], "full": [0], "both": [1, 0]}


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        length: of a sequence.
        size: sequences of a micro-batch.
        recompute: Megatron's arguments.
        loss_chunk: tokens whose logits live at a time.
        skewed: a router of its own in place of forced balance.
        offload: activations are offloaded to CPU memory.
    """

    name: str
    length: int
    size: int
    recompute: dict
    loss_chunk: int
    skewed: bool = False
    overrides: tuple = ()
    offload: bool = False


CASES = [
    Case("4k", 4 * K, 8, {}, 4 * K),
    Case("32k", 32 * K, 1, {}, 4 * K),
    Case("128k", 128 * K, 1, EXPERTS_IN_PARTS, 4 * K),
    Case("4k-skewed", 4 * K, 8, {}, 4 * K, skewed=True),
    Case("32k-skewed", 32 * K, 1, {}, 4 * K, skewed=True),
    Case("4k-sequential", 4 * K, 1, {}, 0, overrides=(("moe_grouped_gemm", False),)),
]
FP8 = (("expert_fp8_recipe", "rowwise"),)
# By name alone.
MEMORY_CASES = [
    Case("4k-fp8", 4 * K, 8, {}, 4 * K, overrides=FP8),
    Case("32k-fp8", 32 * K, 1, {}, 4 * K, overrides=FP8),
    Case("32k-parts", 32 * K, 1, EXPERTS_IN_PARTS, 4 * K),
    Case("32k-lean", 32 * K, 1, POLICY_LEAN, 2 * K),
    Case("32k-offload", 32 * K, 1, {}, 4 * K, offload=True),
    Case("128k-lean", 128 * K, 1, POLICY_LEAN, 2 * K),
    Case("128k-offload", 128 * K, 1, {}, 4 * K, offload=True),
    Case("128k-parts-offload", 128 * K, 1, EXPERTS_IN_PARTS, 4 * K, offload=True),
]
# Three layers and ever longer sequences, until one does not fit.
GROWING = {
    "lean": (Case("lean", 128 * K, 1, EXPERTS_IN_PARTS, 4 * K), 16 * K),
    "fast": (Case("fast", 128 * K, 1, {}, 4 * K), 8 * K),
    "sequential": (replace(CASES[-1], name="sequential", length=32 * K), 2 * K),
}


@dataclass
class Row:
    """Measured and extrapolated figures of a case."""

    case: str
    tokens: int
    windowed_ms: float
    full_ms: float
    head_ms: float
    adamw_s: float
    tokens_per_second: float
    tflops: float
    peak_gib: float
    planned_gib: float
    layers_extrapolated: int
    offloaded_gib: float = 0.0  # a micro-batch, of two layers and head


@dataclass
class Growth:
    """The longest sequence with which three layers fit."""

    path: str
    tokens: int
    step: int
    peak_gib: float


def main() -> None:
    """Run the selected cases, print and write the results."""
    args = parse_arguments()
    facts = machine()
    print(" ".join(f"{name}={value}" for name, value in facts.items()), flush=True)
    rows, left_out, more = [], [], {"longest": [], "kernels": {}}
    preset = get_preset("tiny" if args.smoke else "20b")
    for case in args.chosen:
        begin = time.perf_counter()
        row = run_case(case, preset, args, left_out, more["kernels"])
        if row is None:
            print(f"{case.name}: {left_out[-1][1]}", flush=True)
            continue
        rows.append(row)
        print(table([row]), f"\n{time.perf_counter() - begin:.0f} s", flush=True)
        if args.json:
            report.write_rows(Path(args.json), facts, ["python"], rows, left_out, **more)
    for name in args.growing:
        more["longest"].append(vars(grow(name, preset, args.smoke)))
        print(more["longest"][-1], flush=True)
        if args.json:
            report.write_rows(Path(args.json), facts, ["python"], rows, left_out, **more)


def grow(name: str, preset, smoke: bool) -> Growth:
    """Train with increasing sequence lengths until the memory is full."""
    case, step = GROWING[name]
    if smoke:
        case, step = replace(case, length=256, loss_chunk=min(case.loss_chunk, 64)), 128
    trainer, longest, peak = build(case, preset, [1, 0, 1], smoke), 0, 0.0
    try:
        for tokens in range(step, case.length + 1, step):
            _, _, reached = measure(trainer, replace(case, length=tokens, size=1), 0)
            longest, peak = tokens, reached
    except torch.OutOfMemoryError as error:
        print(f"{name}, {tokens} tokens: {str(error).split('. See')[0]}", flush=True)
    finally:
        finish(trainer)
    return Growth(path=name, tokens=longest, step=step, peak_gib=peak)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; unknown names are rejected."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    by_name = {case.name: case for case in CASES + MEMORY_CASES}
    names = dict(nargs="*", type=report.current_word)
    parser.add_argument("--cases", metavar="NAME", help="of " + ", ".join(by_name), **names)
    parser.add_argument("--growing", choices=GROWING, default=list(GROWING), **names)
    parser.add_argument("--repeats", type=int, default=5, help="micro-batches that are timed")
    parser.add_argument(
        "--profile", action="store_true", help="kernels of a micro-batch into the JSON"
    )
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, for the CPU")
    args = parser.parse_args()
    names = [case.name for case in CASES] if args.cases is None else args.cases
    report.check_names(parser, names, by_name)
    args.chosen = [by_name[name] for name in names]
    if args.smoke:
        args.repeats = 1
        args.chosen = [replace(c, length=c.length // 64, loss_chunk=64) for c in args.chosen]
    return args


def machine() -> dict:
    """GPU, versions and commit of the results."""
    facts = report.machine("torch", "triton")
    if device_utils.is_cuda():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def run_case(case: Case, preset, args, left_out: list, kernels: dict) -> Row | None:
    """Time the three models and extrapolate; None if one does not fit."""
    seconds, updates, peak, offloaded = {}, {}, 0.0, 0.0
    for name, windows in MODELS.items():
        trainer = build(case, preset, windows, args.smoke)
        try:
            seconds[name], updates[name], peak = measure(trainer, case, args.repeats)
            if case.offload:
                offloaded = trainer.offload.bytes / GIB
            if args.profile and name == "both":
                kernels[case.name] = profile(trainer, case)
        except torch.OutOfMemoryError:
            left_out.append([case.name, f"out of memory with the model '{name}'"])
            return None
        finally:
            finish(trainer)
    windowed = seconds["both"] - seconds["full"]
    full = seconds["both"] - seconds["windowed"]
    head = seconds["windowed"] + seconds["full"] - seconds["both"]
    layer, rest = num_parameters(preset)
    adamw = updates["both"] / (2 * layer + rest) * (preset.num_layers * layer + rest)
    tokens = case.length * case.size
    num_windowed = sum(map(preset.is_windowed, range(preset.num_layers)))
    micro_batch = head + num_windowed * windowed + (preset.num_layers - num_windowed) * full
    rate = STEP_TOKENS / (micro_batch * STEP_TOKENS / tokens + adamw)
    flops = model_flops(preset, case.length)
    return Row(
        case=case.name,
        tokens=tokens,
        windowed_ms=windowed * 1e3,
        full_ms=full * 1e3,
        head_ms=head * 1e3,
        adamw_s=adamw,
        tokens_per_second=rate,
        tflops=rate * flops / case.length / 1e12,
        peak_gib=peak,
        planned_gib=planned(case, replace(preset, num_layers=len(MODELS["both"]))),
        layers_extrapolated=preset.num_layers,
        offloaded_gib=offloaded,
    )


def planned(case: Case, preset) -> float:
    """Planned GiB at the peak; nan with offload, which the planner does not support."""
    if case.offload:
        return float("nan")
    layout = Layout(
        preset,
        1,
        seq_length=case.length,
        micro_batch_size=case.size,
        global_batch_size=case.size,
        loss_chunk=case.loss_chunk,
        mlp_chunks=case.recompute.get("mlp_chunks_for_training", 1),
        recompute=Recompute(
            case.recompute.get("recompute_granularity"),
            tuple(case.recompute.get("recompute_modules", ())),
            case.recompute.get("recompute_method"),
        ),
        expert_fp8=FP8[0] in case.overrides,
    )
    return peak_rank_memory(layout).total / GIB


def build(case: Case, preset, windows: list[int], smoke: bool) -> Trainer:
    """A model with one layer per entry of windows; 1: windowed."""
    start_alone()
    with contextlib.redirect_stdout(io.StringIO()):  # Megatron counts parameters aloud
        trainer = Trainer(
            replace(preset, num_layers=len(windows)),
            loss_chunk=case.loss_chunk,
            bf16=not smoke,
            seq_length=case.length,
            micro_batch_size=case.size,
            window_attn_skip_freq=windows,
            **case.recompute,
            **dict(case.overrides),
        )
    if case.skewed:
        with torch.no_grad():
            for name, parameter in trainer.model[0].named_parameters():
                if name.endswith("router.bias"):
                    ranks = torch.arange(1, parameter.numel() + 1, device=parameter.device)
                    parameter.copy_(-ranks.log())
    else:
        trainer.transformer.moe_router_force_load_balancing = True
    if case.offload:
        trainer.offload = ActivationOffload(trainer.model[0], 0 if smoke else MINIMUM_BYTES)
    return trainer


def finish(trainer: Trainer) -> None:
    """Free the memory of a model, including NCCL's buffers."""
    trainer.close()
    torch.distributed.destroy_process_group()


def measure(trainer: Trainer, case: Case, repeats: int) -> tuple[float, float, float]:
    """Median seconds of forward and backward of a micro-batch; seconds of AdamW; peak GiB."""
    batches = [
        make_batch(trainer.preset.vocab_size, case.length, case.size, seed)
        for seed in range(min(3, repeats + 1))
    ]
    steps, updates = [], []
    trainer.zero_gradients()
    for repeat in range(repeats + 2):  # two to warm up
        steps.append(timed(lambda: trainer.forward_backward(batches[repeat % len(batches)])))
        if repeat < 3:
            updates.append(timed(trainer.update))
            trainer.zero_gradients()
        if repeat == 0 and device_utils.is_cuda():
            torch.cuda.reset_peak_memory_stats()
    peak = torch.cuda.max_memory_allocated() / GIB if device_utils.is_cuda() else float("nan")
    return median(steps[2:] or steps), min(updates[1:]), peak


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def profile(trainer: Trainer, case: Case) -> list[dict]:
    """Kernels of one micro-batch by time; those below 0.1 ms are summed."""
    batch = make_batch(trainer.preset.vocab_size, case.length, case.size)
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as found:
        trainer.forward_backward(batch)
        if device_utils.is_cuda():
            torch.cuda.synchronize()
    kernels = [e for e in found.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda e: -e.self_device_time_total)
    rows = [
        {"kernel": e.key[:160], "calls": e.count, "ms": e.self_device_time_total / 1e3}
        for e in kernels
    ]
    small = [row for row in rows if row["ms"] < 0.1]
    rest = {"kernel": "all others", "calls": sum(row["calls"] for row in small)}
    return [*rows[: len(rows) - len(small)], {**rest, "ms": sum(row["ms"] for row in small)}]


def table(rows: list[Row]) -> str:
    """Aligned columns with units in the header."""
    lines = [
        [
            "case",
            "tokens",
            "windowed ms",
            "full ms",
            "head ms",
            "AdamW s",
            "tokens/s (24 layers, extrapolated)",
            "TFLOP/s",
            "peak GiB",
            "planned GiB",
        ]
    ]
    for row in rows:
        figures = [f"{x:.2f}" for x in (row.windowed_ms, row.full_ms, row.head_ms, row.adamw_s)]
        figures += [f"{row.tokens_per_second:.0f}", f"{row.tflops:.0f}", f"{row.peak_gib:.2f}"]
        figures.append(f"{row.planned_gib:.2f}")
        lines.append([row.case, str(row.tokens), *figures])
    return aligned(lines, left=(0,))


if __name__ == "__main__":
    main()
