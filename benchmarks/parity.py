# Copyright (c) 2026, the megatron-core gptoss authors.

"""Run the parity tests and write what they measured into docs/parity.md.

    python benchmarks/parity.py            # about two minutes on two cores
    python benchmarks/parity.py --out -    # print the table instead

A test hands over its figures as `record_property("parity", (what, case, measured, limit))`. The page
is written only if every test passed.
"""

import argparse
import platform
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
TESTS = (
    "tests/unit_tests/gpt_oss/test_parity.py",
    "tests/unit_tests/gpt_oss/test_parity_parallel.py",
    "tests/unit_tests/gpt_oss/test_parity_bf16.py",
    "tests/unit_tests/gpt_oss/test_export.py",
    "tests/unit_tests/gpt_oss/test_to_megatron.py",
    "tests/unit_tests/gpt_oss/test_mxfp4.py",
    "tests/unit_tests/models/common/embeddings/test_yarn_rotary_pos_embedding.py",
)
BEGIN, END = "<!-- written by benchmarks/parity.py -->", "<!-- end -->"


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
    parser.add_argument("--out", default=str(ROOT / "docs" / "parity.md"))
    args = parser.parse_args()
    collector = Collector()
    words = ["-q", "-W", "ignore", f"--rootdir={ROOT}", *(str(ROOT / test) for test in TESTS)]
    code = pytest.main(words, plugins=[collector])
    if code:
        raise SystemExit(f"tests failed ({code!r}): no table is written")
    text = table(collector.rows)
    if args.out == "-":
        print(text)
        return
    page = Path(args.out)
    old = page.read_text(encoding="utf-8")
    pattern = f"{re.escape(BEGIN)}.*{re.escape(END)}"
    if not re.search(pattern, old, flags=re.S):
        raise SystemExit(f"{page} has no lines '{BEGIN}' and '{END}' to write between")
    new = re.sub(pattern, lambda _: f"{BEGIN}\n{text}\n{END}", old, flags=re.S)
    page.write_text(new, encoding="utf-8")
    print(f"{page}: {len(collector.rows)} rows")


def table(rows: list[tuple[str, str, float, float]]) -> str:
    """Markdown, rows of one kind together."""
    import transformers

    lines = [
        "",
        f"PyTorch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()} CPU.",
        "",
        "| what | case | measured | limit |",
        "|---|---|---|---|",
    ]
    largest: dict[tuple, tuple] = {}  # ranks measure the same each for itself
    for row in rows:
        before = largest.get((row[0], row[1]), row)
        largest[row[0], row[1]] = max(row, before, key=lambda row: row[2])
    rows = list(largest.values())
    order = {what: i for i, what in reversed(list(enumerate(kind(row) for row in rows)))}
    for row in sorted(rows, key=lambda row: order[kind(row)]):
        what, case, measured, limit = row
        lines.append(f"| {what} | {case} | {number(measured)} | {number(limit)} |")
    return "\n".join(lines)


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
