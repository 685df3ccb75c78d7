# Copyright (c) 2026, the megatron-core gptoss authors.

"""`gptoss report`: one well-formed HTML file with every curve and every argument."""

import json
import re
from xml.etree import ElementTree

import pytest

from megatron.gpt_oss import cli
from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.training.metrics.report import write_report
from megatron.gpt_oss.training.metrics.svg_chart import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    line_chart,
)


def polyline(svg):
    root = ElementTree.fromstring(svg)
    points = next(root.iter("polyline")).get("points").split()
    return [tuple(map(float, point.split(","))) for point in points]


def test_points_lie_where_the_axes_say():
    """A straight line stays one, and a tick's line runs at its value."""
    points = polyline(line_chart({"a": [(0, 1.0), (5, 2.0), (10, 3.0)]}, "x"))
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert LEFT < x0 < x2 < WIDTH - RIGHT and TOP < y2 < y0 < HEIGHT - BOTTOM
    root = ElementTree.fromstring(line_chart({"a": [(0, 1.0), (5, 2.0), (10, 3.0)]}, "x"))
    lines = [float(line.get("y1")) for line in root.iter("line")]
    ticks = [text.text for text in root.iter("text")][: len(lines)]
    assert lines[ticks.index("2")] == pytest.approx(y1, abs=0.1)


def test_awkward_series():
    assert line_chart({"a": [(1, float("nan"))], "b": []}, "x") == ""
    assert "<circle" in line_chart({"one & <only>": [(3, 0.0)]}, "x")
    assert len(polyline(line_chart({"a": [(i, float(i)) for i in range(100_000)]}, "x"))) <= 1001
    ElementTree.fromstring(line_chart({"flat": [(1, 1e-5), (2, 1e-5)]}, "x"))


def test_page(tmp_path, capsys):
    run = tmp_path / "run <1>"
    run.mkdir()
    records = [
        {"step": s, "loss": 5.0 - s, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens": 64 * s}
        for s in (1, 2, 3)
    ]
    load = {"max_expert_share": [0.3, 0.2], "load_cv": [0.5, 0.1], "router_entropy": [2.0, 1.9]}
    norms = {"grad_norm": {"router": 0.5}, "weight_norm": {"router": 9.0}}
    norms["sinks"] = {"min": -1.0, "max": 2.0}
    records += [{"step": s, "experts": load} for s in (1, 3)]
    records += [{"step": s, "norms": norms} for s in (1, 3)]
    records += [
        {"step": 3, "set": "validation", "valid_loss": 2.5},
        {"step": 3, "sample": {"prompt": "", "text": "<b>&"}},
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    (run / "arguments.json").write_text(json.dumps({"lr": 1e-3, "data_path": ["<&>"]}))
    cli.main(["report", str(run)])
    assert "report.html: written" in capsys.readouterr().out
    page = (run / "report.html").read_text()
    assert page.count("<svg") == 3 + 3 + 3  # loss, rate, norm; three by layer; three by kind
    for words in ("loss 4.0000 to 2.0000", "192 tokens", "validation", "layer 1", "&lt;b&gt;&amp;"):
        assert words in page
    assert "<td>data_path</td><td>[&quot;&lt;&amp;&gt;&quot;]</td>" in page
    assert not re.search("src=|href=|url\\(|@import|<script", page)  # self-contained


def test_nothing_to_report(tmp_path):
    with pytest.raises(UsageError, match="No file .*metrics.jsonl"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UsageError, match="no record"):
        write_report(tmp_path)
