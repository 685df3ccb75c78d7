# Copyright (c) 2026, the megatron-core gptoss authors.

"""Write the tables of docs/ from the committed results.

    python -m benchmarks.doc_tables

A test compares the tables with the results.
"""

import json
import re
from pathlib import Path

from benchmarks.lib import report
from benchmarks.lib.flops import attention_flops, linear_flops
from benchmarks.training import checkpoint, whole_model
from megatron.gpt_oss.presets import get_preset

RESULTS = Path(__file__).parent / "results"
DOCS = report.ROOT / "docs"
# Best rate of GEMMs in TFLOP/s: the roofline of docs/performance.md.
GEMM_RATE = 560.0
# Patterns of kernel names; the first match counts.
CLASSES = [
    ("expert GEMMs", "^_grouped_|GroupProblemShape"),
    ("cross entropy", "^_to_gradient|^_row_statistics"),
    ("expert activation and bias", "^_swiglu|_weighted_bias|^_sum_tiles"),
    ("permute and unpermute", "gather_kernel|^_sum_by_token|radix_sort|index"),
    ("attention", "flash|fmha|convert_dq|dot_do_o|_sink_|_sink$"),
    ("RoPE, bias, residual", "^_split_and_rotate$|^_add$"),
    ("RMSNorm", "layer_norm|GammaBeta"),
    ("GEMMs of head and attention", "nvjet|gemm"),
    ("fp32 accumulation of weight gradients", "CUDAFunctor_add<float>"),
]


def main() -> None:
    """Write every section."""
    for (page, section), text in sections().items():
        report.write_section(DOCS / page, section, text)


def sections() -> dict[tuple[str, str], str]:
    """Text by page and section."""
    return {
        ("performance.md", "training step"): step_section(),
        ("performance.md", "activation offload 32k"): step_section("activation_offload_32k_h100"),
        ("performance.md", "activation offload 128k"): step_section("activation_offload_128k_h100"),
        ("performance.md", "whole model"): whole_model_section(),
        ("performance.md", "kernels"): kernel_section(),
        ("performance.md", "loss"): loss_section(),
        ("performance.md", "experts"): experts_section(),
        ("performance.md", "elementwise"): elementwise_section(),
        ("fp8.md", "experts"): experts_section("experts_fp8_h200"),
        ("fp8.md", "training step"): step_section("train_step_fp8_h200"),
        ("context_parallel.md", "two GPUs"): context_parallel_section(),
        ("context_parallel.md", "model on two GPUs"): context_parallel_model_section(),
        ("continual_pretraining.md", "checkpoints"): checkpoint_section(),
        ("transformer_engine.md", "attention"): te_attention_section(),
        ("transformer_engine.md", "two layers"): te_step_section(),
    }


