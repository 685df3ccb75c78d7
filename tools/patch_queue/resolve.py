# Copyright (c) 2026, the megatron-core gptoss authors.
"""Which patches apply to a tree, in which variant, and why others do not."""

import re
from dataclasses import dataclass, field, replace

from .series import Patch, Series
from .tree import DoesNotApply, Tree, apply_patch, diff_trees
from .versions import TRAINING, TRAINING_SINCE, detect, in_ranges, is_known, minor, nearest, numbers

APPLIES = "applies"
VARIANT = "variant"
PRESENT = "already there"
NOT_NEEDED = "not needed"
LEFT_OUT = "left out"
REFUSED = "does not apply"


@dataclass(frozen=True)
class Outcome:
    """The status of one patch on one tree."""

    patch: Patch
    status: str
    detail: str = ""  # a variant's version; for the last three statuses, why
    diff: str = field(default="", repr=False)  # the change on this very tree, context and all


@dataclass(frozen=True)
class Plan:
    """The series on one tree."""

    found: str | None  # the version in package_info.py
    version: str  # the known release it is treated as
    training: bool  # whether it has megatron/training
    outcomes: list[Outcome]
    tree: Tree = field(repr=False)  # the patched files

    def with_status(self, *statuses: str) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.status in statuses]

    @property
    def notes(self) -> list[str]:
        """Messages about the version, one sentence each."""
        if self.found is None:
            return [f"The tree has no version; treated as {self.version}."]
        if not is_known(self.found):
            return [f"{self.found} is not a supported version; treated as {self.version}."]
        return []


def make_plan(series: Series, tree: Tree, groups: list[str], leave_out=()) -> Plan:
    """Choose and apply, in memory.

    Args:
        tree: the files under ``megatron/``; those that the series does not touch may be missing.
        leave_out: names of patches not to apply.
    """
    found = detect(tree)
    version = nearest(found)
    training = any(path.startswith(TRAINING) for path in tree)
    with_training = training and minor(version) >= TRAINING_SINCE

    def keep(path: str) -> bool:
        return with_training or not path.startswith(TRAINING)

    patches = [patch for patch in series.in_groups(groups) if patch.name not in leave_out]
    ruled_out = {
        patch.name: _ruled_out(patch, _paths(series, patch), version, training, keep)
        for patch in patches
    }
    forms = {
        patch.name: [form.restricted(keep) for form in forms_for(series, patch, version)]
        for patch in patches
        if ruled_out[patch.name] is None
    }
    base, present = _remove_applied(tree, patches, forms)
    outcomes, patched = [], base
    for patch in patches:
        if ruled_out[patch.name]:
            outcomes.append(ruled_out[patch.name])
            continue
        known = present.get(patch.name)
        outcome, after = _apply_first_form(patch, patched, [known] if known else forms[patch.name])
        if known and outcome.diff:
            outcome = Outcome(patch, PRESENT, known.variant, outcome.diff)
        outcomes.append(outcome)
        patched = after
    return Plan(found, version, training, outcomes, patched)


def forms_for(series: Series, patch: Patch, version: str) -> list[Patch]:
    """The forms to try, best first: with the variants of this version and newer, then without."""
    variants = [
        variant
        for variant in series.variants.get(patch.name, [])
        if minor(variant.variant) >= minor(version)
    ]
    forms = [_compose(patch, variants[first:]) for first in range(len(variants))]
    return forms + ([patch] if patch.diff else [])


def _paths(series: Series, patch: Patch) -> set[str]:
    """The files of the patch, or of its variants where it is for older versions alone."""
    variants = series.variants.get(patch.name, [])
    return set(patch.paths) or {path for variant in variants for path in variant.paths}


