# Copyright (c) 2026, the megatron-core gptoss authors.
"""The patch queue on a small invented upstream: no network, no Megatron, real git and real files."""

import multiprocessing
import os
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import pytest
from patch_queue import materialise  # noqa: E402
from patch_queue.errors import QueueError  # noqa: E402
from patch_queue.materialise import Workspace  # noqa: E402
from patch_queue.refresh import refresh_patch, refresh_series  # noqa: E402
from patch_queue.series import Patch  # noqa: E402
from patch_queue.tree import DoesNotApply, apply_patch, diff_trees  # noqa: E402

from tests.unit_tests.tools.invented_upstream import edit, snapshot  # noqa: I001


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
    refresh_patch(Workspace(root), "first")
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
    written = refresh_patch(Workspace(root), "fixes/first")
    assert written == ["fixes/first.patch", "device/second.patch"]
    series = Workspace(root).series
    assert "line six" in series["first"].diff and "line six" not in series["second"].diff


def test_refresh_refuses_lines_of_a_later_patch(root):
    edit(root, "megatron/core/a.py", "line thirty\n", "LINE THIRTY\n")
    patches = {p: p.read_bytes() for p in (root / "patches").rglob("*.patch")}
    with pytest.raises(QueueError, match="later patch"):
        refresh_patch(Workspace(root), "first")
    assert patches == {p: p.read_bytes() for p in (root / "patches").rglob("*.patch")}
    assert "LINE THIRTY" in (root / "megatron/core/a.py").read_text()


def test_refresh_of_some_files_leaves_the_other_edits(root):
    edit(root, "megatron/core/b.py", "b = 1", "b = 2")
    edit(root, "megatron/training/c.py", "c = 1", "c = 2")
    refresh_patch(Workspace(root), "first", ["megatron/core/b.py"])
    assert Workspace(root).edits() == ["megatron/core/b.py", "megatron/training/c.py"]
    Workspace(root).materialise()
    assert Workspace(root).edits() == ["megatron/training/c.py"]
    assert (root / "megatron/training/c.py").read_text() == "c = 2\n"


def test_refresh_without_a_name_mends_stale_index_lines(root):
    """Two branches that each touch a file merge to patches whose index lines are of no tree."""
    path = root / "patches/device/second.patch"
    text = path.read_text()
    stale = text.replace(Workspace(root).series["second"].results["megatron/core/a.py"], "1" * 40)
    path.write_text(stale)
    with pytest.raises(DoesNotApply, match="patches.py refresh"):
        Workspace(root).expected()
    assert refresh_series(Workspace(root)) == ["device/second.patch"]
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
    """Materialise, but block at one point of the swap, to be killed there."""
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
