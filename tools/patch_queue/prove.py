# Copyright (c) 2026, the megatron-core gptoss authors.
"""Each patch's test fails when that patch alone is left out."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .materialise import PACKAGE, Workspace
from .series import Patch
from .tree import DoesNotApply, Tree, apply_patch

FAILS, PASSES = "fails without it", "PASSES WITHOUT IT"


def prove(workspace: Workspace, patch: Patch) -> tuple[str, str]:
    """Run the patch's test on a tree that has every patch but this one.

    Returns:
        (verdict, detail): `FAILS` is what a patch should get; the detail is the first reason, and
        the later patches that change the same lines and so had to be left out as well.
    """
    tests = re.findall(r"tests/\S+", patch.fields.get("Test", ""))
    tree, dropped = _without(workspace, patch)
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        _copy_checkout(workspace, tree, folder)
        command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-x", *tests]
        command += ["-p", "no:cacheprovider"]
        environ = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)
    reasons = re.findall(r"^(?:E  |FAILED|ERROR) .*", result.stdout, flags=re.M)
    last_line = (result.stdout.strip() or f"exit code {result.returncode}").splitlines()[-1]
    detail = reasons[0].strip() if reasons else last_line
    if dropped:
        detail += f" (also left out: {', '.join(dropped)})"
    return (FAILS if result.returncode else PASSES), detail


def _without(workspace: Workspace, patch: Patch) -> tuple[Tree, list[str]]:
    tree, dropped = workspace.pristine(), []
    for other in workspace.series.patches:
        if other.name == patch.name:
            continue
        try:
            tree = apply_patch(tree, other)
        except DoesNotApply:
            dropped.append(other.name)
    return tree, dropped


def _copy_checkout(workspace: Workspace, tree: Tree, folder: Path) -> None:
    """The checkout with other upstream files: its own files are copied, with build products."""
    upstream = set(workspace.manifest()["files"])
    for path in (workspace.root / PACKAGE).rglob("*"):
        name = path.relative_to(workspace.root).as_posix()
        if path.is_file() and name not in upstream and "__pycache__" not in name:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, folder / name)
    for name, content in tree.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for entry in workspace.root.iterdir():
        if entry.name != PACKAGE and not entry.name.startswith("."):
            (folder / entry.name).symlink_to(entry)
