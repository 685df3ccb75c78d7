# Copyright (c) 2026, the megatron-core gptoss authors.

"""Run the parity tests and write what they measured into docs/parity.md.

    python benchmarks/parity.py                          # about two minutes on two cores
    python benchmarks/parity.py --print                  # print the table, write nothing

The figures are also written to benchmarks/results/parity_cpu.json.

A test hands over its figures as `record_property("parity", (what, case, measured, limit))`. The page
is written only if every test passed.
"""

import argparse
import re
import sys

import pytest
import report

ROOT = report.ROOT
TESTS = (
    "tests/unit_tests/gpt_oss/test_parity.py",
    "tests/unit_tests/gpt_oss/test_parity_parallel.py",
    "tests/unit_tests/gpt_oss/test_parity_bf16.py",
    "tests/unit_tests/gpt_oss/test_export.py",
    "tests/unit_tests/gpt_oss/test_to_megatron.py",
    "tests/unit_tests/gpt_oss/test_mxfp4.py",
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
    rows = largest(collector.rows)
    facts = report.machine("torch", "transformers", "numpy")
    text = ", ".join(f"{key} {value}" for key, value in facts.items()) + "\n\n" + table(rows)
    if args.print:
        print(text)
        return
    names = ("what", "case", "measured", "limit")
    report.write_json(
        ROOT / "benchmarks" / "results" / "parity_cpu.json",
        facts,
        rows=[dict(zip(names, row)) for row in rows],
    )
    report.write_section(ROOT / "docs" / "parity.md", "parity", text)
    print(f"docs/parity.md: {len(rows)} rows")


def largest(rows: list[tuple[str, str, float, float]]) -> list[tuple[str, str, float, float]]:
    """One row for each what and case, as ranks measure the same each for itself; kinds together."""
    kept: dict[tuple, tuple] = {}
    for row in rows:
        before = kept.get((row[0], row[1]), row)
        kept[row[0], row[1]] = max(row, before, key=lambda row: row[2])
    order = {what: i for i, what in reversed(list(enumerate(kind(row) for row in kept.values())))}
    return sorted(kept.values(), key=lambda row: order[kind(row)])


def table(rows: list[tuple[str, str, float, float]]) -> str:
    """Markdown."""
    lines = [[what, case, number(value), number(limit)] for what, case, value, limit in rows]
    return report.markdown(["what", "case", "measured", "limit"], lines)


def kind(row: tuple) -> str:
    """What a row is of, figures in it left out."""
    return re.sub(r"[0-9.]+e-[0-9]+", "", row[0])


def number(value: float) -> str:
    """For the reader."""
    if value == 0:
        return "0"
    return f"{value:.2f}" if value > 0.01 else f"{value:.1e}"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
