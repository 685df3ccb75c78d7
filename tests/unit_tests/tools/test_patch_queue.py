# Copyright (c) 2026, the megatron-core gptoss authors.
"""The patch queue on a small invented upstream: no network, no Megatron, real git and real files."""

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[3] / "tools"
sys.path.insert(0, str(TOOLS))

from patch_queue import materialise, upstream  # noqa: E402
from patch_queue.errors import QueueError  # noqa: E402
from patch_queue.export import export  # noqa: E402
from patch_queue.fold import new_patch, refresh  # noqa: E402
from patch_queue.materialise import Workspace  # noqa: E402
from patch_queue.series import GROUPS, Patch  # noqa: E402
from patch_queue.target import apply_to  # noqa: E402
from patch_queue.tree import DoesNotApply, apply_patch, diff_trees  # noqa: E402

NUMBERS = "".join(f"line {i}\n" for i in range(40))
FILES = {
    "megatron/core/__init__.py": "",
    "megatron/core/a.py": NUMBERS,
    "megatron/core/b.py": "b = 1\n",
    "megatron/training/c.py": "c = 1\n",
}


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel of the invented upstream, accepted as the pinned one."""
    path = tmp_path / "upstream.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in FILES.items():
            archive.writestr(name, text)
        archive.writestr("megatron/core/datasets/helpers_cpp.so", "binary")
        archive.writestr("megatron_core.dist-info/METADATA", "x")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(upstream.WHEELS, "upstream.whl", digest)
    monkeypatch.setenv("MEGATRON_CORE_WHEEL", str(path))
    return path


@pytest.fixture
def root(tmp_path, wheel):
    """A checkout with one own module and two patches, inside a git work tree as in real life."""
    root = tmp_path / "checkout"
    (root / "patches").mkdir(parents=True)
    (root / "patches" / "series").write_text("")
    subprocess.run(["git", "init", "-q", root], check=True)
    own = root / "megatron" / "core" / "own.py"
    own.parent.mkdir(parents=True)
    own.write_text("ours = True\n")
    workspace = Workspace(root)
    workspace.materialise()
    add_patch(root, "fixes/first", {"megatron/core/a.py": ("line 5\n", "line five\n")})
    add_patch(root, "cpu/second", {"megatron/core/a.py": ("line 30\n", "line thirty\n")})
    return root


def edit(root, path, old, new):
    file = root / path
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def add_patch(root, name, changes, **header):
    new_patch(Workspace(root), name, f"Change for {name}", "tests/x.py::test")
    for path, (old, new) in changes.items():
        edit(root, path, old, new)
    refresh(Workspace(root), name, [])


def snapshot(root):
    return {
        p.relative_to(root).as_posix(): p.read_bytes()
        for p in sorted((root / "megatron").rglob("*"))
        if p.is_file()
    }


def test_materialise_keeps_own_modules_and_ignores_exactly_upstreams_files(root):
    status = ["git", "status", "--porcelain", "--untracked-files=all", "megatron"]
    shown = subprocess.run(status, cwd=root, capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["??", "megatron/core/own.py"]
    assert "line five" in (root / "megatron/core/a.py").read_text()
    assert not list(root.rglob("*.so"))


def test_materialise_is_idempotent(root):
    stamp = (root / "megatron/core/a.py").stat().st_mtime_ns
    assert Workspace(root).materialise() is False
    assert (root / "megatron/core/a.py").stat().st_mtime_ns == stamp


def test_round_trip_edit_refresh_wipe_materialise(root):
    """The same bytes come back after the tree was wiped, deletions and new lines included."""
    edit(root, "megatron/core/a.py", "line 7\n", "line seven\nand a half\n")
    (root / "megatron/core/b.py").unlink()
    refresh(Workspace(root), "first", [])
    before = snapshot(root)
    assert Workspace(root).edits() == []
    for path in Workspace(root).manifest()["files"]:
        (root / path).unlink()
    (root / "megatron/.manifest.json").unlink()
    assert Workspace(root).materialise() is True
    assert snapshot(root) == before
    assert not (root / "megatron/core/b.py").exists()


def test_refresh_folds_into_an_early_patch_and_rewrites_the_later_one(root):
    edit(root, "megatron/core/a.py", "line 6\n", "line six\n")
    written = refresh(Workspace(root), "fixes/first", [])
    assert written == ["fixes/first.patch", "cpu/second.patch"]
    series = Workspace(root).series
    assert "line six" in series["first"].diff and "line six" not in series["second"].diff


def test_refresh_refuses_lines_of_a_later_patch(root):
    edit(root, "megatron/core/a.py", "line thirty\n", "LINE THIRTY\n")
    patches = {p: p.read_bytes() for p in (root / "patches").rglob("*.patch")}
    with pytest.raises(QueueError, match="later patch"):
        refresh(Workspace(root), "first", [])
    assert patches == {p: p.read_bytes() for p in (root / "patches").rglob("*.patch")}
    assert "LINE THIRTY" in (root / "megatron/core/a.py").read_text()


def test_refresh_of_some_files_leaves_the_other_edits(root):
    edit(root, "megatron/core/b.py", "b = 1", "b = 2")
    edit(root, "megatron/training/c.py", "c = 1", "c = 2")
    refresh(Workspace(root), "first", ["megatron/core/b.py"])
    assert Workspace(root).edits() == ["megatron/core/b.py", "megatron/training/c.py"]
    Workspace(root).materialise()
    assert Workspace(root).edits() == ["megatron/training/c.py"]
    assert (root / "megatron/training/c.py").read_text() == "c = 2\n"


def test_refresh_without_a_name_mends_stale_index_lines(root):
    """Two branches that each touch a file merge to patches whose index lines are of no tree."""
    path = root / "patches/cpu/second.patch"
    text = path.read_text()
    stale = text.replace(Workspace(root).series["second"].results["megatron/core/a.py"], "1" * 40)
    path.write_text(stale)
    with pytest.raises(DoesNotApply, match="patches.py refresh"):
        Workspace(root).expected()
    assert refresh(Workspace(root), None, []) == ["cpu/second.patch"]
    assert path.read_text() == text


def test_an_edit_survives_a_change_of_another_file(root):
    edit(root, "megatron/core/b.py", "b = 1", "b = 7")
    series = root / "patches/series"
    series.write_text("fixes/first.patch\n")
    assert Workspace(root).materialise() is True
    assert (root / "megatron/core/b.py").read_text() == "b = 7\n"
    assert "line 30\n" in (root / "megatron/core/a.py").read_text()
    assert Workspace(root).edits() == ["megatron/core/b.py"]


def test_an_edit_that_the_new_series_would_overwrite_stops_it(root):
    edit(root, "megatron/core/a.py", "line 20\n", "precious\n")
    before = snapshot(root)
    (root / "patches/series").write_text("fixes/first.patch\n")
    with pytest.raises(QueueError, match="megatron/core/a.py"):
        Workspace(root).materialise()
    assert snapshot(root) == before


def test_a_tree_without_a_manifest_is_not_overwritten_where_it_differs(root):
    (root / "megatron/.manifest.json").unlink()
    edit(root, "megatron/core/a.py", "line 20\n", "precious\n")
    with pytest.raises(QueueError, match="megatron/core/a.py"):
        Workspace(root).materialise()
    edit(root, "megatron/core/a.py", "precious\n", "line 20\n")
    assert Workspace(root).materialise() is True


def _materialise_slowly(root, moment):
    """Materialise, but stop for ever at one moment of the swap, to be killed there."""
    rename = Path.rename

    def stall(*_):
        (root / "reached").touch()
        time.sleep(60)

    if moment == "before":
        materialise._swap = stall
    else:
        materialise._exchange = lambda a, b: False

        def rename_then_stall(self, target):
            result = rename(self, target)
            if Path(target).name == ".megatron.old":
                stall()
            return result

        Path.rename = rename_then_stall
    Workspace(root).materialise()


@pytest.mark.parametrize("moment", ["before", "between"])
def test_a_killed_install_leaves_the_old_tree_or_the_new_one(root, moment):
    old = snapshot(root)
    (root / "patches/series").write_text("fixes/first.patch\n")
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_materialise_slowly, args=(root, moment))
    process.start()
    deadline = time.monotonic() + 20
    while not (root / "reached").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    if moment == "before":
        assert snapshot(root) == old
    assert Workspace(root).materialise() is True
    assert "line 30\n" in (root / "megatron/core/a.py").read_text()
    assert (root / "megatron/core/own.py").read_text() == "ours = True\n"
    assert not list(root.glob(".megatron.*"))


def test_the_swap_works_without_the_exchange_call(root, monkeypatch):
    monkeypatch.setattr(materialise, "_exchange", lambda a, b: False)
    (root / "patches/series").write_text("fixes/first.patch\n")
    assert Workspace(root).materialise() is True
    assert "line 30\n" in (root / "megatron/core/a.py").read_text()


def test_a_wheel_with_another_hash_is_refused(root, wheel):
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("megatron/core/evil.py", "")
    (root / "patches/series").write_text("fixes/first.patch\n")
    with pytest.raises(QueueError, match="SHA-256"):
        Workspace(root).materialise()


def test_a_missing_wheel_is_named(root, monkeypatch):
    monkeypatch.setenv("MEGATRON_CORE_WHEEL", "/nowhere/x.whl")
    with pytest.raises(QueueError, match="/nowhere/x.whl"):
        Workspace(root).pristine()


@pytest.fixture
def fork(tmp_path):
    """Somebody's Megatron-LM checkout, with an edit of their own far from ours."""
    fork = tmp_path / "fork"
    for name, text in FILES.items():
        path = fork / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("line 39\n", "theirs\n"))
    return fork


