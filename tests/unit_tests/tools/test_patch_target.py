# Copyright (c) 2026, the megatron-core gptoss authors.
"""Patching a foreign tree: patches that apply, that are skipped and why, and unchanged files."""

import errno
import os
import subprocess
import tempfile
import zipfile

import pytest
from patch_queue import upstream  # noqa: E402
from patch_queue.errors import QueueError  # noqa: E402
from patch_queue.export import export  # noqa: E402
from patch_queue.foreign_tree import apply_to, read_target  # noqa: E402
from patch_queue.materialise import Workspace  # noqa: E402
from patch_queue.refresh import new_patch, refresh_patch  # noqa: E402
from patch_queue.resolve import (  # noqa: E402
    APPLIES,
    LEFT_OUT,
    NOT_NEEDED,
    PRESENT,
    REFUSED,
    VARIANT,
    make_plan,
)
from patch_queue.series import GROUPS  # noqa: E402
from patch_queue.static_check import broken_by, undefined_names  # noqa: E402
from patch_queue.versions import detect, in_ranges, nearest  # noqa: E402

import patches as command_line  # noqa: E402
from tests.unit_tests.tools.invented_upstream import (  # noqa: I001
    FILES,
    NUMBERS,
    add_header,
    add_patch,
    add_variant,
    edit,
    make_fork,
    snapshot,
)

A = "megatron/core/a.py"
GIT = ["git", "-c", "user.name=x", "-c", "user.email=x@invalid"]


def series(root):
    return Workspace(root).series


def outcomes(plan):
    return {o.patch.name.removesuffix(".patch"): (o.status, o.detail) for o in plan.outcomes}


def test_one_group_then_all(root, fork):
    plan = apply_to(root, series(root), fork, ["device"])
    assert outcomes(plan) == {"device/second": (APPLIES, "")}
    text = (fork / A).read_text()
    assert "line thirty" in text and "line 5\n" in text and "theirs\n" in text
    plan = apply_to(root, series(root), fork, list(GROUPS))
    assert outcomes(plan) == {"fixes/first": (APPLIES, ""), "device/second": (PRESENT, "")}


def test_former_names(root):
    """--group cpu is device and hooks; a patch is found by its former group and former name."""
    assert [patch.name for patch in series(root).in_groups(["cpu"])] == ["device/second.patch"]
    assert {
        series(root)[name].name for name in ("second", "cpu/second", "device/second.patch")
    } == {"device/second.patch"}
    add_patch(root, "features/load_complete_checkpoint", {A: ("line 20\n", "line twenty\n")})
    assert series(root)["fixes/load_whole_checkpoint"].group == "features"
    for wrong in ("sink/second", "third"):
        with pytest.raises(QueueError, match="No patch is called"):
            series(root)[wrong]


def test_already_patched(root, fork, monkeypatch, capsys):
    """Says so, exits 0 and writes nothing, though the second patch covers lines of the first."""
    add_patch(root, "sink/third", {A: ("line five\n", "line five and more\n")})
    monkeypatch.setattr(command_line, "ROOT", root)
    assert command_line.main(["apply", "--to", str(fork)]) == 0
    before, stamp = snapshot(fork), (fork / A).stat().st_mtime_ns
    capsys.readouterr()
    assert command_line.main(["apply", "--to", str(fork)]) == 0
    shown = capsys.readouterr().out
    assert "already patched; nothing was changed" in shown and "applies" not in shown
    assert (snapshot(fork), (fork / A).stat().st_mtime_ns) == (before, stamp)


def test_half_patched(root, fork):
    """Applied patches stay, and missing ones are inserted."""
    add_patch(root, "sink/third", {A: ("line five\n", "line five and more\n")})
    add_patch(root, "fixes/fourth", {A: ("line 20\n", "line twenty\n")})
    edit(fork, A, "line 5\n", "line five and more\n")
    edit(fork, A, "line 20\n", "line twenty\n")
    plan = apply_to(root, series(root), fork, list(GROUPS))
    assert outcomes(plan) == {
        "fixes/first": (PRESENT, ""),
        "device/second": (APPLIES, ""),
        "sink/third": (PRESENT, ""),
        "fixes/fourth": (PRESENT, ""),
    }
    assert "line thirty\n" in (fork / A).read_text()


