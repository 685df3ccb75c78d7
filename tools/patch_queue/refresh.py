# Copyright (c) 2026, the megatron-core gptoss authors.
"""Write edits of the materialised tree into a patch, and rewrite the patches' line numbers."""

import datetime
from dataclasses import replace

from .errors import QueueError
from .materialise import Workspace
from .series import GROUPS, Patch
from .tree import DoesNotApply, Tree, apply_patch, diff_trees

_TEMPLATE = """Description: {subject}
 TODO: what was wrong, how it was found, why this fix.
Origin: vendor
Forwarded: no
Last-Update: {today}
Test: {test}"""


def new_patch(workspace: Workspace, name: str, subject: str, test: str) -> Patch:
    """Append an empty patch ``group/what.patch`` to the series; `refresh_patch` fills it."""
    if not name.endswith(".patch"):
        name += ".patch"
    if name.split("/")[0] not in GROUPS or name.count("/") != 1:
        raise QueueError(f"'{name}' is not GROUP/NAME with a group of {', '.join(GROUPS)}.")
    if any(patch.name == name for patch in workspace.series.patches):
        raise QueueError(f"patches/{name} exists already; fill it with `refresh {name}`.")
    patch = Patch(name, _TEMPLATE.format(subject=subject, today=_today(), test=test), "")
    workspace.series.write(patch)
    with open(workspace.series.path, "a", encoding="utf-8") as series:
        series.write(name + "\n")
    return patch


def refresh_patch(workspace: Workspace, name: str, files: list[str] | None = None) -> list[str]:
    """Add edits of the materialised tree to one patch.

    Args:
        name: the patch, as `Series.index` takes it.
        files: add only the edits of these files; by default those of all edited files.

    Returns:
        Names of the patch files that changed.
    Raises:
        QueueError: there is no edit, or a later patch of the series no longer applies on top;
            no file was changed.
    """
    series = workspace.series
    position = series.index(name)
    edited = workspace.edits()
    chosen = _chosen_edits(edited, files, new=not series[name].diff)
    if not chosen:  # a new patch without edits
        return refresh_series(workspace)
    before = _apply_all(workspace)
    final = _with_files(workspace, before, chosen)
    edit = Patch.parse("edit", "\n---\n" + diff_trees(before, final))
    try:
        rewritten, result = _rewrite(workspace, {position: edit})
    except DoesNotApply as error:
        raise QueueError(
            f"The edits cannot be added to {name}: {error}\nA later patch changes the same "
            "lines. Add them to that later patch, or edit the two patches in turn."
        ) from None
    if result != final:
        raise QueueError(f"Adding the edits to {name} would change the final tree. Not done.")
    rewritten[position] = replace(
        rewritten[position], header=_dated(rewritten[position].header, _today())
    )
    written = _write_changed(workspace, rewritten)
    if set(edited) <= set(chosen):
        workspace.adopt(final)
    return written


def refresh_series(workspace: Workspace) -> list[str]:
    """Rewrite line numbers and index lines of every patch, as after a merge of two branches.

    Returns:
        Names of the patch files that changed.
    """
    rewritten, _ = _rewrite(workspace, {})
    return _write_changed(workspace, rewritten)


def _chosen_edits(edited: list[str], files: list[str] | None, new: bool) -> list[str]:
    unknown = [path for path in files or [] if path not in edited]
    if unknown:
        raise QueueError(f"{unknown[0]} is not an edited upstream file; see `patches.py status`.")
    if not edited and not new:
        raise QueueError("No materialised file was edited, so there is nothing to add.")
    return files or edited


def _apply_all(workspace: Workspace) -> Tree:
    """Upstream's files with every patch, index lines not compared: they may be out of date."""
    tree = workspace.pristine()
    for patch in workspace.series.patches:
        tree = apply_patch(tree, patch)
    return tree


def _with_files(workspace: Workspace, tree: Tree, paths: list[str]) -> Tree:
    """The tree with these files as they are on disk; deleted ones removed."""
    kept = {path: content for path, content in tree.items() if path not in paths}
    return kept | workspace.read(paths)


def _rewrite(workspace: Workspace, edits: dict[int, Patch]) -> tuple[list[Patch], Tree]:
    """The patches as this tool writes them, with ``edits`` added at their positions."""
    tree, rewritten = workspace.pristine(), []
    for position, patch in enumerate(workspace.series.patches):
        after = apply_patch(tree, patch)
        if position in edits:
            after = apply_patch(after, edits[position])
        rewritten.append(replace(patch, diff=diff_trees(tree, after, patch.context)))
        tree = after
    return rewritten, tree


def _write_changed(workspace: Workspace, rewritten: list[Patch]) -> list[str]:
    changed = [new for old, new in zip(workspace.series.patches, rewritten) if new.diff != old.diff]
    for patch in changed:
        workspace.series.write(patch)
    return [patch.name for patch in changed]


def _today() -> str:
    return datetime.date.today().isoformat()


def _dated(header: str, today: str) -> str:
    lines = header.splitlines()
    return "\n".join(f"Last-Update: {today}" if x.startswith("Last-Update:") else x for x in lines)
