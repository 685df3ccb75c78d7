# Copyright (c) 2026, the megatron-core gptoss authors.
"""Each patch's test fails when that patch alone is left out."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from .evidence import copy_checkout, tests_of
from .materialise import Workspace
from .series import Patch
from .tree import DoesNotApply, Tree, apply_patch

FAILS, PASSES = "fails without it", "PASSES WITHOUT IT"


def prove(workspace: Workspace, patch: Patch) -> tuple[str, str]:
    """Run the patch's test on a tree that has every patch but this one.

    Returns:
        (verdict, detail): `FAILS` is what a patch should get; the detail is the first reason, and
        the later patches that change the same lines and so had to be left out as well.
    """
    tests = tests_of(patch)
    tree, dropped = _without(workspace, patch)
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        copy_checkout(workspace, tree, folder)
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
