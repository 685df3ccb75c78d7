# Copyright (c) 2026, the megatron-core gptoss authors.

"""Measured rates of the planner, and the benchmark of each.

    python -m megatron.gpt_oss.planner.rates benchmarks/results     writes rates.json

rates.json contains what the planner needs of benchmarks/results, and the names of these files.
"""

import json
import sys
from bisect import bisect_left
from functools import lru_cache
from pathlib import Path
from typing import Sequence

PATH = Path(__file__).with_name("rates.json")
ATTENTION, EXPERTS, CONTEXT = "attention_h100", "experts_h100", "context_parallel_h100x2"
# Two layers and head: forward and backward alone, which is without the optimizer's memory; a step.
TE_FORWARD_BACKWARD, TE_STEP = "te_layers_forward_backward_h100x2", "te_layers_h100x2"
# The benchmark's name of TransformerEngine with each --fp8-recipe.
TE_BACKENDS = {
    "bf16": "TE bf16, our attention",
    "tensorwise": "TE FP8 current scaling",
    "blockwise": "TE FP8 blockwise",
}
# Sequence lengths, and routed tokens, of the benchmarks' cases by name.
_LENGTHS = {"8k": 8192, "32k": 32768, "64k": 65536, "128k": 131072}
_ROUTED_TOKENS = {"16k": 16384, "32k": 32768, "131k": 131072}


class Rates:
    """Look-ups in rates.json.

    Args:
        data: content of the file; the packaged one by default.
    """

    def __init__(self, data: dict | None = None):
        self.data = load() if data is None else data

    def attention(self, length: int, backend: str) -> float:
        """FLOP/s of full causal attention, forward and backward, on one GPU.

        Raises:
            KeyError: the backend was not measured.
        """
        return 1e12 * _interpolate(self.data["attention"]["full_tflops"][backend], length)

    def window(self, backend: str) -> float:
        """Seconds per token of windowed attention with 64 heads, forward and backward."""
        times = self.data["attention"]["window_ns_per_token"]
        return 1e-9 * times.get(backend, times["aten_fa2"])

    def attention_backward_bytes(self) -> int:
        """Bytes that an attention backward allocates per element of the query.

        It includes dq, dk and dv; of cuDNN and FlashAttention 2 (FlashAttention 4 needs less).
        """
        return self.data["attention"]["backward_bytes_per_query_element"]

    def context_parallel_efficiency(self, length: int, comm_type: str) -> float:
        """Efficiency of full attention over two ranks: time on one GPU / (2 x time)."""
        rates = self.data["context_parallel"]["efficiency"]
        return _interpolate(rates.get(comm_type.removesuffix("+p2p"), rates["p2p"]), length)

    def halo_efficiency(self) -> float:
        """The same for windowed attention, which communicates its halo."""
        return self.data["context_parallel"]["window_efficiency"]

    def dense_gemm(self, tokens: int) -> float:
        """FLOP/s of a dense GEMM, forward, dgrad and wgrad."""
        return 1e12 * _interpolate(self.data["experts"]["dense_tflops"], tokens)

    def experts(self, routed_tokens: int, recompute: bool) -> float:
        """FLOP/s of a layer's experts; the time includes bias, activation and router weight."""
        name = "recompute_tflops" if recompute else "grouped_tflops"
        return 1e12 * _interpolate(self.data["experts"][name], routed_tokens)

    def memory(self) -> float:
        """Bytes/s of memory-bound kernels: the experts' fused activation."""
        return 1e9 * self.data["experts"]["memory_gb_per_s"]

    def transformer_engine(self, recipe: str) -> dict | None:
        """Memory and time of TransformerEngine over the local layers; None: not measured.

        Args:
            recipe: of --fp8-recipe, or bf16.
        """
        return self.data["transformer_engine"].get(recipe)


@lru_cache(maxsize=1)
def load() -> dict:
    """The packaged file."""
    return json.loads(PATH.read_text(encoding="utf-8"))


