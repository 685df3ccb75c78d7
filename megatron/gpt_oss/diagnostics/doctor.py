# Copyright (c) 2026, the megatron-core gptoss authors.

"""`gptoss doctor`: which attention kernels this machine supports, their speed, and hints.

Reports which backend a run would select and why the others are not supported.
"""

import ctypes.util
import importlib.util
import json
import os
import platform
import statistics
from dataclasses import replace
from pathlib import Path

import torch

from megatron.core.transformer.sink_attention import registry
from megatron.core.transformer.sink_attention.backends.base import package_version
from megatron.gpt_oss.arguments.te_requirements import describe
from megatron.gpt_oss.diagnostics.attention_timing import Workload, errors, time_interleaved
from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.outputs import MADE_BY, check_file, write_file
from megatron.gpt_oss.presets import get_preset
from megatron.gpt_oss.text_table import aligned

DOCTOR = "gptoss doctor"

# bf16 rounding errors are about 3e-3; a wrong mask, scale or sink gives errors far above the limit.
_ERROR_LIMIT = 1e-2

# `math` is never selected on a GPU; FlexAttention compiles for a minute.
_NOT_MEASURED = ("math", "flex")


def run_doctor(
    preset_name: str = "20b",
    seqlen: int = 8192,
    measure: bool = True,
    compile_flex: bool = False,
    json_path: str | None = None,
) -> dict:
    """Print the report, and return it.

    Args:
        preset_name: preset whose heads and window the cases use.
        seqlen: tokens of a case.
        measure: time the kernels if there is a GPU.
        compile_flex: also time FlexAttention, which compiles for a minute.
        json_path: file for the report as JSON; None: none.
    Raises:
        UsageError: seqlen is below 2, or the JSON cannot be written.
    """
    if seqlen < 2:
        raise UsageError(f"--seqlen {seqlen}: give 2 or more.")
    if json_path is not None:
        if json_path and not Path(json_path).absolute().parent.is_dir():
            raise UsageError(
                f"--json {json_path}: no directory {Path(json_path).absolute().parent}."
            )
        check_file(json_path, DOCTOR, "--json")
    cuda = torch.cuda.is_available()
    report = {MADE_BY: DOCTOR, "versions": versions(), "cases": []}
    print(aligned(list(report["versions"].items()), header=False, left=(0, 1)))
    for workload in _workloads(get_preset(preset_name), seqlen):
        case = examine(workload, cuda, measure and cuda, compile_flex)
        report["cases"].append(case)
        print(f"\n{_title(workload)}\n{_table(case)}")
    report["transformer_engine"] = describe()
    print(f"\n{report['transformer_engine']}")
    report["advice"] = advice(report)
    print("\n" + "\n".join(f"- {line}" for line in report["advice"]))
    if json_path is not None:
        write_file(json_path, json.dumps(report, indent=1) + "\n")
    return report


def versions() -> dict[str, str]:
    """Versions of Python, PyTorch, CUDA and the attention packages, and the GPU."""
    found = {"Python": platform.python_version(), "PyTorch": torch.__version__}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found["GPU"] = (
            f"{torch.cuda.device_count()} x {card.name}, {card.total_memory / 2**30:.0f} GiB, "
            f"compute capability {card.major}.{card.minor}"
        )
        found["CUDA"] = str(torch.version.cuda)
        found["cuDNN of PyTorch"] = str(torch.backends.cudnn.version())
    else:
        found["GPU"] = "none usable by PyTorch"
    packages = {
        "triton": "triton",
        "TransformerEngine": "transformer-engine",
        "flash-attn (2)": "flash-attn",
        "flash-attn-3": "flash-attn-3",
        "flash-attn-4": "flash-attn-4",
    }
    for label, name in packages.items():
        found[label] = package_version(name) or "not installed"
    impl = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    if impl is not None:
        found["under PyTorch's flash operators"] = impl
    return found


def examine(workload: Workload, cuda: bool, measure: bool, compile_flex: bool) -> dict:
    """One case: whether each backend supports it, and its speed."""
    reasons = workload.unsupported_reasons()
    chosen = workload.selected_backend()
    rows = {name: {"supported": r is None, "reason": r} for name, r in reasons.items()}
    if measure:
        _measure(workload, rows, compile_flex)
    for row in rows.values():
        row["able"] = row["supported"]  # former name, for one version
    return {"case": workload.kind, "seqlen": workload.seqlen, "auto": chosen, "backends": rows}


