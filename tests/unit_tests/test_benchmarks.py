# Copyright (c) 2026, the megatron-core gptoss authors.

"""Tables of docs/ and results of the benchmarks, and the logic of single benchmarks."""

import json
from argparse import Namespace

import pytest
import torch

from benchmarks import doc_tables
from benchmarks.conversion import convert, parity
from benchmarks.kernels import attention
from benchmarks.kernels.context_parallel_plan import plan
from benchmarks.lib import report
from benchmarks.lib.activation_offload import ActivationOffload
from benchmarks.lib.flops import layer_flops, model_flops, num_parameters
from benchmarks.training import checkpoint
from megatron.gpt_oss.presets import get_preset


def test_tables_are_those_of_the_results():
    """The tables of docs/ are what the tools write from the results: no edit, no old figure."""
    for (page, section), text in doc_tables.sections().items():
        assert report.read_section(doc_tables.DOCS / page, section) == text, f"{page}: {section}"
    found = json.loads(parity.RESULT.read_text())
    assert report.read_section(parity.PAGE, parity.SECTION) == parity.page_text(found)
    assert report.read_section(convert.PAGE, convert.SECTION) == convert.page_text()


def test_context_parallel_plan_is_up_to_date():
    current = plan() in (doc_tables.DOCS / "context_parallel.md").read_text()
    assert current, (
        "run: python -m benchmarks.kernels.context_parallel --plan docs/context_parallel.md"
    )


def test_figures_of_the_readme():
    """Figures of the README are rounded results."""
    rows = doc_tables.load("train_step_h100")["rows"]
    rates = {row["case"]: row["tokens_per_second"] for row in rows}
    readme = (report.ROOT / "README.md").read_text(encoding="utf-8")
    for case in ("4k", "32k", "128k"):
        assert f"{round(rates[case], -2):,.0f}" in readme


def test_sections(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- begin one, by a tool -->\nold\n<!-- end one -->\nb\n")
    report.write_section(page, "one", report.markdown(["x", "y"], [["1", "2"]]))
    assert report.read_section(page, "one") == "| x | y |\n| --- | --- |\n| 1 | 2 |"
    assert page.read_text().startswith("a\n<!-- begin one, by a tool -->\n\n| x")
    assert page.read_text().endswith("\n\n<!-- end one -->\nb\n")
    with pytest.raises(SystemExit, match="no section 'two'"):
        report.write_section(page, "two", "")


@pytest.mark.parametrize(
    "recorded, current",
    [
        (
            "python benchmarks/attention.py --json benchmarks/results/attention_h100.json",
            "python -m benchmarks.kernels.attention --json benchmarks/results/attention_h100.json",
        ),
        (
            "torchrun --nproc-per-node 2 benchmarks/context_parallel_model.py",
            "torchrun --nproc-per-node 2 -m benchmarks.training.context_parallel_model",
        ),
        (
            "python -m benchmarks.training.train_step --growing fast one-by-one",
            "python -m benchmarks.training.train_step --growing fast sequential",
        ),
        ("python -m benchmarks.kernels.experts", "python -m benchmarks.kernels.experts"),
    ],
)
def test_current_command(recorded, current):
    """Results name the scripts as they were; docs show the command that runs."""
    assert report.current_command(recorded) == current


def test_flops_and_parameters_of_20b():
    """20.9 billion parameters as published; FLOPs per token of the model."""
    preset = get_preset("20b")
    layer, rest = num_parameters(preset)
    assert 24 * layer + rest == 20_914_757_184
    # 3.6 billion active parameters; attention of 4k tokens adds a tenth.
    per_token = model_flops(preset, 4096) / 4096
    assert 6 * 3.0e9 < per_token < 6 * 4.2e9
    assert layer_flops(preset, 4096, True) < layer_flops(preset, 4096, False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_write_table_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["attention", "--write-table"])
    with pytest.raises(SystemExit):
        attention.parse_arguments()
    assert "there is no GPU to measure" in capsys.readouterr().err


def test_checkpoint_row():
    """Saves at 4, 8 and 12: the first is left out; steps 5 and 9 run during a background write."""
    save = dict(background_seconds=2.0)
    run = {
        "bytes": 3e9,
        "load": 0.5,
        "disk": 7.0,
        "steps": {step: 1.0 + (step in (5, 9)) + 50 * (step == 1) for step in range(1, 13)},
        "saves": {
            4: dict(save, blocking_seconds=90.0),
            8: dict(save, blocking_seconds=0.2),
            12: dict(save, blocking_seconds=0.4),
        },
    }
    found = checkpoint.row("asynchronous", [run], interval=4)
    assert (found.saves, found.gigabytes, found.blocked_max_s) == (2, 3.0, 0.4)
    assert found.blocked_s == pytest.approx(0.3)
    assert (found.step_s, found.step_during_write_s, found.write_s) == (1.0, 2.0, 2.0)


def test_wrong_values_get_no_figure(monkeypatch):
    """A rotation without YaRN's factor is reported as wrong and not timed."""
    elementwise = pytest.importorskip("benchmarks.kernels.elementwise")
    right = elementwise.rope

    def wrong(case):
        problem, calls, reference = right(case)
        eager = calls["eager"]

        def without_factor(qkv):
            query, key, value = eager(qkv)
            return query / elementwise.MSCALE, key / elementwise.MSCALE, value

        return problem, {"eager": without_factor}, reference

    monkeypatch.setitem(elementwise.OPERATIONS, "rope", wrong)
    left_out = []
    args = Namespace(only=["eager"], seconds=0.01)
    rows = elementwise.run_case(elementwise.Case("rope", 9), args, left_out)
    assert [row.implementation for row in rows] == ["copy"]
    ((name, reason),) = left_out
    assert name == "rope-9 eager" and reason.startswith("WRONG: relative error")


def test_activation_offload_changes_no_gradient():
    """Gradients are bit-identical, in a second iteration too; weights are not offloaded."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8), torch.nn.Softmax(-1)
    )
    x, dout = torch.randn(5, 8), torch.randn(5, 8)

    def gradients():
        model.zero_grad()
        model(x).backward(dout)
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients()
    offload = ActivationOffload(model, minimum=0)
    for _ in range(2):
        assert all(map(torch.equal, gradients(), expected))
        # x, the input of GELU, its output, and that of softmax
        assert offload.bytes == 4 * 5 * (8 + 16 + 16 + 8)


def test_expert_load():
    """Of four experts on two ranks; the maximum over layers."""
    from benchmarks.training.context_parallel_model import load_of

    counts = torch.tensor([[3, 1, 2, 2], [0, 0, 5, 1]])
    assert load_of(counts[:1], 2) == 1.0
    assert load_of(counts, 2) == 2.0
    assert load_of(counts[:1], 4) == 1.5
