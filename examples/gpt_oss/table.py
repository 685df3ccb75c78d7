# Copyright (c) 2026, the megatron-core gptoss authors.

"""Write the table of recipes in README.md, from the planner.

python examples/gpt_oss/table.py            print it
python examples/gpt_oss/table.py --write    write it into README.md
"""

import os
import re
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from benchmarks.lib.report import markdown, write_section  # noqa: E402
from megatron.gpt_oss.arguments.parse import read  # noqa: E402
from megatron.gpt_oss.planner.dry_run import validated  # noqa: E402
from megatron.gpt_oss.planner.layout import Layout  # noqa: E402
from megatron.gpt_oss.planner.memory import GB  # noqa: E402
from megatron.gpt_oss.planner.search import Plan, PlanRequest, describe, plan_layout  # noqa: E402

PAGE = HERE / "README.md"
SECTION = "recipes"
# The nominal size of the GPU; CUDA, NCCL and fragmentation use the rest (docs/planning.md).
GPU_MEMORY = 80 * GB
# Routed tokens of the most loaded GPU over the mean, for the second column of memory.
IMBALANCE = 1.25
# A recipe has no corpus and no tokenizer.
NO_DATA = "--tokenizer-type NullTokenizer --vocab-size 200000".split()


def recipes() -> list[Path]:
    """All recipes, sorted by model, length and GPUs."""
    return sorted((HERE / "recipes").glob("*gpus.txt"), key=lambda file: sizes(file))


def sizes(file: Path) -> tuple[int, int, int]:
    """Billions of parameters, tokens per sequence and GPUs, from the name of a recipe."""
    found = re.fullmatch(r"(\d+)b-(\d+)k-(\d+)gpus", file.stem)
    if found is None:
        raise SystemExit(f"{file}: a recipe is named like 20b-32k-8gpus.txt")
    billions, thousands, gpus = map(int, found.groups())
    return billions, thousands * 1024, gpus


def arguments(file: Path, *more: str, gpus: int | None = None) -> Namespace:
    """Validated arguments of a recipe, on its own number of GPUs by default."""
    world = {"RANK": "0", "LOCAL_RANK": "0"}
    with mock.patch.dict(os.environ, world):  # restores other variables too
        spec = read(["--recipe", str(file), *more, *NO_DATA])
        return validated(spec, gpus or sizes(file)[2])


def plan(args: Namespace, expert_load: float = 1.0) -> Plan:
    """Memory and time on H100s, eight per machine."""
    layout = replace(Layout.from_args(args), expert_load=expert_load)
    return plan_layout(layout, PlanRequest(layout, GPU_MEMORY))


def table() -> str:
    """One row per recipe."""
    rows = []
    for file in recipes():
        args = arguments(file)
        even, imbalanced = plan(args), plan(args, IMBALANCE)
        layout = even.layout
        rows.append(
            [
                f"[{file.stem}](recipes/{file.name})",
                describe(layout).replace(", ", " | "),
                f"{layout.global_batch_size} x {layout.seq_length:,}",
                f"{even.memory.total / GB:.1f}",
                f"{imbalanced.memory.total / GB:.1f}",
                f"{(GPU_MEMORY - imbalanced.memory.total) / GB:.1f}",
                f"{round(even.tokens_per_second, -1):,.0f}",
            ]
        )
    header = [
        "recipe",
        "layout",
        "recompute",
        "batch",
        "GB",
        "GB, imbalanced",
        "left of 80",
        "tokens/s/GPU",
    ]
    return markdown(header, rows)


def main() -> None:
    text = table()
    if sys.argv[1:] == ["--write"]:
        write_section(PAGE, SECTION, text)
    elif sys.argv[1:]:
        raise SystemExit(__doc__)
    else:
        print(text)


if __name__ == "__main__":
    main()
