# Copyright (c) 2026, the megatron-core gptoss authors.

"""Write docs/flags.md from the ledger of Megatron's flags and the flag names of other projects.

python tools/flags_page.py            print it
python tools/flags_page.py --write    write it
"""

import sys
from pathlib import Path

from megatron.gpt_oss.arguments.flags import ALLOW_UNTESTED
from megatron.gpt_oss.arguments.foreign_names import FOREIGN_NAMES
from megatron.gpt_oss.arguments.ledger import INERT, SUPPORTED, UNTESTED, WRONG
from megatron.gpt_oss.training.resume_rules import AT_LOAD, FREE, MODEL, OPTIMIZER

PAGE = Path(__file__).resolve().parents[1] / "docs" / "flags.md"

HEAD = f"""# Flags

Written by `tools/flags_page.py` from `megatron/gpt_oss/arguments/ledger.py`; a test compares the ledger
with the flags of Megatron's parser. `--help` shows this project's own flags and those that most runs
need, `--help-all` every flag.

Megatron has many flags for other models and other ways of training. A flag that no test runs here is
rejected. `{ALLOW_UNTESTED}` accepts it, and the log of the run names it. A flag with its default value is
never rejected. `--flag=value` below is one value of a flag.
"""

RESUMING = """Arguments that differ from those in `run.json`, by Megatron's names. Any other argument may change; one
line of the log reports it ([docs](continual_pretraining.md#what-else-may-change)).
"""


def page() -> str:
    """The page."""
    parts = [HEAD, "## Flag names from NeMo and Hugging Face\n", _names()]
    parts += ["## Supported\n", "Listed by the test in `tests/unit_tests/` that runs them.\n"]
    parts.append(_table("test", SUPPORTED, "`{}`"))
    parts += ["## No effect on gpt-oss\n", _table("purpose", INERT)]
    parts += ["## Untested\n", _table("reason", UNTESTED)]
    parts += ["## Rejected\n", _table("reason", WRONG)]
    parts += ["## Changes on resume\n", RESUMING, _table("rule", _resume_classes())]
    return "\n".join(parts)


def _resume_classes() -> dict[str, str]:
    classes = {
        "free": FREE,
        "reported with its effect, once the checkpoint is loaded": AT_LOAD,
        "rejected: the checkpoints contain another model": MODEL,
        "rejected unless `--no-load-optim` is given": OPTIMIZER,
    }
    return {note: " ".join(sorted(names)) for note, names in classes.items()}


def _names() -> str:
    rows = ["| name | flag here | note |", "|---|---|---|"]
    for name, (flag, note) in sorted(FOREIGN_NAMES.items()):
        rows.append(f"| `{name}` | {f'`{flag}`' if flag else 'none'} | {note} |")
    return "\n".join(rows) + "\n"


def _table(title: str, table: dict[str, str], shown: str = "{}") -> str:
    rows = [f"| {title} | flags |", "|---|---|"]
    for note, flags in table.items():
        rows.append(f"| {shown.format(note)} | {' '.join(f'`{flag}`' for flag in flags.split())} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page())