def test_one_hunk_of_two_is_there(root, fork):
    """Half of one patch is no state to build on: refused by the hunk, nothing touched."""
    edit(root, A, "line 15\n", "line fifteen\n")
    refresh_patch(Workspace(root), "fixes/first")
    edit(fork, A, "line 5\n", "line five\n")
    before = snapshot(fork)
    with pytest.raises(QueueError, match=r"fixes/first.*a\.py: hunk 1 of 2 .*'line 5'"):
        apply_to(root, series(root), fork, list(GROUPS))
    assert snapshot(fork) == before


def test_local_edits_in_the_same_lines(root, fork):
    """Every patch that refuses is named with its file and hunk; nothing is touched."""
    edit(fork, A, "line 30\n", "line 30 of theirs\n")
    edit(fork, A, "line 4\n", "line 4 of theirs\n")
    before = snapshot(fork)
    with pytest.raises(QueueError) as refusal:
        apply_to(root, series(root), fork, list(GROUPS))
    text = str(refusal.value)
    assert "2 patches or files do not apply" in text and "was not changed" in text
    assert "fixes/first.patch: megatron/core/a.py: hunk 1 of 1 expects the line 'line 4'" in text
    assert "device/second.patch: megatron/core/a.py: hunk 1 of 1 expects the line 'line 30'" in text
    assert snapshot(fork) == before


@pytest.mark.parametrize("inside", ["", "megatron", "megatron/core"])
def test_not_megatron(root, fork, tmp_path, inside):
    """Rejected; for a subdirectory of the tree the message names the right directory."""
    place = fork / inside if inside else tmp_path / "else"
    place.mkdir(exist_ok=True)
    with pytest.raises(QueueError, match="has no megatron/core") as refusal:
        apply_to(root, series(root), place, list(GROUPS))
    assert (f"Did you mean {fork}?" in str(refusal.value)) == bool(inside)


def test_read_only(root, fork, monkeypatch):
    """The third file that cannot be written ends it before the first one has changed."""
    add_patch(root, "fixes/more", {"megatron/core/b.py": ("b = 1", "b = 2")})
    before, real, calls = snapshot(fork), tempfile.mkstemp, []

    def mkstemp(dir=None, **kwargs):
        if str(dir).startswith(str(fork)):
            calls.append(dir)
            if len(calls) == 2:
                raise OSError(errno.EROFS, "Read-only file system")
        return real(dir=dir, **kwargs)

    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)
    with pytest.raises(QueueError, match="Read-only file system.*was not changed"):
        apply_to(root, series(root), fork, list(GROUPS))
    assert len(calls) == 2 and snapshot(fork) == before


@pytest.mark.parametrize("version, near", [("0.23.0", "0.19.2"), ("0.12.1", "0.15.3")])
def test_unknown_version(root, tmp_path, version, near, monkeypatch, capsys):
    """Patches of the nearest version are tried with a note, and none is applied unless all fit."""
    monkeypatch.setattr(command_line, "ROOT", root)
    fork = make_fork(tmp_path / "other", version)
    assert command_line.main(["apply", "--to", str(fork)]) == 0
    said = f"{version} is not a supported version; treated as {near}."
    assert said in capsys.readouterr().out
    fork = make_fork(tmp_path / "changed", version)
    edit(fork, A, "line 30\n", "line 30 of theirs\n")
    before = snapshot(fork)
    assert command_line.main(["apply", "--to", str(fork)]) == 2
    assert said in capsys.readouterr().err
    assert snapshot(fork) == before


def test_no_version(root, fork):
    (fork / "megatron/core/package_info.py").unlink()
    plan = apply_to(root, series(root), fork, list(GROUPS))
    assert plan.notes == ["The tree has no version; treated as 0.19.2."]


def test_version_arithmetic():
    assert nearest("0.17.0rc3") == "0.17.1"
    assert nearest("1.0.0") == "0.19.2"
    info = b'MAJOR = 0\nMINOR = 18\nPATCH = 2\nPRE_RELEASE = "rc1"\n'
    assert detect({"megatron/core/package_info.py": info}) == "0.18.2rc1"
    assert in_ranges("0.17.1", "0.15,0.17-0.18") and not in_ranges("0.16.1", "0.15,0.17-0.18")
    assert in_ranges("0.19.0", "0.15-0.19.0") and not in_ranges("0.19.2", "0.15-0.19.0")
    assert in_ranges("0.19.2", "0.19.1-0.20") and not in_ranges("0.19.0", "0.19.1-0.20")
    with pytest.raises(QueueError, match="'main' is not a version"):
        nearest("main")


