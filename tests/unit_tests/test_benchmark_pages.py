# Copyright (c) 2026, the megatron-core gptoss authors.

"""The tables of docs/ say what the committed results say: they are written, not edited."""

from benchmarks import pages, report
from benchmarks.work import layer_flops, model_flops, num_parameters
from megatron.gpt_oss.presets import get_preset


def test_pages_are_those_of_the_results():
    for (page, section), text in pages.sections().items():
        assert report.read_section(pages.DOCS / page, section) == text, f"{page}: {section}"


def test_targets_that_the_readme_names():
    """README rounds these figures."""
    rates = {r["case"]: r["tokens_per_second"] for r in pages.load("train_step_h100")["rows"]}
    readme = (report.ROOT / "README.md").read_text(encoding="utf-8")
    for case in ("4k", "32k", "128k"):
        assert f"{round(rates[case], -2):,.0f}" in readme


def test_work_of_the_20b_model():
    """20.9 billion parameters as published; FLOPs a token of the whole model."""
    preset = get_preset("20b")
    layer, rest = num_parameters(preset)
    assert round((preset.num_layers * layer + rest) / 1e9, 1) == 20.9
    # 3.6 billion parameters a token, less the embedding's; attention of 4k tokens adds a tenth.
    per_token = model_flops(preset, 4096) / 4096
    assert 6 * 3.0e9 < per_token < 6 * 4.2e9
    assert layer_flops(preset, 4096, True) < layer_flops(preset, 4096, False)


def test_the_planner_is_within_a_tenth_of_what_was_measured():
    for row in pages.load("train_step_h100")["rows"]:
        assert abs(row["planned_gib"] / row["peak_gib"] - 1) < 0.1, row["case"]