def _measure(workload: Workload, rows: dict, compile_flex: bool) -> None:
    skipped = [name for name in _NOT_MEASURED if name != "flex" or not compile_flex]
    tensors = workload.tensors()
    calls = {}
    for name, row in rows.items():
        if not row["supported"] or name in skipped:
            continue
        try:  # a kernel that fails must not hide the others
            row["error"] = _first_run(workload, name)
            calls[name] = (workload.call(name), True)
        except Exception as error:
            row["reason"] = f"failed: {type(error).__name__}: {str(error).splitlines()[0]}"
            row["supported"] = False
    for name, times in time_interleaved(calls, tensors, seconds=1.0).items():
        rows[name]["ms"] = statistics.median(times)
        rows[name]["tflops"] = workload.flops / rows[name]["ms"] / 1e9


def _first_run(workload: Workload, name: str) -> float:
    """Compile and check a backend on a short sequence; returns the largest relative error.

    Raises:
        RuntimeError: the error is above the limit.
    """
    documents = (1, 255, 256) if workload.documents else None
    worst = max(errors(replace(workload, seqlen=512, documents=documents), name).values())
    if not worst < _ERROR_LIMIT:
        raise RuntimeError(f"wrong result, relative error {worst:.1e}")
    return worst


def advice(report: dict) -> list[str]:
    """Hints, one sentence each."""
    lines = []
    if not torch.cuda.is_available():
        lines.append(
            "No GPU: attention runs in plain PyTorch (math), which is fast enough only for the "
            "tiny preset."
        )
    by_name = [case["backends"] for case in report["cases"]]
    for name, backend in registry.BACKENDS.items():
        gap = by_name and all(not rows[name]["supported"] for rows in by_name)
        if torch.cuda.is_available() and gap and backend.hint and name != "fa4_native":
            lines.append(f"{name}: {by_name[0][name]['reason']}. {backend.hint}")
    mismatch = cudnn_mismatch()
    if mismatch:
        lines.append(mismatch)
    if not lines:
        lines.append("All requirements are met.")
    return lines


def cudnn_mismatch() -> str | None:
    """A hint if TransformerEngine may load another cuDNN and silently use unfused attention."""
    if importlib.util.find_spec("transformer_engine") is None or os.environ.get("CUDNN_HOME"):
        return None
    system = ctypes.util.find_library("cudnn")
    if system is None or importlib.util.find_spec("nvidia.cudnn") is None:
        return None
    directory = next(iter(importlib.util.find_spec("nvidia.cudnn").submodule_search_locations))
    return (
        f"TransformerEngine finds {system} on the system in addition to PyTorch's own cuDNN and "
        f"may fall back to unfused attention: export CUDNN_HOME={directory}"
    )


def _workloads(preset, seqlen: int) -> list[Workload]:
    heads = dict(
        heads=preset.num_attention_heads, groups=preset.num_query_groups, dim=preset.head_dim
    )
    window_size = (min(preset.sliding_window, seqlen) - 1, 0)
    half = seqlen // 2
    return [
        Workload("full", seqlen, **heads),
        Workload("window", seqlen, window_size=window_size, **heads),
        Workload("packed", seqlen, documents=(half, seqlen - half), **heads),
    ]


def _title(workload: Workload) -> str:
    left = None if workload.window_size is None else workload.window_size[0]
    mask = "all keys" if left is None else f"window of {left + 1}"
    shape = f"{workload.heads} heads, {workload.groups} groups, dim {workload.dim}"
    packed = f", {len(workload.documents)} documents packed" if workload.documents else ""
    return f"{workload.seqlen} tokens, causal, {mask}{packed}; {shape}, bf16"


def _table(case: dict) -> str:
    lines = [["backend", "can run", "ms", "TFLOP/s", "kernel, or reason"]]
    for name, row in case["backends"].items():
        mark = " <- auto" if name == case["auto"] else ""
        figures = ["", ""]
        if "ms" in row:
            figures = [f"{row['ms']:.2f}", f"{row['tflops']:.0f}"]
        text = row["reason"] or registry.BACKENDS[name].kernel + mark
        lines.append([name, "yes" if row["supported"] else "no", *figures, text])
    return aligned(lines, left=range(len(lines[0])))