OLD = NUMBERS.replace("line 6\n", "line 6 of old\n")
# Context and file as an older version has them; b.py came later.
OLD_FILES = {k: v for k, v in FILES.items() if k != "megatron/core/b.py"} | {A: OLD}


def test_variants(root, tmp_path):
    """The variant's file replaces the patch's on its version and older; the other files stay."""
    edit(root, "megatron/core/b.py", "b = 1", "b = 2")
    edit(root, "megatron/training/c.py", "c = 1", "c = 2")
    refresh_patch(Workspace(root), "fixes/first")
    changed = OLD.replace("line 5\n", "line five\n")
    header = "Without: megatron/core/b.py\n"
    add_variant(root, "0.17", "fixes/first", {A: OLD}, {A: changed}, header)
    for version in ("0.17.1", "0.16.1"):
        fork = make_fork(tmp_path / version, version, OLD_FILES)
        plan = apply_to(root, series(root), fork, ["fixes"])
        assert outcomes(plan) == {"fixes/first": (VARIANT, "0.17")}
        assert (fork / A).read_text() == changed.replace("line 39\n", "theirs\n")
        # 0.16 and older: megatron/training is left alone.
        content = "c = 2\n" if version == "0.17.1" else "c = 1\n"
        assert (fork / "megatron/training/c.py").read_text() == content
        assert outcomes(apply_to(root, series(root), fork, ["fixes"])) == {
            "fixes/first": (PRESENT, "0.17")
        }
    fork = make_fork(tmp_path / "0.18.2", "0.18.2", OLD_FILES)
    with pytest.raises(QueueError, match="'line 6'"):
        apply_to(root, series(root), fork, ["fixes"])


def test_for_older_versions_alone(root, tmp_path):
    """A patch without a diff of its own changes nothing here; its variants are what it is."""
    new_patch(Workspace(root), "fixes/older", "Mend what is right here", "tests/x.py::test")
    add_header(root, "fixes/older", "Applied-Upstream: 0.19.0")
    changed = OLD.replace("line 20\n", "line twenty\n")
    add_variant(root, "0.17", "fixes/older", {A: OLD}, {A: changed})
    assert Workspace(root).materialise()
    for version, expected in {
        "0.19.2": (NOT_NEEDED, "fixed upstream since 0.19.0"),
        "0.18.2": (REFUSED, ""),
        "0.17.1": (VARIANT, "0.17"),
    }.items():
        fork = make_fork(tmp_path / version, version, OLD_FILES)
        plan = make_plan(
            series(root), read_target(fork), ["fixes"], leave_out={"fixes/first.patch"}
        )
        assert outcomes(plan) == {"fixes/older": expected}
        assert (b"line twenty" in plan.tree[A]) is (version == "0.17.1")


def test_variant_of_nothing(root):
    add_variant(root, "0.17", "fixes/stray", {A: "a\n"}, {A: "b\n"})
    problems = series(root).problems()
    assert "variants/0.17/fixes/stray.patch is a variant of no patch of the series" in problems


def test_left_out(root, tmp_path):
    """By the header, with the reason; from the version on that holds the fix; without training."""
    add_header(root, "fixes/first", "Not-Needed: 0.15-0.16 the file is new in 0.17")
    add_header(root, "device/second", "Applied-Upstream: 0.18.0", "Not-Ported: 0.16 no use there")
    add_patch(root, "sink/third", {"megatron/training/c.py": ("c = 1", "c = 2")})
    found = {}
    for version in ("0.16.1", "0.17.1", "0.18.2"):
        fork = make_fork(tmp_path / version, version)
        found[version] = outcomes(make_plan(series(root), read_target(fork), list(GROUPS)))
    assert found == {
        "0.16.1": {
            "fixes/first": (NOT_NEEDED, "the file is new in 0.17"),
            "device/second": (LEFT_OUT, "no use there"),
            "sink/third": (LEFT_OUT, "about megatron/training, which is patched from 0.17 on"),
        },
        "0.17.1": {
            "fixes/first": (APPLIES, ""),
            "device/second": (APPLIES, ""),
            "sink/third": (APPLIES, ""),
        },
        "0.18.2": {
            "fixes/first": (APPLIES, ""),
            "device/second": (NOT_NEEDED, "fixed upstream since 0.18.0"),
            "sink/third": (APPLIES, ""),
        },
    }


