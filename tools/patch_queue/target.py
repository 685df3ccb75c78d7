# Copyright (c) 2026, the megatron-core gptoss authors.
"""Patch a Megatron-LM checkout or an unpacked container tree in place, all or nothing."""

import os
import tempfile
from pathlib import Path

from .errors import QueueError
from .series import Patch, Series
from .tree import DoesNotApply, Tree, apply_patch


def modules_of(root: Path, patches: list[Patch]) -> Tree:
    """Our own modules that the patches' hunks import (header field ``Requires``)."""
    found: Tree = {}
    for name in sorted({name for patch in patches for name in patch.requires}):
        path = root / name
        inside = (file for file in path.rglob("*") if "__pycache__" not in file.parts)
        files = sorted(filter(Path.is_file, inside)) if path.is_dir() else [path]
        found |= {file.relative_to(root).as_posix(): file.read_bytes() for file in files}
    return found


def _already_there(tree: Tree, patch: Patch) -> bool:
    try:
        apply_patch(tree, patch, reverse=True)
    except DoesNotApply:
        return False
    return True


def apply_to(root: Path, series: Series, target: Path, groups: list[str]) -> tuple[list, list]:
    """Apply the groups' patches to ``target``, the folder that holds ``megatron/core``.

    Returns:
        (applied, already there): names of patches.
    Raises:
        QueueError: not a Megatron tree, or some patches do not fit; lists every file that refuses,
            and the target is as it was.
    """
    if not (target / "megatron" / "core").is_dir():
        raise QueueError(
            f"{target} holds no megatron/core. Give the folder above it: a Megatron-LM checkout, "
            "or the site-packages folder of an installation."
        )
    patches = series.in_groups(groups)
    touched = {path for patch in patches for path in patch.paths}
    before: Tree = {p: (target / p).read_bytes() for p in touched if (target / p).is_file()}
    tree, applied, present, refusals = before, [], [], []
    for patch in patches:
        try:
            tree = apply_patch(tree, patch)
            applied.append(patch.name)
        except DoesNotApply as error:
            if _already_there(tree, patch):
                present.append(patch.name)
            else:
                refusals.append(str(error))
    modules = modules_of(root, patches)
    for name, content in modules.items():
        there = target / name
        if there.is_file() and there.read_bytes() != content:
            refusals.append(f"{name}: the target has another file of this name")
    if refusals:
        raise QueueError(
            f"{target} was left as it was; {len(refusals)} do not fit:\n" + "\n".join(refusals)
        )
    changed = {name: c for name, c in (tree | modules).items() if before.get(name) != c}
    _write_all(target, changed, removed=before.keys() - tree.keys())
    return applied, present


def _write_all(target: Path, files: Tree, removed) -> None:
    """Write every file beside its place first, so that a full disk or a read-only tree is met
    before anything has changed; then rename them."""
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
        raise QueueError(f"{target} cannot be written ({error}); it was left as it was.") from error
    for temporary, place in staged:
        os.replace(temporary, place)
    for name in removed:
        (target / name).unlink()
