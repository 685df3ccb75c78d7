# Copyright (c) 2026, the megatron-core gptoss authors.
"""The table patch x version of patches/README.md, with the results of the tests."""

import json
from pathlib import Path

from .errors import QueueError
from .evidence import FAILED, PASSED, SKIPPED, tests_of
from .materialise import Workspace
from .resolve import (
    APPLIES,
    LEFT_OUT,
    NOT_NEEDED,
    PRESENT,
    REFUSED,
    VARIANT,
    Outcome,
    Plan,
    make_plan,
)
from .series import GROUPS, Patch
from .static_check import broken_by
from .upstream import RELEASES, VERSION, locate_release, read_wheel

README = "README.md"
EVIDENCE = "evidence.json"
_BEGIN = "<!-- table: `python tools/patches.py table --write` writes what follows -->"
_END = "<!-- table ends -->"
_CELLS = {
    APPLIES: "applies",
    PRESENT: "already there",
    NOT_NEEDED: "not needed",
    LEFT_OUT: "left out",
    REFUSED: "**does not apply**",
}


def release_plans(workspace: Workspace) -> dict[str, Plan]:
    """The series on each known release."""
    return {
        version: make_plan(
            workspace.series,
            read_wheel(locate_release(workspace.root, version)),
            list(GROUPS),
        )
        for version in RELEASES
    }


def cell(outcome: Outcome) -> str:
    """The text of one cell."""
    if outcome.status == VARIANT:
        return f"variant {outcome.detail}"
    return _CELLS[outcome.status]


def render(workspace: Workspace, plans: dict[str, Plan]) -> str:
    """The table, the reasons below it, and the evidence, in Markdown."""
    evidence = read_evidence(workspace)
    head = "| patch | " + " | ".join(plans) + " |"
    lines = [_BEGIN, "", head, "|---" * (len(plans) + 1) + "|"]
    notes: dict[str, dict[str, list[str]]] = {}
    for number, patch in enumerate(workspace.series.patches):
        row = []
        for version, plan in plans.items():
            outcome = plan.outcomes[number]
            row.append(cell(outcome) + mark(evidence, version, patch, outcome))
            if outcome.status in (NOT_NEEDED, LEFT_OUT, REFUSED):
                reasons = notes.setdefault(patch.name, {})
                reasons.setdefault(f"{cell(outcome)}: {outcome.detail}", []).append(version)
        lines.append(f"| {patch.name.removesuffix('.patch')} | " + " | ".join(row) + " |")
    lines += ["", "Why a patch is not on a version:", ""]
    general = "about megatron/training"
    absent = "the tree has no megatron/training"
    without = [name for name, reasons in notes.items() if any(absent in why for why in reasons)]
    lines.append(
        f"- {', '.join(short(name) for name in without)}: {general}, which the packages of 0.15 "
        "and 0.16 do not contain."
    )
    for name, reasons in notes.items():
        for why, versions in reasons.items():
            if absent not in why:
                lines.append(f"- {short(name)} ({', '.join(versions)}): {why}.")
    lines += ["", *_open_tests(workspace, plans, evidence), "", _END]
    return "\n".join(lines)


def short(name: str) -> str:
    return f"`{name.removesuffix('.patch')}`"


def mark(evidence: dict, version: str, patch: Patch, outcome: Outcome) -> str:
    """A tick if each test of the patch fails before and passes after, on that version."""
    if outcome.status not in (APPLIES, VARIANT, PRESENT):
        return ""
    found = [evidence.get(version, {}).get(test) for test in tests_of(patch)]
    return " ✓" if found and all(map(proven, found)) else ""


def proven(entry: dict | None) -> bool:
    if not entry or "before" not in entry:
        return False
    return entry["before"][0] == FAILED and entry["after"][0] == PASSED