def test_apply_to_a_fork_one_group_then_all(root, fork):
    series = Workspace(root).series
    assert apply_to(root, series, fork, ["cpu"]) == (["cpu/second.patch"], [])
    text = (fork / "megatron/core/a.py").read_text()
    assert "line thirty" in text and "line 5\n" in text and "theirs\n" in text
    applied, present = apply_to(root, series, fork, list(GROUPS))
    assert (applied, present) == (["fixes/first.patch"], ["cpu/second.patch"])


def test_apply_to_refuses_by_file_and_touches_nothing(root, fork):
    edit(fork, "megatron/core/a.py", "line 30\n", "line 30 of theirs\n")
    before = snapshot(fork)
    with pytest.raises(QueueError, match=r"(?s)cpu/second.*megatron/core/a.py"):
        apply_to(root, Workspace(root).series, fork, list(GROUPS))
    assert snapshot(fork) == before


def test_apply_to_something_else_is_refused(root, tmp_path):
    with pytest.raises(QueueError, match="megatron/core"):
        apply_to(root, Workspace(root).series, tmp_path, list(GROUPS))


def test_export_goes_through_git_am(root, fork, tmp_path):
    """With our module in it; a second export has the same bytes."""
    path = root / "patches/cpu/second.patch"
    path.write_text(path.read_text().replace("Test:", "Requires: megatron/core/own.py\nTest:"))
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@invalid"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "theirs"]):
        subprocess.run([*git, *command], cwd=fork, check=True)
    mails = export(root, Workspace(root).series, tmp_path / "out", list(GROUPS))
    again = export(root, Workspace(root).series, tmp_path / "again", list(GROUPS))
    assert [m.read_bytes() for m in mails] == [m.read_bytes() for m in again]
    subprocess.run([*git, "am", "-q", *mails], cwd=fork, check=True)
    log = subprocess.run(
        ["git", "log", "--format=%s"], cwd=fork, check=True, capture_output=True, text=True
    )
    assert log.stdout.splitlines()[:2] == ["a: Change for cpu/second", "a: Change for fixes/first"]
    assert (fork / "megatron/core/own.py").read_text() == "ours = True\n"
    assert "line thirty" in (fork / "megatron/core/a.py").read_text()


def test_a_skipped_file_is_not_taken_for_applied():
    """git apply exits 0 where it skips a path; only the contents tell."""
    tree = {"megatron/x.py": b"a\n"}
    patch = Patch.parse("t", "h\n---\n" + diff_trees(tree, {"megatron/x.py": b"b\n"}))
    assert apply_patch(tree, patch) == {"megatron/x.py": b"b\n"}
    with pytest.raises(DoesNotApply):
        apply_patch({"megatron/x.py": b"other\n"}, patch)


def test_problems_name_strays_and_incomplete_headers(root):
    (root / "patches/fixes/stray.patch").write_text("x\n---\n")
    path = root / "patches/fixes/first.patch"
    path.write_text(path.read_text().replace("Origin: vendor\n", ""))
    problems = "\n".join(Workspace(root).series.problems())
    assert "fixes/stray.patch is not in patches/series" in problems
    assert "fixes/first.patch: header lacks Origin" in problems
