# Copyright (c) 2026, the megatron-core gptoss authors.

"""`gptoss doctor`, attention_timing and the benchmark's command line, without a GPU."""

import json
from pathlib import Path

import pytest
import torch

from megatron.core.transformer.sink_attention.registry import BACKENDS
from megatron.gpt_oss import cli
from megatron.gpt_oss.diagnostics import attention_timing, doctor

ROOT = Path(__file__).parents[4]
cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="describes a box without a GPU")


@cpu_only
def test_without_a_gpu(tmp_path, capsys):
    """Every backend with its reason, the selected one marked, and a hint."""
    cli.main(["doctor", "--json", str(tmp_path / "report.json")])
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert [case["case"] for case in report["cases"]] == ["causal", "window", "packed_causal"]
    for case in report["cases"]:
        assert list(case["backends"]) == list(BACKENDS) and case["auto"] == "math"
        assert all(row["supported"] == row["able"] for row in case["backends"].values())
        assert all(row["supported"] or "cpu" in row["reason"] for row in case["backends"].values())
    assert report["versions"]["PyTorch"] == torch.__version__
    assert printed.count("<- auto") == 3 and "No GPU: attention runs in plain PyTorch" in printed
    assert "64 heads, 8 groups, dim 64" in printed and "window of 128" in printed


@pytest.mark.parametrize(
    "argv, words",
    [
        (("--seqlen", "0"), "--seqlen 0: give 2 or more"),
        (("--preset", "huge"), "Unknown preset 'huge'"),
        (("--json", "/nope/x.json"), "--json /nope/x.json: no directory /nope"),
    ],
)
def test_mistakes(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor", *argv])
    assert stop.value.code == 2 and words in capsys.readouterr().err


@cpu_only
def test_measured_case(monkeypatch):
    """As on a GPU: each kernel is checked, then timed; a failed kernel does not hide others."""
    workload = attention_timing.Workload("tiny", 64, heads=4, groups=2, dim=8)
    rows = {name: {"supported": name in ("math", "fa2"), "reason": None} for name in BACKENDS}
    monkeypatch.setattr(doctor, "_NOT_MEASURED", ("flex",))
    doctor._measure(workload, rows, compile_flex=False)
    assert rows["math"]["ms"] > 0 and rows["math"]["error"] < 1e-2
    assert not rows["fa2"]["supported"] and rows["fa2"]["reason"].startswith("failed: ValueError")
    assert "ms" in rows["math"] and "ms" not in rows["fa2"]


@pytest.mark.parametrize("window", [None, 1, 7, 20, 30])
def test_pairs(window):
    row, key = torch.arange(20)[:, None], torch.arange(20)[None]
    seen = (key <= row) & ((row - key < window) if window else True)
    window_size = None if window is None else (window - 1, 0)
    workload = attention_timing.Workload("x", 20, window_size=window_size)
    assert workload.pairs == int(seen.sum())


def test_flops():
    """8k causal with 64 heads of 64: the figure that published TFLOP/s rest on, causal half."""
    assert attention_timing.Workload("x", 8192).flops == pytest.approx(
        3.5 * 4 * 8192**2 / 2 * 4096, rel=2e-4
    )
    packed = attention_timing.Workload("x", 20, documents=(5, 15), batch=1)
    assert packed.pairs == 5 * 6 // 2 + 15 * 16 // 2


def test_wrong_kernel_is_noticed(monkeypatch):
    """The check before any figure: a backend whose sink is dropped."""
    workload = attention_timing.Workload("tiny", 64, heads=4, groups=2, dim=8)
    assert max(attention_timing.errors(workload, "math").values()) < 1e-2
    original = attention_timing.sink_attention

    def forgetful(q, k, v, sink, **options):
        return original(q, k, v, sink if q.dtype == torch.float64 else 0 * sink, **options)

    monkeypatch.setattr(attention_timing, "sink_attention", forgetful)
    assert max(attention_timing.errors(workload, "math").values()) > 0.1