def _open_tests(workspace: Workspace, plans, evidence) -> list[str]:
    """The patches without a tick, and the results of their tests."""
    reasons: dict[tuple[str, str], dict[str, list[str]]] = {}
    for number, patch in enumerate(workspace.series.patches):
        for version, plan in plans.items():
            if plan.outcomes[number].status not in (APPLIES, VARIANT, PRESENT):
                continue
            for test in tests_of(patch):
                entry = evidence.get(version, {}).get(test)
                if proven(entry):
                    continue
                key = _unproven_reason(entry)
                reasons.setdefault(key, {}).setdefault(patch.name, []).append(version)
    if not reasons:
        return ["Every patch's test fails before and passes after, on every version."]
    lines = [
        "Without a tick, because:",
        "",
        "| result of the test | patches (versions) |",
        "|---|---|",
    ]
    for (what, reason), patches in sorted(reasons.items()):
        names = ", ".join(
            f"{short(name)} ({', '.join(dict.fromkeys(v))})" for name, v in patches.items()
        )
        text = f"{what}{': ' + reason if reason else ''}".replace("|", "\\|")
        lines.append(f"| {text} | {names} |")
    return lines


def _unproven_reason(entry: dict | None) -> tuple[str, str]:
    if entry is None:
        return "not run", ""
    after = entry["after"]
    if after[0] == SKIPPED:
        return "skipped", after[1]
    if after[0] == FAILED:
        return "fails on the patched tree", after[1]
    return "passes on the unpatched tree, too", ""


def read_evidence(workspace: Workspace) -> dict:
    """version -> test id -> {"after": [outcome, reason], "before": [outcome, reason]}."""
    path = workspace.series.folder / EVIDENCE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_evidence(workspace: Workspace, version: str, tests: dict, keep: bool = False) -> None:
    """Replace one version's entry, keys in order, so that a second run changes little.

    Args:
        keep: replace the results of ``tests`` only, and drop tests that no patch names.
    """
    evidence = read_evidence(workspace)
    if keep:
        named = {test for patch in workspace.series.patches for test in tests_of(patch)}
        known = evidence.get(version, {})
        tests = {test: entry for test, entry in known.items() if test in named} | tests
    evidence[version] = dict(sorted(tests.items()))
    ordered = {known: evidence[known] for known in RELEASES if known in evidence}
    path = workspace.series.folder / EVIDENCE
    path.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


def write(workspace: Workspace, plans: dict[str, Plan]) -> Path:
    """Put the table into patches/README.md. Returns its path."""
    path = workspace.series.folder / README
    path.write_text(_with_table(path, render(workspace, plans)), encoding="utf-8")
    return path


def check(workspace: Workspace, plans: dict[str, Plan]) -> list[str]:
    """Problems: the table is out of date, or a patch does not apply to a known release."""
    path = workspace.series.folder / README
    problems = []
    if path.read_text(encoding="utf-8") != _with_table(path, render(workspace, plans)):
        problems.append(f"{path} is out of date; run `python tools/patches.py table --write`.")
    # Those found on the pinned version are inherited attributes: only others are problems.
    pinned = set(
        broken_by(read_wheel(locate_release(workspace.root, VERSION)), plans[VERSION].tree)
    )
    for version, plan in plans.items():
        problems += [f"{version}: {o.patch.name}: {o.detail}" for o in plan.with_status(REFUSED)]
        tree = read_wheel(locate_release(workspace.root, version))
        problems += [
            f"{version}: {what}" for what in broken_by(tree, plan.tree) if what not in pinned
        ]
        for group in GROUPS:
            alone = make_plan(workspace.series, tree, [group])
            problems += [
                f"{version}: {o.patch.name} needs another group: {o.detail}"
                for o in alone.with_status(REFUSED)
            ]
    return problems


def _with_table(path: Path, table: str) -> str:
    text = path.read_text(encoding="utf-8") if path.is_file() else f"{_BEGIN}\n{_END}\n"
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise QueueError(f"{path} lacks the lines '{_BEGIN}' and '{_END}' around the table.")
    return before + table + after
