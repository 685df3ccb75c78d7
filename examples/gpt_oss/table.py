# Copyright (c) 2026, the megatron-core gptoss authors.

"""The table of recipes in README.md, from the planner.

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
sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))

from report import markdown, write_section  # noqa: E402

from megatron.gpt_oss.arguments.parse import read  # noqa: E402
from megatron.gpt_oss.planner.dry_run import validated  # noqa: E402
from megatron.gpt_oss.planner.layout import Layout  # noqa: E402
from megatron.gpt_oss.planner.memory import GB  # noqa: E402
from megatron.gpt_oss.planner.search import Plan, PlanRequest, plan_layout, describe  # noqa: E402

PAGE = HERE / "README.md"
SECTION = "recipes"
# The number in the card's name; CUDA, NCCL and fragments have the rest (docs/planning.md).
GPU_MEMORY = 80 * GB
# Tokens of the busiest GPU's experts over the mean, for the second column of memory.
BUSY = 1.25
# A recipe names no corpus and no tokenizer.
NO_DATA = "--tokenizer-type NullTokenizer --vocab-size 200000".split()


def recipes() -> list[Path]:
    """All of them: by model, length, GPUs."""
    return sorted((HERE / "recipes").glob("*gpus.txt"), key=lambda file: sizes(file))


def sizes(file: Path) -> tuple[int, int, int]:
    """What a recipe's name says: billions of parameters, tokens a sequence, GPUs."""
    found = re.fullmatch(r"(\d+)b-(\d+)k-(\d+)gpus", file.stem)
    if found is None:
        raise SystemExit(f"{file}: a recipe is named like 20b-32k-8gpus.txt")
    billions, thousands, gpus = map(int, found.groups())
    return billions, thousands * 1024, gpus


def arguments(file: Path, *more: str, gpus: int | None = None) -> Namespace:
    """A recipe through Megatron's own parser and validation, as on so many GPUs (its own)."""
    world = {"RANK": "0", "LOCAL_RANK": "0"}
    with mock.patch.dict(os.environ, world):  # given back as it was, CUDA's variables too
        spec = read(["--recipe", str(file), *more, *NO_DATA])
        return validated(spec, gpus or sizes(file)[2])


def plan(args: Namespace, expert_load: float = 1.0) -> Plan:
    """Its memory and time on H100s with eight in a machine."""
    layout = replace(Layout.from_args(args), expert_load=expert_load)
    return plan_layout(layout, PlanRequest(layout, GPU_MEMORY))


def table() -> str:
    """One row a recipe."""
    rows = []
    for file in recipes():
        args = arguments(file)
        even, busy = plan(args), plan(args, BUSY)
        layout = even.layout
        rows.append(
            [
                f"[{file.stem}](recipes/{file.name})",
                describe(layout).replace(", ", " | "),
                f"{layout.global_batch_size} x {layout.seq_length:,}",
                f"{even.memory.total / GB:.1f}",
                f"{busy.memory.total / GB:.1f}",
                f"{(GPU_MEMORY - busy.memory.total) / GB:.1f}",
                f"{round(even.tokens_per_second, -1):,.0f}",
            ]
        )
    header = [
        "recipe",
        "layout",
        "recompute",
        "batch",
        "GB",
        "GB, busy",
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
