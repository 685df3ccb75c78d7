# Copyright (c) 2026, the megatron-core gptoss authors.

"""Run the parity tests and write what they measured into docs/parity.md.

    python -m benchmarks.conversion.parity                          # about two minutes on two cores
    python -m benchmarks.conversion.parity --print                  # print the table, write nothing

The figures are also written to benchmarks/results/parity_cpu.json.

A test hands over its figures as `record_property("parity", (what, case, measured, limit))`. The page
is written only if every test passed.
"""

import argparse
import re

import pytest

from benchmarks.lib import report

ROOT = report.ROOT
PAGE, SECTION = ROOT / "docs" / "parity.md", "parity"
RESULT = ROOT / "benchmarks" / "results" / "parity_cpu.json"
NAMES = ("what", "case", "measured", "limit")
TESTS = (
    "tests/unit_tests/gpt_oss/test_parity.py",
    "tests/unit_tests/gpt_oss/test_parity_parallel.py",
    "tests/unit_tests/gpt_oss/test_parity_bf16.py",
    "tests/unit_tests/gpt_oss/checkpoint/test_export_hf.py",
    "tests/unit_tests/gpt_oss/checkpoint/test_import_hf.py",
    "tests/unit_tests/gpt_oss/checkpoint/test_mxfp4.py",
    "tests/unit_tests/models/common/embeddings/test_yarn_rotary_pos_embedding.py",
)


class Collector:
    """A pytest plugin that gathers the rows."""

    def __init__(self):
        self.rows: list[tuple[str, str, float, float]] = []

    def pytest_runtest_logreport(self, report) -> None:
        """pytest's hook."""
        if report.when == "call":
            self.rows += [value for name, value in report.user_properties if name == "parity"]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--print", action="store_true", help="the table, and write nothing")
    args = parser.parse_args()
    collector = Collector()
    words = ["-q", "-W", "ignore", f"--rootdir={ROOT}", *(str(ROOT / test) for test in TESTS)]
    code = pytest.main(words, plugins=[collector])
    if code:
        raise SystemExit(f"tests failed ({code!r}): no table is written")
    found = {
        "machine": report.machine("torch", "transformers", "numpy"),
        "rows": [dict(zip(NAMES, row)) for row in largest(collector.rows)],
    }
    if args.print:
        print(page_text(found))
        return
    report.write_json(RESULT, found["machine"], rows=found["rows"])
    report.write_section(PAGE, SECTION, page_text(found))
    print(f"{PAGE.relative_to(ROOT)}: {len(found['rows'])} rows")


def largest(rows: list[tuple[str, str, float, float]]) -> list[tuple[str, str, float, float]]:
    """The largest measurement of each what and case (ranks measure separately), grouped by kind."""
    kept: dict[tuple, tuple] = {}
    for row in rows:
        before = kept.get((row[0], row[1]), row)
        kept[row[0], row[1]] = max(row, before, key=lambda row: row[2])
    order = {what: i for i, what in reversed(list(enumerate(kind(row) for row in kept.values())))}
    return sorted(kept.values(), key=lambda row: order[kind(row)])


def page_text(found: dict) -> str:
    """Text of the page: the machine, and a table."""
    lines = [
        [row["what"], row["case"], number(row["measured"]), number(row["limit"])]
        for row in found["rows"]
    ]
    facts = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    return f"{facts}\n\n{report.markdown(list(NAMES), lines)}"


def kind(row: tuple) -> str:
    """The kind of a row: its `what` without figures."""
    return re.sub(r"[0-9.]+e-[0-9]+", "", row[0])


def number(value: float) -> str:
    """Format a figure of the table."""
    if value == 0:
        return "0"
    return f"{value:.2f}" if value > 0.01 else f"{value:.1e}"


if __name__ == "__main__":
    main()