def _compose(patch: Patch, variants: list[Patch]) -> Patch:
    """The patch with each file as the oldest of the variants has it that names the file.

    A variant's ``Without:`` takes files off, for its version and older.
    """
    chunks = {path: patch.only(path).diff for path in patch.paths}
    for variant in reversed(variants):
        for path in variant.fields.get("Without", "").split():
            chunks.pop(path, None)
        chunks.update({path: variant.only(path).diff for path in variant.paths})
    diff = "".join(chunks[path] for path in sorted(chunks))
    form = Patch.parse(patch.name, f"{patch.header}\n---\n{diff}")
    return replace(form, variant=variants[0].variant)


def _ruled_out(patch: Patch, paths: set[str], version: str, training: bool, keep) -> Outcome | None:
    """Because of its header, or because the tree lacks all of its files."""
    fields = patch.fields
    fixed = fields.get("Applied-Upstream", "")
    if fixed and numbers(version) >= numbers(fixed):
        return Outcome(patch, NOT_NEEDED, f"fixed upstream since {fixed}")
    for name, status in (("Not-Needed", NOT_NEEDED), ("Not-Ported", LEFT_OUT)):
        for line in filter(None, fields.get(name, "").split("\n")):
            versions, _, why = line.strip().partition(" ")
            if in_ranges(version, versions):
                return Outcome(patch, status, why)
    if not any(map(keep, paths)):
        why = "the tree has no megatron/training"
        if training:
            first = ".".join(map(str, TRAINING_SINCE))
            why = f"about megatron/training, which is patched from {first} on"
        return Outcome(patch, LEFT_OUT, why)
    return None


def _remove_applied(tree: Tree, patches: list[Patch], forms) -> tuple[Tree, dict[str, Patch]]:
    """Remove patches that are already applied, last first, since later ones build on earlier ones."""
    present = {}
    for patch in reversed(patches):
        for form in forms.get(patch.name, ()):
            try:
                tree = apply_patch(tree, form, reverse=True)
            except DoesNotApply:
                continue
            present[patch.name] = form
            break
    return tree, present


def _apply_first_form(patch: Patch, tree: Tree, forms: list[Patch]) -> tuple[Outcome, Tree]:
    reasons: list[str] = []
    for form in forms:
        try:
            after = apply_patch(tree, form)
        except DoesNotApply:
            reasons = reasons or misfits(tree, form)
            continue
        status = VARIANT if form.variant else APPLIES
        diff = diff_trees(
            {path: tree[path] for path in form.paths if path in tree},
            {path: after[path] for path in form.paths if path in after},
            form.context,
        )
        return Outcome(patch, status, form.variant, diff), after
    return Outcome(patch, REFUSED, "; ".join(reasons)), tree


def misfits(tree: Tree, patch: Patch) -> list[str]:
    """File and hunk of each place where the patch does not apply, with the first missing line."""
    found = []
    for path in patch.paths:
        diff = patch.only(path).diff
        header, *hunks = re.split(r"^(?=@@ )", diff, flags=re.M)
        if path not in tree:
            if "\n--- /dev/null" not in header:
                found.append(f"{path}: no such file")
            continue
        lines = tree[path].decode("utf-8", "replace").splitlines()
        for number, hunk in enumerate(hunks, 1):
            expected = [
                line[1:] for line in hunk.splitlines()[1:] if line[:1] in (" ", "-") or not line
            ]
            if _position(lines, expected) is None:
                where = f"{path}: hunk {number} of {len(hunks)}"
                found.append(f"{where} {_first_missed(lines, expected, hunk)}")
    return found or [
        f"{path}: its hunks apply separately, but not together" for path in patch.paths
    ]


def _position(lines: list[str], expected: list[str]) -> int | None:
    for start in range(len(lines) - len(expected) + 1):
        if lines[start : start + len(expected)] == expected:
            return start
    return None


def _first_missed(lines: list[str], expected: list[str], hunk: str) -> str:
    for line in expected:
        if line not in lines:
            return f"expects the line {line.strip()!r}, which is not there"
    number = re.match(r"@@ -(\d+)", hunk)[1]
    return f"expects {len(expected)} lines as at line {number} of ours; there are others between"
