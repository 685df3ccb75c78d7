# Copyright (c) 2026, the megatron-core gptoss authors.
"""docs/upstream_tests.md from the results that tools/upstream_tests.py writes."""

import re
from collections import Counter

from patch_queue.upstream import VERSION

TREES = ("unpatched", "patched")
TESTS = "tests/unit_tests"
OUTCOMES = ("passed", "failed", "skipped")
# In the reason of a test that needs a CUDA device or several ranks. "integer modulo by zero":
# upstream's tests divide the rank by the number of devices.
_NEEDS_DEVICE = (
    "integer modulo by zero",
    "CUDA",
    "cuda",
    "NCCL",
    "world size",
    "world_size",
    "ranks",
)
_HEAD = f"""# Upstream's own tests

Unit tests of Megatron-LM run on Megatron-Core {VERSION} as released and on the same with all patches. They are not in this
repository: `tools/upstream_tests.py` reads them from a checkout (branch `core_r0.19.0` at f8837c04ef, the one nearest to
the release), runs both trees and writes this page. World size 1; tests that need more ranks, TransformerEngine or another
package skip or fail on both.
"""
# Explanations of tests that fail on the patched tree, by a part of the test's id.
NOTES = {
    "training/models/test_dist_utils.py": (
        "`test_dist_utils.py` replaces `torch.cuda` by a mock and counts calls that the patched code "
        "makes only where there is a CUDA device. If `device_utils.device_type` reports one, all of them pass."
    ),
    "unit_tests/test_checkpointing.py": (
        "`test_checkpointing.py` saves with arguments that lack `check_for_nan_in_loss_and_grad`, which a "
        "patch read without a default. It has one since (`features/refuse_to_save_non_finite`)."
    ),
    "test_mlp_glu.py": (
        "`test_torch_dist.py` and `test_serialization.py` use a directory that a process of another file "
        "removed (each process now has its own); `test_mlp_glu.py` was stopped at 120 s."
    ),
}


def regressions(results: dict) -> list[str]:
    """The tests that pass on the release and do not pass on the patched tree."""
    passed = [test for test, found in results["unpatched"].items() if found[0] == "passed"]
    return [test for test in passed if _outcome(results, "patched", test) != "passed"]


def render(machines: list[dict]) -> str:
    """The page.

    Args:
        machines: the results of one machine each.
    """
    lines = [_HEAD]
    for results in machines:
        lines += _machine_section(results)
    lines += ["## Files", "", *_file_table(machines)]
    return "\n".join(lines) + "\n"


def render_rerun(results: dict) -> str:
    """A section about files that were rerun, for a page whose full results are not at hand."""
    files = _files(results)
    lines = [
        f"## Rerun on {results['machine']}",
        "",
        "For these files, these results replace those above.",
        "",
        "| file below tests/unit_tests: passed / all | " + " | ".join(TREES) + " |",
        "|---" * (len(TREES) + 1) + "|",
    ]
    lines += [
        f"| {file} | " + " | ".join(_passed(results, file, tree) for tree in TREES) + " |"
        for names in results["topics"].values()
        for file in names
        if file in files
    ]
    worse = regressions(results)
    lines += ["", f"Pass unpatched and not patched: {len(worse)}.", ""]
    lines += _list_of(results, worse)
    return "\n".join(lines + [""] * bool(worse)) + "\n"


def with_section(page: str, section: str) -> str:
    """The page with a section instead of the one with the same heading, or before the last."""
    heading = section.splitlines()[0]
    parts = re.split(r"^(?=## )", page, flags=re.M)
    parts = [part for part in parts if part.splitlines()[:1] != [heading]]
    return "".join([*parts[:-1], section, parts[-1]])


def _machine_section(results: dict) -> list[str]:
    worse = regressions(results)
    return [
        f"## {results['machine']}",
        "",
        *_outcome_table(results),
        "",
        f"Pass unpatched and not patched: {len(worse)}. Pass patched alone: {_improved(results)}.",
        "",
        *_list_of(results, worse),
        *_notes(worse),
        *_reasons(results),
    ]


def _outcome_table(results: dict) -> list[str]:
    lines = ["| tree | passed | failed | skipped |", "|---|---|---|---|"]
    for tree in TREES:
        counts = Counter(outcome for outcome, _ in results[tree].values())
        lines.append(f"| {tree} | " + " | ".join(str(counts[o]) for o in OUTCOMES) + " |")
    return lines


def _improved(results: dict) -> int:
    return sum(
        found[0] == "passed" and _outcome(results, "unpatched", test) != "passed"
        for test, found in results["patched"].items()
    )


def _list_of(results: dict, tests: list[str]) -> list[str]:
    return [f"- `{test}`: {' '.join(results['patched'].get(test, ['missing']))}" for test in tests]


def _notes(tests: list[str]) -> list[str]:
    found = {note for name, note in NOTES.items() if any(name in test for test in tests)}
    if found:
        return ["", *sorted(found), ""]
    return [""] if tests else []


def _reasons(results: dict) -> list[str]:
    """Why tests do not pass on the patched tree: the most frequent reasons."""
    open_ = [found for found in results["patched"].values() if found[0] != "passed"]
    device = sum(any(word in reason for word in _NEEDS_DEVICE) for _, reason in open_)
    reasons = Counter(
        f"{outcome}: {reason.removeprefix('Skipped: ')[:90]}" for outcome, reason in open_
    )
    return [
        f"Of the tests that do not pass on the patched tree, {device} need one or several CUDA devices.",
        "",
        "The most frequent reasons:",
        "",
        *(f"- {count}: {reason}" for reason, count in reasons.most_common(8)),
        "",
    ]


def _file_table(machines: list[dict]) -> list[str]:
    head = " | ".join(results["machine"].split(",")[0] for results in machines)
    lines = [
        f"| file below tests/unit_tests: passed / all, patched | {head} |",
        "|---" * (len(machines) + 1) + "|",
    ]
    ran = set().union(*(_files(results) for results in machines))
    for topic, names in machines[0]["topics"].items():
        files = [name for name in names if name in ran]
        if files:
            lines.append(f"| **{topic}** |" + " |" * len(machines))
        for file in files:
            lines.append(f"| {file} | " + " | ".join(_passed(r, file) for r in machines) + " |")
    return lines


def _files(results: dict) -> set[str]:
    return {test.split("::")[0].removeprefix(f"{TESTS}/") for test in results["patched"]}


def _passed(results: dict, file: str, tree: str = "patched") -> str:
    found = [f for t, f in results[tree].items() if t.split("::")[0] == f"{TESTS}/{file}"]
    return f"{sum(f[0] == 'passed' for f in found)} / {len(found)}"


def _outcome(results: dict, tree: str, test: str) -> str:
    return results[tree].get(test, ["missing"])[0]
