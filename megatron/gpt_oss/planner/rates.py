# Copyright (c) 2026, the megatron-core gptoss authors.

"""The measured rates that the time of a step is made of, and where each was measured.

    python -m megatron.gpt_oss.planner.rates benchmarks/results     writes rates.json anew

rates.json has of benchmarks/results what the planner needs, and names the file of each part.
"""

import json
import sys
from bisect import bisect_left
from functools import lru_cache
from pathlib import Path
from typing import Sequence

PATH = Path(__file__).with_name("rates.json")
ATTENTION, EXPERTS, CONTEXT = "attention_h100", "experts_h100", "context_parallel_h100x2"
# Sequence lengths of the benchmarks' cases by name.
_LENGTHS = {"8k": 8192, "32k": 32768, "64k": 65536, "128k": 131072}
_ROWS = {"16k": 16384, "32k": 32768, "131k": 131072}


class Rates:
    """Look-ups in rates.json.

    Args:
        data: its content; the packaged file by default.
    """

    def __init__(self, data: dict | None = None):
        self.data = load() if data is None else data

    def attention(self, length: int, backend: str) -> float:
        """FLOP/s of full causal attention, forward and backward, on one GPU.

        Raises:
            KeyError: the backend was not measured.
        """
        return 1e12 * _between(self.data["attention"]["full_tflops"][backend], length)

    def window(self, backend: str) -> float:
        """Seconds a token of windowed attention of 64 heads takes, forward and backward."""
        rows = self.data["attention"]["window_ns_per_token"]
        return 1e-9 * rows.get(backend, rows["aten_fa2"])

    def split_attention(self, length: int, exchange: str) -> float:
        """Speed of a rank's share of full attention over that on one GPU, two ranks."""
        rows = self.data["context_parallel"]["efficiency"]
        return _between(rows.get(exchange.removesuffix("+p2p"), rows["p2p"]), length)

    def window_split(self) -> float:
        """The same for windowed attention, which exchanges its halo."""
        return self.data["context_parallel"]["window_efficiency"]

    def product(self, rows: int) -> float:
        """FLOP/s of one dense product and its gradients."""
        return 1e12 * _between(self.data["experts"]["dense_tflops"], rows)

    def experts(self, rows: int, makes_again: bool) -> float:
        """FLOP/s of a layer's experts, all of bias, activation and router weight in the time."""
        name = "recompute_tflops" if makes_again else "grouped_tflops"
        return 1e12 * _between(self.data["experts"][name], rows)

    def memory(self) -> float:
        """Bytes/s of what is bound by memory: the experts' fused activation."""
        return 1e9 * self.data["experts"]["memory_gb_per_s"]


@lru_cache(maxsize=1)
def load() -> dict:
    """The packaged file."""
    return json.loads(PATH.read_text(encoding="utf-8"))


def _between(points: list[list[float]], x: float) -> float:
    """Linear between measured points, the nearest beyond them."""
    places = [at for at, _ in points]
    right = bisect_left(places, x)
    if right in (0, len(points)):
        return points[min(right, len(points) - 1)][1]
    (x0, y0), (x1, y1) = points[right - 1 : right + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def collect(folder: Path) -> dict:
    """The content of rates.json from the benchmarks' results.

    Raises:
        FileNotFoundError: a result is missing.
    """
    results = {
        name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in (ATTENTION, EXPERTS, CONTEXT)
    }
    sources = {
        name: {
            "file": f"benchmarks/results/{name}.json",
            **{key: found["machine"].get(key) for key in ("gpu", "torch", "commit")},
            "date": found["date"],
        }
        for name, found in results.items()
    }
    return {
        "sources": sources,
        "attention": _attention(results[ATTENTION]["rows"]),
        "experts": _experts(results[EXPERTS]["rows"]),
        "context_parallel": _context_parallel(results[CONTEXT]["rows"]),
    }


def _points(rows: Sequence[dict], lengths: dict, field: str, case: str = "{}") -> list:
    """[length, value] of the cases of these names that were measured, ascending."""
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
    return {"full_tflops": full, "window_ns_per_token": window}


def _experts(rows: list[dict]) -> dict:
    by_kind = {
        kind: _points([row for row in rows if row["implementation"] == kind], _ROWS, field)
        for kind, field in (("dense", "tflops"), ("grouped", "tflops"), ("recompute", "tflops"))
    }
    # The fused passes over the rows are what grouped has beyond its two products. Bytes a row: the
    # activation reads 2 x width and writes it, its backward reads 3 and writes 2; the gradient of
    # the second product's bias reads hidden. bf16, 2880 by 2880.
    times = {
        kind: dict(_points([r for r in rows if r["implementation"] == kind], _ROWS, "ms"))
        for kind in ("grouped", "products")
    }
    row_bytes = 2 * (3 + 5) * 2880 + 2 * 2880
    count = max(times["grouped"])
    seconds = 1e-3 * (times["grouped"][count] - times["products"][count])
    return {
        "dense_tflops": by_kind["dense"],
        "grouped_tflops": by_kind["grouped"],
        "recompute_tflops": by_kind["recompute"],
        "memory_gb_per_s": round(count * row_bytes / seconds / 1e9, 1),
    }


def _context_parallel(rows: list[dict]) -> dict:
    efficiency = {}
    for scheme in ("a2a", "all_gather", "p2p"):
        own = [row for row in rows if row["scheme"] == scheme]
        efficiency[scheme] = _points(own, _LENGTHS, "efficiency", "full-{}")
    windows = [row["efficiency"] for row in rows if row["case"].startswith("window-")]
    return {"efficiency": efficiency, "window_efficiency": round(min(windows), 4)}


def main(argv: Sequence[str] | None = None) -> None:
    """Write rates.json."""
    (folder,) = sys.argv[1:] if argv is None else argv
    text = json.dumps(collect(Path(folder)), indent=1) + "\n"
    temporary = PATH.with_suffix(".new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(PATH)


if __name__ == "__main__":
    main()
