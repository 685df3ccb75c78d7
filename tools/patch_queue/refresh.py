# Copyright (c) 2026, the megatron-core gptoss authors.
"""Fold edits of the materialised tree back into a patch."""

import datetime
from dataclasses import replace

from .errors import QueueError
from .materialise import Workspace
from .series import GROUPS, Patch
from .tree import DoesNotApply, Tree, apply_patch, diff_trees

_TEMPLATE = """Description: {subject}
 TODO: what was wrong, how it was seen, why this way.
Origin: vendor
Forwarded: no
Upstream: TODO: present or fixed, at which commit
Last-Update: {today}
Test: {test}"""


def new_patch(workspace: Workspace, name: str, subject: str, test: str) -> Patch:
    """Append an empty patch ``group/what.patch`` to the series; `refresh` fills it."""
    if not name.endswith(".patch"):
        name += ".patch"
    if name.split("/")[0] not in GROUPS or name.count("/") != 1:
        raise QueueError(f"'{name}' is not GROUP/NAME with a group of {', '.join(GROUPS)}.")
    if any(patch.name == name for patch in workspace.series.patches):
        raise QueueError(f"patches/{name} is there already; fill it with `refresh {name}`.")
    today = datetime.date.today().isoformat()
    patch = Patch(name, _TEMPLATE.format(subject=subject, today=today, test=test), "")
    workspace.series.write(patch)
    with open(workspace.series.path, "a", encoding="utf-8") as series:
        series.write(name + "\n")
    return patch


def refresh(workspace: Workspace, name: str | None, only: list[str]) -> list[str]:
    """Write patch ``name`` anew with the edits of ``only`` (default: every edited file) in it.

    Without a name, no edit is folded: every patch is written as this tool would (line numbers,
    index lines), which is what a merge of two branches' patches needs.

    Returns:
        Names of the patch files that changed.
    Raises:
        QueueError: there is nothing to fold, or a later patch of the series no longer applies
            on top; no file was changed.
    """
    series = workspace.series
    edited = workspace.edits() if name else []
    unknown = [path for path in only if path not in edited]
    if unknown:
        raise QueueError(f"{unknown[0]} is not an edited upstream file; see `patches.py status`.")
    folded = only or edited
    at = series.index(name) if name else len(series.patches)
    if name and not folded and series[name].diff:
        raise QueueError("No materialised file was edited, so there is nothing to fold in.")

    states: list[Tree] = [workspace.pristine()]
    for patch in series.patches:
        states.append(apply_patch(states[-1], patch) if patch.diff else states[-1])
    final = dict(states[-1])
    for path in folded:
        file = workspace.root / path
        if file.is_file():
            final[path] = file.read_bytes()
        else:
            final.pop(path, None)
    edit = Patch.parse("edit", "\n---\n" + diff_trees(states[-1], final))

    tree, written = states[0], []
    for position, patch in enumerate(series.patches):
        try:
            after = apply_patch(tree, patch) if patch.diff else tree
            if position == at and folded:
                after = apply_patch(after, edit)
        except DoesNotApply as error:
            raise QueueError(
                f"The edits cannot be folded into {name}: {error}\nA later patch changes the same "
                "lines. Fold them into that later patch, or edit the two patches in turn."
            ) from None
        fresh = replace(patch, diff=diff_trees(tree, after, patch.context))
        tree = after
        if fresh.diff != patch.diff:
            if position == at:
                fresh = replace(fresh, header=_dated(fresh.header))
            written.append(fresh)
    if tree != final:
        raise QueueError(f"Folding the edits into {name} would change the final tree. Not done.")
    for patch in written:
        series.write(patch)
    if name:
        remaining = [path for path in edited if path not in folded]
        if not remaining:
            workspace.adopt(final)
    return [patch.name for patch in written]


def _dated(header: str) -> str:
    today = datetime.date.today().isoformat()
    lines = header.splitlines()
    return "\n".join(f"Last-Update: {today}" if x.startswith("Last-Update:") else x for x in lines)
