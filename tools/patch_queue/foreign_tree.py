# Copyright (c) 2026, the megatron-core gptoss authors.
"""Patch a Megatron-LM checkout or an unpacked container tree in place, all or nothing."""

import os
import tempfile
from pathlib import Path

from .errors import QueueError
from .resolve import APPLIES, PRESENT, REFUSED, VARIANT, Plan, make_plan
from .series import Patch, Series
from .tree import Tree
from .versions import TRAINING


def modules_of(root: Path, patches: list[Patch]) -> Tree:
    """Our own modules that the patches' hunks import (header field ``Requires``)."""
    found: Tree = {}
    for name in sorted({name for patch in patches for name in patch.requires}):
        path = root / name
        inside = (file for file in path.rglob("*") if "__pycache__" not in file.parts)
        files = sorted(filter(Path.is_file, inside)) if path.is_dir() else [path]
        found |= {file.relative_to(root).as_posix(): file.read_bytes() for file in files}
    return found


def read_target(target: Path) -> Tree:
    """The source files under ``target/megatron``.

    Raises:
        QueueError: ``target`` is not a directory with megatron/core.
    """
    core = target / "megatron" / "core"
    if not (core / "__init__.py").is_file():
        hint = ""
        for folder in (target, *target.parents[:2]):
            if (folder.parent / "megatron" / "core" / "__init__.py").is_file():
                hint = f" Did you mean {folder.parent}?"
        raise QueueError(
            f"{target} has no megatron/core. Give its parent directory: a Megatron-LM checkout, "
            f"or the site-packages directory of an installation.{hint}"
        )
    found: Tree = {}
    for folder, folders, files in os.walk(target / "megatron"):
        folders[:] = [name for name in folders if name not in (".git", "__pycache__")]
        for name in files:
            if name.endswith((".py", ".cpp", ".txt", ".json")):
                path = Path(folder) / name
                found[path.relative_to(target).as_posix()] = path.read_bytes()
    return found


def apply_to(root: Path, series: Series, target: Path, groups: list[str]) -> Plan:
    """Apply the groups' patches to ``target``, the directory with ``megatron/core``.

    The patches and variants are those of the tree's version. Patches that are already applied
    stay. Either everything is written or nothing.

    Raises:
        QueueError: not a Megatron tree, or some patches do not apply; lists every hunk that
            does not apply, and the target is unchanged.
    """
    before = read_target(target)
    plan = make_plan(series, before, groups)
    refusals = [f"{o.patch.name}: {o.detail}" for o in plan.with_status(REFUSED)]
    modules = modules_for(root, plan)
    for name, content in modules.items():
        if before.get(name, content) != content:
            refusals.append(f"{name}: the target has another file of this name")
    if refusals:
        version = plan.found or "unknown"
        raise QueueError(
            "\n".join(
                [
                    f"{target} (version {version}) was not changed; {len(refusals)} patches or files do not apply:"
                ]
                + refusals
                + plan.notes
            )
        )
    changed = {name: c for name, c in (plan.tree | modules).items() if before.get(name) != c}
    _write_all(target, changed, removed=before.keys() - plan.tree.keys())
    return plan


def modules_for(root: Path, plan: Plan) -> Tree:
    """Our modules that belong on the plan's tree."""
    used = [o.patch for o in plan.with_status(APPLIES, VARIANT, PRESENT)]
    modules = modules_of(root, used)
    if plan.training:
        return modules
    return {name: text for name, text in modules.items() if not name.startswith(TRAINING)}


def _write_all(target: Path, files: Tree, removed) -> None:
    """Write every file next to its target, then rename: a full disk or a read-only tree fails
    before anything has changed."""
    staged: list[tuple[Path, Path]] = []
    created: list[Path] = []
    try:
        for name, content in files.items():
            place = target / name
            for folder in reversed([p for p in place.parents if not p.exists()]):
                folder.mkdir()
                created.append(folder)
            handle, temporary = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
            staged.append((Path(temporary), place))
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
            mode = place.stat().st_mode & 0o777 if place.exists() else 0o644
            os.chmod(temporary, mode)
    except OSError as error:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)
        for folder in reversed(created):
            folder.rmdir()
        raise QueueError(f"{target} cannot be written ({error}); it was not changed.") from error
    for temporary, place in staged:
        os.replace(temporary, place)
    for name in removed:
        (target / name).unlink()
