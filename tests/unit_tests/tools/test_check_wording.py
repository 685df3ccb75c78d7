# Copyright (c) 2026, the megatron-core gptoss authors.

"""tools/check_wording.py on a repository with a branch, on main, and in a shallow clone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[3] / "tools" / "check_wording.py"
IDENTITY = {
    f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
}


def git(root, *words):
    environ = {**os.environ, **IDENTITY, "GIT_CONFIG_GLOBAL": os.devnull}
    subprocess.run(["git", *words], cwd=root, env=environ, check=True, capture_output=True)


def commit(root, files):
    for name, text in files.items():
        (root / name).write_text(text)
    git(root, "add", ".")
    git(root, "commit", "-m", "x")


def check(root, *words):
    done = subprocess.run(
        [sys.executable, str(TOOL), *words], cwd=root, capture_output=True, text=True
    )
    assert not done.stderr
    return done.returncode, done.stdout.splitlines()


@pytest.fixture
def clone(tmp_path):
    """A clone of a repository with two commits."""
    origin = tmp_path / "origin"
    origin.mkdir()
    git(origin, "init", "-q", "-b", "main")
    commit(origin, {"page.md": "The folder is old.\n"})
    commit(origin, {"page.md": "The folder is old.\nA folder is new.\n"})
    git(tmp_path, "clone", "-q", str(origin), "clone")
    return tmp_path / "clone"


def test_last_commit_on_main(clone):
    assert check(clone) == (1, ["page.md:2: 'folder': write directory"])


def test_prose_of_a_branch(clone):
    """Strings and comments, not names; the header and added lines of patches; no code spans."""
    git(clone, "checkout", "-q", "-b", "topic")
    code = 'folder = 1  # goes on\nprint(f"{folder}", "a Folder")\n"""Text\nheld up."""\n'
    patch = "Description: held up\n---\n@@ -1 +1 @@\n anew\n-anew\n+anew\n"
    commit(clone, {"a.py": code, "a.patch": patch, "page.md": "`folder`, folders_of, FOLDER\n"})
    (clone / "page.md").write_text("Not committed: busiest.\n")
    assert check(clone) == (
        1,
        [
            "a.patch:1: 'held up': write blocked",
            "a.patch:6: 'anew': write from the start",
            "a.py:1: 'goes on': write continues, resumes",
            "a.py:2: 'folder': write directory",
            "a.py:4: 'held up': write blocked",
            "page.md:1: 'busiest': write most loaded",
        ],
    )
    assert check(clone, "HEAD") == (1, ["page.md:1: 'busiest': write most loaded"])


def test_shallow_clone(clone, tmp_path):
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{tmp_path}/origin", "shallow")
    status, lines = check(tmp_path / "shallow")
    assert status == 0 and "no commit to compare with" in lines[0]