def test_try_takes_folders_wheels_and_releases(root, fork, wheel, monkeypatch, capsys):
    """It prints what apply would do and touches nothing; an unknown release names the known ones."""
    monkeypatch.setattr(command_line, "ROOT", root)
    before = snapshot(fork)
    with zipfile.ZipFile(wheel) as archive:
        assert A in archive.namelist()
    assert command_line.main(["try", "--no-tests", str(fork), str(wheel)]) == 0
    assert capsys.readouterr().out.count("fixes/first.patch    applies") == 2
    assert snapshot(fork) == before
    assert command_line.main(["try", "--no-tests", "0.18.77"]) == 2
    assert "0.18.77 is not one of the supported releases: 0.15.3, " in capsys.readouterr().err


@pytest.mark.parametrize("training", [True, False], ids=["training", "core-alone"])
def test_export_goes_through_git_am(root, fork, tmp_path, training):
    """With our module in it; a second export has the same bytes."""
    add_header(root, "device/second", "Requires: megatron/core/own.py")
    add_patch(root, "sink/third", {"megatron/training/c.py": ("c = 1", "c = 2")})
    if not training:
        (fork / "megatron/training/c.py").unlink()
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "theirs"]):
        subprocess.run([*GIT, *command], cwd=fork, check=True)
    # Made for the release, used on a fork of it.
    plan = make_plan(series(root), Workspace(root).pristine(), list(GROUPS))
    mails = export(root, plan, tmp_path / "out", without_training=not training)
    again = export(root, plan, tmp_path / "again", without_training=not training)
    assert [m.read_bytes() for m in mails] == [m.read_bytes() for m in again]
    subprocess.run([*GIT, "am", "-q", *mails], cwd=fork, check=True)
    log = subprocess.run(
        ["git", "log", "--format=%s"], cwd=fork, check=True, capture_output=True, text=True
    )
    subjects = ["a: Change for device/second", "a: Change for fixes/first"]
    subjects = ["c: Change for sink/third"] * training + subjects
    assert log.stdout.splitlines()[: len(subjects)] == subjects
    assert (fork / "megatron/core/own.py").read_text() == "ours = True\n"
    assert "line thirty" in (fork / A).read_text()


def test_export_of_a_tree_that_refuses_writes_nothing(root, fork, tmp_path):
    edit(fork, A, "line 30\n", "line 30 of theirs\n")
    plan = make_plan(series(root), read_target(fork), list(GROUPS))
    with pytest.raises(QueueError, match="device/second"):
        export(root, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_that_nothing_defines():
    """A hunk fitted four versions in which the argument that it reads does not exist."""
    good = (
        "import os as o\nX = 1\ndef f(a, *b):\n    global Y\n    Y = a\n    return [c for c in b]\n"
    )
    assert undefined_names(good + "def g():\n    return X, Y, o, len, __file__\n") == set()
    assert undefined_names(good + "class A:\n    z = 1\n    def g(self): return z\n") == {"z"}
    code = (
        "class A:\n    def f(self):\n        self.x = 1\n        return self.x, self.f, self.{}\n"
    )
    before = {"w.py": code.format("y").encode(), "x.py": good.encode(), "y.py": b"", "z.txt": b""}
    after = {
        "w.py": code.format("y, self.z").encode(),
        "x.py": good.encode() + b"print(group)\n",
        "y.py": b"def f(:\n",
        "z.txt": b"group",
    }
    found = broken_by(before, after)
    assert found[:2] == ["w.py: nothing defines A.z", "x.py: nothing defines group"]
    assert found[2].startswith("y.py:1: ") and len(found) == 3


def test_every_release_has_a_checksum():
    assert all(len(digest) == 64 for digest in upstream.RELEASES.values())
    assert list(upstream.RELEASES)[-1] == upstream.VERSION
    assert os.path.basename(upstream._DOWNLOAD) in upstream.WHEELS