def load(name: str) -> dict:
    """A result file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def source(name: str, found: dict) -> str:
    """File, command, card and versions."""
    facts = found["machine"]
    card = (facts.get("gpu") or facts.get("device") or facts["cpu"]).replace("_", " ")
    words = [card] + [f"{k} {facts[k]}" for k in ("torch", "triton", "commit") if k in facts]
    link = f"[JSON](../benchmarks/results/{name}.json)"
    return f"{link}: `{report.current_command(found['command'])}`, {found['date']}; {', '.join(words)}."


def step_section(name: str = "train_step_h100") -> str:
    """Tokens/s of the whole model, extrapolated."""
    found = load(name)
    header = ["case", "tokens", "windowed layer, ms", "full layer, ms", "head, ms", "AdamW, s"]
    header += ["tokens/s/GPU, extrapolated", "model TFLOP/s", "peak GiB, 2 layers", "planned GiB"]
    rows = []
    for row in found["rows"]:
        figures = [f"{row[k]:.1f}" for k in ("windowed_ms", "full_ms", "head_ms")]
        figures += [f"{row['adamw_s']:.2f}", f"{row['tokens_per_second']:,.0f}"]
        figures += [
            figure(row, k, d) for k, d in (("tflops", 0), ("peak_gib", 1), ("planned_gib", 1))
        ]
        rows.append([row["case"], f"{row['tokens']:,}", *figures])
    return report.markdown(header, rows) + "\n\n" + source(name, found)


def whole_model_section() -> str:
    """All layers, trained by pretrain_gpt_oss.py."""
    runs = ("h200x4", "routed_h200x4", "long_h200x4", "two_h200x2")
    names = [f"whole_model_{which}" for which in runs]
    found = {name: load(name) for name in names}
    rows = [row for one in found.values() for row in one["rows"]]
    lines = [whole_model.cells(whole_model.Row(**row)) for row in rows]
    sources = [source(name, one) for name, one in found.items()]
    return "\n\n".join([report.markdown(whole_model.HEADER, lines), *sources])


def checkpoint_section() -> str:
    """How long a save blocks training, on the CPU."""
    found = load("checkpoint_cpu")
    rows = [checkpoint.cells(checkpoint.Row(**row)) for row in found["rows"]]
    return report.markdown(checkpoint.HEADER, rows) + "\n\n" + source("checkpoint_cpu", found)


def kernel_section() -> str:
    """Kernel times of a micro-batch of two layers and head, and the roofline."""
    found = load("train_step_h100")
    cases = {"4k": (4096, 8), "32k": (32768, 1)}
    header = ["kernels"]
    for case in cases:
        header += [f"{case}, ms", f"{case}, roofline ms"]
    totals = {case: by_class(found["kernels"][case]) for case in cases}
    bounds = {case: roofline(*size) for case, size in cases.items()}
    names = [name for name, _ in CLASSES] + ["the rest"]
    names.sort(key=lambda name: -totals["32k"].get(name, 0))
    rows = []
    for name in names:
        line = [name]
        for case in cases:
            bound = bounds[case].get(name)
            line += [f"{totals[case].get(name, 0):.1f}", "-" if bound is None else f"{bound:.1f}"]
        rows.append(line)
    line = ["all"]
    for case in cases:
        line += [f"{sum(totals[case].values()):.1f}", f"{sum(bounds[case].values()):.1f}"]
    return report.markdown(header, [*rows, line])


def by_class(kernels: list[dict]) -> dict[str, float]:
    """Milliseconds of each class."""
    totals: dict[str, float] = {}
    for kernel in kernels:
        name = kernel["kernel"]
        matches = (label for label, pattern in CLASSES if re.search(pattern, name))
        label = next(matches, "the rest")
        totals[label] = totals.get(label, 0.0) + kernel["ms"]
    return totals


def roofline(length: int, size: int) -> dict[str, float]:
    """Milliseconds of GEMMs at GEMM_RATE, and of attention as measured alone."""
    preset = get_preset("20b")
    linear = linear_flops(preset, length)
    dense = 2 * linear.dense + linear.head
    attention = load("attention_h100")["rows"]
    full = next(r for r in attention if (r["case"], r["backend"]) == ("causal-32k", "cudnn"))
    window = next(r for r in attention if (r["case"], r["backend"]) == ("window-32k", "aten_fa2"))
    tokens = length * size
    return {
        "expert GEMMs": 2 * linear.experts * size / GEMM_RATE / 1e9,
        "GEMMs of head and attention": dense * size / GEMM_RATE / 1e9,
        "attention": attention_flops(preset, length, False) * size / full["tflops"] / 1e9
        + window["ms"] * tokens / 32768,
    }


def loss_section() -> str:
    """Head and loss."""
    found = load("lm_loss_h100")
    header = ["tokens", "loss", "ms", "TFLOP/s", "of unchunked", "workspace, MiB", "error"]
    rows = [
        [r["case"], r["loss"], f"{r['ms']:.1f}", f"{r['tflops']:.0f}"]
        + [f"{r['of_unchunked']:.2f}", f"{r['peak_mib']:,.0f}", f"{r['error']:.1e}"]
        for r in found["rows"]
    ]
    return report.markdown(header, rows) + "\n\n" + source("lm_loss_h100", found)


def experts_section(name: str = "experts_h100") -> str:
    """The experts of a layer."""
    found = load(name)
    header = ["routed tokens", "experts", "ms", "TFLOP/s", "of dense", "peak MiB", "saved MiB"]
    rows = []
    for r in found["rows"]:
        figures = [f"{r['ms']:.2f}", f"{r['tflops']:.0f}", figure(r, "of_dense", 2)]
        figures += [f"{r['peak_mib']:,.0f}", f"{r['kept_mib']:,.0f}"]
        rows.append([r["case"], r["implementation"], *figures])
    return report.markdown(header, rows) + "\n\n" + source(name, found)


def elementwise_section() -> str:
    """RoPE, bias and residual, RMSNorm."""
    found = load("elementwise_h100")
    header = ["case", "by", "ms", "of a copy of the same bytes", "error"]
    rows = []
    for r in found["rows"]:
        error = "-" if r["error"] is None else f"{r['error']:.1e}"
        rows.append(
            [r["case"], r["implementation"], f"{r['ms']:.3f}", f"{r['of_copy']:.2f}", error]
        )
    return report.markdown(header, rows) + "\n\n" + source("elementwise_h100", found)


def context_parallel_section() -> str:
    """All communication types on two GPUs."""
    found = load("context_parallel_h100x2")
    header = ["case", "requested", "used", "ms", "one GPU, ms", "efficiency", "MiB received"]
    rows = []
    for r in found["rows"]:
        halo = "" if r["halo_mib"] is None else f" ({r['halo_mib']:.3f} forward, as computed)"
        figures = [f"{r['ms']:.1f}", f"{r['one_gpu_ms']:.1f}", f"{r['efficiency']:.3f}"]
        rows.append(
            [r["case"], r["scheme"], r["taken"], *figures, f"{r['received_mib']:.1f}{halo}"]
        )
        if r["halo_mib"] is not None and not r["bytes_as_computed"]:
            raise SystemExit(f"{r['case']}: the halo's bytes are not the arithmetic's")
    return report.markdown(header, rows) + "\n\n" + source("context_parallel_h100x2", found)


def context_parallel_model_section() -> str:
    """Four layers at long context, and the check against cp 1."""
    found = load("context_parallel_model_h100x2")
    header = ["tokens", "layers", "losses", "s a step", "tokens/s/GPU", "TFLOP/s/GPU", "peak GB"]
    header += ["planned GB", "routed tokens, max / mean of ranks", "planned GB at that load"]
    rows = []
    for r in found["run"]:
        losses = ", ".join(f"{x:.2f}" for x in r["losses"])
        figures = [f"{r['step_seconds']:.3f}", f"{r['tokens_per_second_per_rank']:,.0f}"]
        figures += [f"{r['tflops_per_rank']:.0f}", f"{r['peak_gb']:.1f}"]
        figures += [f"{sum(r['expected'].values()) / 1e9:.1f}"]
        if "expert_load" in r:
            loaded = sum(r["expected_at_load"].values()) / 1e9
            figures += [f"{r['expert_load']:.2f}", f"{loaded:.1f}"]
        else:  # results from before routed tokens were counted
            figures += ["-", "-"]
        rows.append([f"{r['length']:,}", str(r["layers"]), losses, *figures])
    check = found["check"][0]
    text = (
        f"At {check['length']:,} tokens, which fit on one rank, {check['layers']} layers over both "
        f"ranks match one rank to {check['loss_error']:.1e} in the loss and "
        f"{check['grad_norm_error']:.1e} in the gradient norm."
    )
    name = "context_parallel_model_h100x2"
    return "\n\n".join([report.markdown(header, rows), text, source(name, found)])


def te_rows(steps: bool, name: str = "te_layers_h100x2") -> list[dict]:
    """The rows of attention, or of the steps."""
    rows = load(name)["rows"]
    return [row for row in rows if row["case"].startswith("two layers") == steps]


def figure(row: dict, key: str, digits: int) -> str:
    """A formatted figure; - if the result has none."""
    value = row.get(key)
    return "-" if value is None else f"{value:.{digits}f}"


def te_attention_section() -> str:
    """Attention of this project and of TransformerEngine."""
    columns = {"ms": 2, "tflops": 0, "peak_mib": 0, "beyond_mib": 0, "ratio": 3}
    header = ["case", "GPUs", "attention", "ms", "TFLOP/s/GPU", "peak MiB", "workspace, MiB"]
    header += ["time without / with a sink"]
    names = {"auto": "this project"}
    rows, worst = [], 0.0
    measured = te_rows(steps=False)
    cases = [r["case"] for r in measured]
    for r in sorted(measured, key=lambda r: (cases.index(r["case"]), r["ranks"])):
        figures = [figure(r, key, digits) for key, digits in columns.items()]
        rows.append([r["case"], str(r["ranks"]), names.get(r["backend"], r["backend"]), *figures])
        worst = max(worst, *r.get("errors", {"all": r.get("error")}).values())
    found = load("te_layers_h100x2")
    text = f"Errors against float64 are at most {worst:.1e} in every row. "
    return report.markdown(header, rows) + "\n\n" + text + source("te_layers_h100x2", found)


def te_step_section() -> str:
    """Two layers and head; with the times of an earlier run of forward and backward alone."""
    columns = {"adamw_ms": 1, "step_ms": 1, "peak_mib": 0}
    header = ["two layers and head", "forward + backward alone, ms", "forward + backward, ms"]
    header += ["p20 to p80", "AdamW, ms", "step, ms", "peak MiB"]
    earlier = "te_layers_forward_backward_h100x2"
    alone = {r["backend"]: r for r in te_rows(steps=True, name=earlier)}
    rows = []
    for r in te_rows(steps=True):
        times = [figure(alone[r["backend"]], "ms", 1), figure(r, "ms", 1)]
        times += [f"{figure(r, 'ms_p20', 1)} to {figure(r, 'ms_p80', 1)}"]
        figures = [figure(r, key, digits) for key, digits in columns.items()]
        rows.append([r["backend"], *times, *figures])
    text = "Forward and backward alone: " + source(earlier, load(earlier))
    return report.markdown(header, rows) + "\n\n" + text


if __name__ == "__main__":
    main()