def _interpolate(points: list[list[float]], x: float) -> float:
    """Linear interpolation between measured points; outside of them the nearest."""
    right = bisect_left([at for at, _ in points], x)
    if right in (0, len(points)):
        return points[min(right, len(points) - 1)][1]
    (x0, y0), (x1, y1) = points[right - 1 : right + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def collect(directory: Path) -> dict:
    """The content of rates.json from the benchmarks' results.

    Raises:
        FileNotFoundError: a result is missing.
    """
    results = {
        name: json.loads((directory / f"{name}.json").read_text(encoding="utf-8"))
        for name in (ATTENTION, EXPERTS, CONTEXT, TE_FORWARD_BACKWARD, TE_STEP)
    }
    sources = {
        name: {
            "file": f"benchmarks/results/{name}.json",
            **{key: found["machine"].get(key) for key in ("gpu", "torch", "commit")},
            "date": found["date"],
        }
        for name, found in results.items()
    }
    steps = [results[name]["rows"] for name in (TE_FORWARD_BACKWARD, TE_STEP)]
    return {
        "sources": sources,
        "attention": _attention(results[ATTENTION]["rows"]),
        "experts": _experts(results[EXPERTS]["rows"]),
        "context_parallel": _context_parallel(results[CONTEXT]["rows"]),
        "transformer_engine": _transformer_engine(*steps),
    }


def _points(rows: Sequence[dict], lengths: dict, field: str, case: str = "{}") -> list:
    """[length, value] of the measured cases, ascending."""
    by_case = {row["case"]: row[field] for row in rows}
    found = [
        [length, round(by_case[case.format(name)], 4)]
        for name, length in lengths.items()
        if case.format(name) in by_case
    ]
    return sorted(found)


def _attention(rows: list[dict]) -> dict:
    full, window = {}, {}
    for backend in sorted({row["backend"] for row in rows} - {"auto"}):
        own = [row for row in rows if row["backend"] == backend]
        if points := _points(own, _LENGTHS, "tflops", "causal-{}"):
            full[backend] = points
        if points := _points(own, _LENGTHS, "ms", "window-{}"):
            length, milliseconds = points[-1]
            window[backend] = round(1e6 * milliseconds / length, 2)
    backward = next(r for r in rows if (r["case"], r["backend"]) == ("causal-32k", "cudnn"))
    query_elements = 32768 * 64 * 64
    return {
        "full_tflops": full,
        "window_ns_per_token": window,
        "backward_bytes_per_query_element": round(backward["beyond_mib"] * 2**20 / query_elements),
    }


def _experts(rows: list[dict]) -> dict:
    by_kind = {
        kind: _points([row for row in rows if row["implementation"] == kind], _ROUTED_TOKENS, field)
        for kind, field in (("dense", "tflops"), ("grouped", "tflops"), ("recompute", "tflops"))
    }
    # "grouped" has the memory-bound kernels in addition to its two GEMMs. Bytes per routed token:
    # the activation reads 2 x ffn and writes ffn, its backward reads 3 x ffn and writes 2 x ffn;
    # the bias gradient of fc2 reads hidden. bf16, 2880 by 2880.
    times = {
        kind: dict(_points([r for r in rows if r["implementation"] == kind], _ROUTED_TOKENS, "ms"))
        for kind in ("grouped", "grouped-gemm")
    }
    token_bytes = 2 * (3 + 5) * 2880 + 2 * 2880
    count = max(times["grouped"])
    seconds = 1e-3 * (times["grouped"][count] - times["grouped-gemm"][count])
    return {
        "dense_tflops": by_kind["dense"],
        "grouped_tflops": by_kind["grouped"],
        "recompute_tflops": by_kind["recompute"],
        "memory_gb_per_s": round(count * token_bytes / seconds / 1e9, 1),
    }


def _context_parallel(rows: list[dict]) -> dict:
    efficiency = {}
    for scheme in ("a2a", "all_gather", "p2p"):
        own = [row for row in rows if row["scheme"] == scheme]
        efficiency[scheme] = _points(own, _LENGTHS, "efficiency", "full-{}")
    windows = [row["efficiency"] for row in rows if row["case"].startswith("window-")]
    return {"efficiency": efficiency, "window_efficiency": round(min(windows), 4)}


def _transformer_engine(forward_backward: list[dict], step: list[dict]) -> dict:
    """Ratios to the local layers: memory of forward and backward, time in both runs."""
    runs = [
        {row["backend"]: row for row in rows if row["case"].startswith("two layers")}
        for rows in (forward_backward, step)
    ]
    found = {}
    for recipe, backend in TE_BACKENDS.items():
        times = sorted(run[backend]["ms"] / run["local"]["ms"] for run in runs)
        memory = runs[0][backend]["peak_mib"] / runs[0]["local"]["peak_mib"]
        found[recipe] = {
            "memory": round(memory, 2),
            "time": [round(ratio, 2) for ratio in times],
        }
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Write rates.json."""
    (directory,) = sys.argv[1:] if argv is None else argv
    text = json.dumps(collect(Path(directory)), indent=1) + "\n"
    temporary = PATH.with_suffix(".new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(PATH)


if __name__ == "__main__":
    main()
