# Copyright (c) 2026, the megatron-core gptoss authors.
"""The series on the supported releases of Megatron-Core: patches/README.md is correct."""

import subprocess
from pathlib import Path

import pytest
from patch_queue import evidence, table  # noqa: E402
from patch_queue.errors import QueueError  # noqa: E402
from patch_queue.export import export  # noqa: E402
from patch_queue.foreign_tree import apply_to, read_target  # noqa: E402
from patch_queue.materialise import Workspace  # noqa: E402
from patch_queue.resolve import PRESENT, make_plan  # noqa: E402
from patch_queue.series import GROUPS  # noqa: E402
from patch_queue.upstream import RELEASES, locate_release, read_wheel  # noqa: E402

from tests.unit_tests.tools.invented_upstream import add_patch, make_fork  # noqa: I001

ROOT = Path(__file__).resolve().parents[3]
GIT = ["git", "-c", "user.name=x", "-c", "user.email=x@invalid"]


@pytest.fixture(scope="module")
def workspace():
    """This checkout, with the wheels of all releases at hand."""
    workspace = Workspace(ROOT)
    try:
        for version in RELEASES:
            locate_release(ROOT, version)
    except QueueError as error:
        pytest.skip(f"needs the wheels of {', '.join(RELEASES)}: {error}")
    return workspace


@pytest.mark.slow
@pytest.mark.network
def test_table(workspace):
    """Up to date; nothing refuses a release, alone or with the others, or breaks a name."""
    assert table.check(workspace, table.release_plans(workspace)) == []


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("version", RELEASES)
def test_folder_of_a_release(workspace, tmp_path, version):
    """The same result by apply --to and by git am; a second apply finds everything there."""
    tree = read_wheel(locate_release(ROOT, version))
    folders = [tmp_path / "applied", tmp_path / "mailed"]
    for folder in folders:
        for name, content in tree.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    plan = apply_to(ROOT, workspace.series, folders[0], list(GROUPS))
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "release"]):
        subprocess.run([*GIT, *command], cwd=folders[1], check=True)
    mails = export(ROOT, make_plan(workspace.series, tree, list(GROUPS)), tmp_path / "mails")
    subprocess.run([*GIT, "am", "-q", *mails], cwd=folders[1], check=True)
    applied, mailed = (read_target(folder) for folder in folders)
    assert applied.keys() == mailed.keys()
    assert [name for name in applied if applied[name] != mailed[name]] == []
    again = make_plan(workspace.series, applied, list(GROUPS))
    assert {o.patch.name for o in again.with_status(PRESENT)} == {
        o.patch.name for o in plan.outcomes if o.diff
    }
    assert again.tree == applied


def test_evidence_of_a_patch(root, tmp_path):
    """Before and after on a tree of another version: a test of the root's own, run on both."""
    add_patch(root, "fixes/b", {"megatron/core/b.py": ("b = 1", "b = 2")})
    tests = root / "tests"
    tests.mkdir()
    (tests / "test_b.py").write_text(
        "from megatron.core.b import b\n\ndef test_value():\n    assert b == 2, f'b is {b}'\n\n"
        "def test_other():\n    raise KeyError('gone')\n"
    )
    (tests / "test_import.py").write_text("import nowhere_to_be_found\n")
    ids = ["tests/test_b.py::test_value", "tests/test_b.py::test_other"]
    ids += ["tests/test_import.py::test_x", "tests/test_b.py::test_absent"]
    tree = read_target(make_fork(tmp_path / "fork", "0.17.1"))
    workspace = Workspace(root)
    after = evidence.run_tests(
        workspace, tree | make_plan(workspace.series, tree, ["fixes"]).tree, ids
    )
    before = evidence.run_tests(workspace, tree, ids[:1])
    assert (before[ids[0]].outcome, after[ids[0]].outcome) == ("failed", "passed")
    assert before[ids[0]].reason == "AssertionError: b is 1"
    reasons = [after[test].reason for test in ids[1:]]
    assert reasons[0] == "KeyError: 'gone'" and "nowhere_to_be_found" in reasons[1]
    assert reasons[2] == "not found, or timed out"


def test_table_is_rendered_and_checked(root, tmp_path, monkeypatch):
    """Ticks where the evidence has both runs; reasons where a patch is not on a version."""
    trees = {
        version: read_target(make_fork(tmp_path / version, version))
        for version in ("0.17.1", "0.19.2")
    }
    path = root / "patches/fixes/first.patch"
    path.write_text(path.read_text().replace("Test:", "Not-Needed: 0.17 too old\nTest:"))
    workspace = Workspace(root)
    plans = {v: make_plan(workspace.series, tree, list(GROUPS)) for v, tree in trees.items()}
    monkeypatch.setattr(table, "RELEASES", dict.fromkeys(trees))
    monkeypatch.setattr(table, "locate_release", lambda root, version: version)
    monkeypatch.setattr(table, "read_wheel", lambda version: trees[version])
    (test,) = set(evidence.tests_of(workspace.series["first"]))
    table.write_evidence(
        workspace, "0.19.2", {test: {"after": ["passed", ""], "before": ["failed", "x"]}}
    )
    written = table.write(workspace, plans)
    text = written.read_text()
    assert "| fixes/first | not needed | applies ✓ |" in text
    assert "- `fixes/first` (0.17.1): not needed: too old." in text
    assert table.check(workspace, plans) == []
    written.write_text(text.replace("✓", ""))
    assert "table --write" in table.check(workspace, plans)[0]


def test_evidence_of_one_patch_more(root):
    """What is known of the others stays; what no patch names any more goes."""
    workspace = Workspace(root)
    first, second = (
        test for name in ("first", "second") for test in evidence.tests_of(workspace.series[name])
    )
    entry = {"after": ["passed", ""], "before": ["failed", "x"]}
    table.write_evidence(workspace, "0.19.2", {first: entry, "tests/test_gone.py::test_x": entry})
    new = entry | {"before": ["failed", "y"]}
    table.write_evidence(workspace, "0.19.2", {second: new}, keep=True)
    assert table.read_evidence(workspace)["0.19.2"] == {first: entry, second: new}
    table.write_evidence(workspace, "0.19.2", {first: new})
    assert table.read_evidence(workspace)["0.19.2"] == {first: new}
