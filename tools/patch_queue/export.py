# Copyright (c) 2026, the megatron-core gptoss authors.
"""Write the series as mailbox files for `git am`, with the same bytes on every machine."""

from pathlib import Path

from .errors import QueueError
from .foreign_tree import modules_for
from .resolve import APPLIES, REFUSED, VARIANT, Plan
from .series import Patch
from .tree import diff_trees
from .versions import TRAINING

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


def _message(patch: Patch, paths: tuple[str, ...]) -> tuple[str, str]:
    """A patch's commit message: area and subject, then the description and the other fields."""
    fields = patch.fields
    lines = fields["Description"].splitlines()
    area = Path(paths[0]).stem
    others = [f"{key}: {value}" for key, value in fields.items() if key != "Description"]
    return f"{area}: {lines[0]}", "\n".join([*lines[1:], "", *others])


def export(root: Path, plan: Plan, out: Path, without_training: bool = False) -> list[Path]:
    """Write ``out/0001-....patch`` onwards: our modules first, then what the plan applies.

    Args:
        without_training: omit files of megatron/training, for a repository without them.
    Raises:
        QueueError: ``out`` exists and is not empty, or a patch does not apply to the plan's tree.
    """
    refused = [f"{outcome.patch.name}: {outcome.detail}" for outcome in plan.with_status(REFUSED)]
    if refused:
        raise QueueError("Nothing was written; these do not apply:\n" + "\n".join(refused))

    def keep(path: str) -> bool:
        return not (without_training and path.startswith(TRAINING))

    modules = {name: text for name, text in modules_for(root, plan).items() if keep(name)}
    mails: list[tuple[str, str, str]] = []
    if modules:
        body = "New files that the hunks of the following patches import."
        mails.append(("Add the modules of the gpt-oss series", body, diff_trees({}, modules)))
    for outcome in plan.with_status(APPLIES, VARIANT):
        form = Patch.parse(outcome.patch.name, f"\n---\n{outcome.diff}").restricted(keep)
        if form.paths:
            mails.append((*_message(outcome.patch, form.paths), form.diff))
    return write_mails(out, mails)


def write_mails(out: Path, mails: list[tuple[str, str, str]]) -> list[Path]:
    """Write (subject, body, diff) as ``out/0001-subject.patch`` onwards.

    Raises:
        QueueError: ``out`` exists and is not an empty directory.
        OSError: a file cannot be written; none of them remains.
    """
    if out.exists() and not out.is_dir():
        raise QueueError(f"{out} is a file; give an empty or a new directory.")
    if out.exists() and any(out.iterdir()):
        raise QueueError(f"{out} is not empty; give an empty or a new directory.")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for number, (subject, body, diff) in enumerate(mails, 1):
        path = out / f"{number:04d}-{_slug(subject)}.patch"
        text = _mail(number, len(mails), subject, body, diff)
        written.append(path)
        try:
            path.write_text(text, encoding="utf-8", newline="\n")
        except OSError as error:  # the next run must find an empty directory
            for started in written:
                started.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(path)) from error
    return written


def _slug(subject: str) -> str:
    words = "".join(c if c.isalnum() else "-" for c in subject.lower()).split("-")
    return "-".join(filter(None, words))[:52].strip("-")
