# Copyright (c) 2026, the megatron-core gptoss authors.
"""`gptoss report`: curves and configuration of a run as one self-contained HTML file."""

import json
from html import escape
from pathlib import Path

from megatron.gpt_oss.data.tokenize.documents import printable
from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.json_file import brief
from megatron.gpt_oss.outputs import check_file, write_file
from megatron.gpt_oss.training.metrics.jsonl import read_metrics
from megatron.gpt_oss.training.metrics.svg_chart import line_chart
from megatron.gpt_oss.training.run_file import RUN_FILE, find_run_file, recorded_arguments

REPORT = "gptoss report"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
svg { width: 100%; max-width: 46rem; } svg text { font-size: 11px; fill: #444; }
svg polyline { fill: none; stroke-width: 1.5; } svg .grid { stroke: #ddd; }
table { border-collapse: collapse; } td { padding: 0 1rem 0 0; vertical-align: top; }
td:last-child { font-family: ui-monospace, monospace; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; background: #f4f4f5; padding: .5rem; }
"""
_STEP_CURVES = (
    ("Learning rate", ("learning_rate",)),
    ("Gradient norm", ("grad_norm",)),
    ("Tokens/s/GPU", ("tokens_per_second_per_gpu",)),
    ("Model TFLOP/s/GPU", ("tflops_per_gpu",)),
    ("MFU", ("mfu",)),
    ("Router losses", ("load_balancing_loss", "global_load_balancing_loss", "z_loss")),
)


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write the HTML report of a run.

    Args:
        run_dir: --run-dir of the run, with metrics.jsonl and run.json.
        out: the HTML file; RUN/report.html by default. A report of an earlier call is replaced.
    Raises:
        UsageError: there is no metrics.jsonl, it has no step yet, or `out` is another file.
    """
    run_dir = Path(run_dir)
    run_file = find_run_file(run_dir) or run_dir / RUN_FILE
    inputs = [run_dir / "metrics.jsonl", run_file]
    records = read_metrics(inputs[0])
    out = Path(out) if out is not None else run_dir / "report.html"
    check_file(out, REPORT, "--out", inputs)
    steps = list({r["step"]: r for r in records if "loss" in r}.values())
    if not steps:
        raise UsageError(f"{run_dir / 'metrics.jsonl'} has no record with a step and a loss yet.")
    sections = [_summary(steps), _section("Loss", line_chart(_losses(records, steps), "loss"))]
    for title, keys in _STEP_CURVES:
        sections.append(_section(title, line_chart({k: _curve(steps, k) for k in keys}, title)))
    sections += [_layer_charts(records), _norm_charts(records), _samples(records)]
    sections.append(_configuration(run_file))
    name = _text(printable(run_dir.resolve().name))
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="generator" content="{REPORT}"><title>{name}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{name}</h1>{''.join(sections)}</body></html>\n"
    )
    # JSON may contain lone surrogates, which UTF-8 cannot encode.
    write_file(out, page.encode("utf-8", errors="backslashreplace").decode("utf-8"))
    return out


def _curve(records: list[dict], key: str) -> list[tuple[float, float]]:
    return [(r["step"], r[key]) for r in records if r.get(key) is not None]


def _losses(records: list[dict], steps: list[dict]) -> dict:
    curves = {"training": _curve(steps, "loss")}
    for record in records:
        for key in ("valid_loss", "test_loss"):
            if record.get(key) is not None:
                points = curves.setdefault(record.get("set", key), [])
                points.append((record["step"], record[key]))
    return curves


def _summary(steps: list[dict]) -> str:
    first, last = steps[0], steps[-1]
    return (
        f"<p>Steps {_text(first['step'])} to {_text(last['step'])}, "
        f"{_text(format(last.get('tokens') or 0, ','))} tokens: loss "
        f"{_text(_shown(first['loss']))} to {_text(_shown(last['loss']))}.</p>"
    )


def _shown(number: float | None) -> str:
    return "-" if number is None else f"{number:.4f}"


def _text(value: object) -> str:
    """A value as escaped HTML text."""
    text = str(value)
    return escape("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text))


def _section(title: str, content: str) -> str:
    return f"<h2>{_text(title)}</h2>\n{content}\n" if content else ""


def _layer_charts(records: list[dict]) -> str:
    loads = [(r["step"], r["experts"]) for r in records if "experts" in r]
    parts = []
    for key, title in (
        ("max_expert_share", "Share of the most loaded expert, by layer"),
        ("load_cv", "Coefficient of variation of the expert load, by layer"),
        ("router_entropy", "Entropy of the router (nats), by layer"),
    ):
        points = [(step, load[key]) for step, load in loads if load.get(key)]
        layers = len(points[0][1]) if points else 0
        # At most six curves: the first and the last layer, and up to four in between.
        shown = sorted({round(i * (layers - 1) / 5) for i in range(6)}) if layers else []
        series = {f"layer {i}": _of_layer(points, i) for i in shown}
        parts.append(_section(title, line_chart(series, title)))
    return "".join(parts)


def _of_layer(points: list[tuple[int, list]], layer: int) -> list[tuple[int, float]]:
    found = [(step, values[layer]) for step, values in points if layer < len(values)]
    return [(step, value) for step, value in found if value is not None]


def _norm_charts(records: list[dict]) -> str:
    norms = [(r["step"], r["norms"]) for r in records if "norms" in r]
    parts = []
    for key, title in (
        ("grad_norm", "Gradient norm by kind of module"),
        ("weight_norm", "Weight norm by kind of module"),
        ("sinks", "Range of the sinks"),
    ):
        kinds = norms[-1][1].get(key, {}) if norms else {}
        series = {
            kind: [
                (step, n[key][kind]) for step, n in norms if n.get(key, {}).get(kind) is not None
            ]
            for kind in kinds
        }
        parts.append(_section(title, line_chart(series, title)))
    return "".join(parts)


def _samples(records: list[dict]) -> str:
    texts = [(r["step"], r["sample"]["text"]) for r in records if "sample" in r]
    return _section(
        "Samples",
        "".join(f"<p>Step {_text(step)}</p><pre>{_text(text)}</pre>" for step, text in texts[-10:]),
    )


def _configuration(path: Path) -> str:
    if not path.is_file():
        return _section("Configuration", f"<p>No {_text(path.name)} in the run directory.</p>")
    try:
        values = recorded_arguments(path)
    except UsageError as error:  # the curves are still useful
        return _section("Configuration", f"<p>{_text(error)}</p>")
    rows = "".join(
        f"<tr><td>{_text(name)}</td><td>{_text(_json(value))}</td></tr>"
        for name, value in sorted(values.items())
    )
    return _section("Configuration", f"<table>{rows}</table>")


def _json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return brief(value)
