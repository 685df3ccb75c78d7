# Copyright (c) 2026, the megatron-core gptoss authors.

"""docs/flags.md, from the ledger of Megatron's flags and the names of other projects.

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
with the flags that Megatron's parser has. `--help` shows this project's own flags and those that
most runs need, `--help-all` every one.

Megatron has many flags for other models and other ways of training. A flag that no test runs here is
refused where it is given, so that nothing is accepted that may not be true. `{ALLOW_UNTESTED}`
lets it through; the log of the run then names it. A flag with the value that the run has without it
is never refused. `--flag=value` below is one value of a flag.
"""

RESUMING = """Arguments that differ from those in `run.json`, by Megatron's names. Any other one may change, and one
line tells that it did ([docs](continual_pretraining.md#what-else-may-change)).
"""


def page() -> str:
    """The whole text."""
    parts = [HEAD, "## Names from NeMo and Hugging Face\n", _names()]
    parts += ["## Supported\n", "By the test that runs them, in `tests/unit_tests/`.\n"]
    parts.append(_table("test", SUPPORTED, "`{}`"))
    parts += ["## Without effect on a gpt-oss run\n", _table("they are", INERT)]
    parts += ["## Not tested here\n", _table("what is known", UNTESTED)]
    parts += ["## Refused always\n", _table("why", WRONG)]
    parts += ["## When a run resumes\n", RESUMING, _table("class", _resume_classes())]
    return "\n".join(parts)


def _resume_classes() -> dict[str, str]:
    classes = {
        "free": FREE,
        "told with what it changes, once the checkpoint is loaded": AT_LOAD,
        "refused: the checkpoints hold another model": MODEL,
        "refused unless `--no-load-optim` is given": OPTIMIZER,
    }
    return {note: " ".join(sorted(names)) for note, names in classes.items()}


def _names() -> str:
    rows = ["| there | here | |", "|---|---|---|"]
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
