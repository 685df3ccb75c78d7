# Copyright (c) 2026, the megatron-core gptoss authors.
"""A small invented upstream for the tests of tools/: no network, no Megatron, real git and files."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[3] / "tools"
sys.path.insert(0, str(TOOLS))

from patch_queue import upstream  # noqa: E402
from patch_queue.materialise import Workspace  # noqa: E402
from patch_queue.refresh import new_patch, refresh_patch  # noqa: E402
from patch_queue.tree import diff_trees  # noqa: E402

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
    (root / "patches" / "series").write_text("# Upstream: abc\n")
    subprocess.run(["git", "init", "-q", root], check=True)
    own = root / "megatron" / "core" / "own.py"
    own.parent.mkdir(parents=True)
    own.write_text("ours = True\n")
    workspace = Workspace(root)
    workspace.materialise()
    add_patch(root, "fixes/first", {"megatron/core/a.py": ("line 5\n", "line five\n")})
    add_patch(root, "device/second", {"megatron/core/a.py": ("line 30\n", "line thirty\n")})
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
    refresh_patch(Workspace(root), name)


def snapshot(root):
    return {
        p.relative_to(root).as_posix(): p.read_bytes()
        for p in sorted((root / "megatron").rglob("*"))
        if p.is_file()
    }


@pytest.fixture
def fork(tmp_path):
    """Somebody's Megatron-LM checkout, with an edit of their own far from ours."""
    return make_fork(tmp_path / "fork")


def make_fork(folder, version="0.19.2", files=FILES):
    """A tree of a version, as package_info.py tells it."""
    info = "".join(
        f"{name} = {part}\n" for name, part in zip(("MAJOR", "MINOR", "PATCH"), version.split("."))
    )
    for name, text in {**files, "megatron/core/package_info.py": info}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("line 39\n", "theirs\n"))
    return folder


def add_header(root, name, *lines):
    """Put fields into a patch's header."""
    path = root / "patches" / f"{name}.patch"
    path.write_text(path.read_text().replace("Test:", "\n".join([*lines, "Test:"]), 1))


def add_variant(root, version, name, old, new, header="", context=3):
    """A variant made of two trees."""
    path = root / "patches" / "variants" / version / f"{name}.patch"
    path.parent.mkdir(parents=True, exist_ok=True)
    old = {key: text.encode() for key, text in old.items()}
    new = {key: text.encode() for key, text in new.items()}
    path.write_text(f"Description: as before\n{header}---\n{diff_trees(old, new, context)}")
