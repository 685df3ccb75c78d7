# Copyright (c) 2026, the megatron-core gptoss authors.
"""Write the series as mailbox files for `git am`, with the same bytes on every machine."""

from pathlib import Path

from .errors import QueueError
from .series import Patch, Series
from .target import modules_of
from .tree import diff_trees

_SENDER = "megatron-core gptoss <gptoss@invalid>"
_DATE = "Thu, 1 Jan 1970 00:00:00 +0000"


def _mail(number: int, total: int, subject: str, body: str, diff: str) -> str:
    width = len(str(total))
    return (
        f"From {'0' * 40} Mon Sep 17 00:00:00 2001\n"
        f"From: {_SENDER}\n"
        f"Date: {_DATE}\n"
        f"Subject: [PATCH {number:0{width}d}/{total}] {subject}\n"
        "MIME-Version: 1.0\n"
        "Content-Type: text/plain; charset=UTF-8\n"
        "Content-Transfer-Encoding: 8bit\n\n"
        f"{body}\n---\n{diff}-- \nmegatron-core gptoss\n\n"
    )


def _message(patch: Patch) -> tuple[str, str]:
    """A patch's commit message: area and subject, then the description and the other fields."""
    fields = patch.fields
    lines = fields["Description"].splitlines()
    area = Path(patch.paths[0]).stem
    others = [f"{key}: {value}" for key, value in fields.items() if key != "Description"]
    return f"{area}: {lines[0]}", "\n".join([*lines[1:], "", *others])


def export(root: Path, series: Series, out: Path, groups: list[str]) -> list[Path]:
    """Write ``out/0001-....patch`` onwards: our modules first, then the patches of the groups.

    Raises:
        QueueError: ``out`` exists and is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise QueueError(f"{out} is not empty; give an empty or a new folder.")
    patches = series.in_groups(groups)
    modules = modules_of(root, patches)
    mails: list[tuple[str, str, str]] = []
    if modules:
        body = "New files that the hunks of the following patches import."
        mails.append(("Add the modules of the gpt-oss series", body, diff_trees({}, modules)))
    mails += [(*_message(patch), patch.diff) for patch in patches]
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for number, (subject, body, diff) in enumerate(mails, 1):
        slug = "".join(c if c.isalnum() else "-" for c in subject.lower())
        slug = "-".join(filter(None, slug.split("-")))[:52].strip("-")
        path = out / f"{number:04d}-{slug}.patch"
        text = _mail(number, len(mails), subject, body, diff)
        path.write_text(text, encoding="utf-8", newline="\n")
        written.append(path)
    return written
