# Copyright (c) 2026, the megatron-core gptoss authors.
"""File trees in memory, and git's own patch tools applied to them."""

import hashlib
import os
import re
import subprocess
import tempfile
from pathlib import Path

from .errors import QueueError
from .series import Patch

Tree = dict[str, bytes]  # relative POSIX path -> content
_ABSENT = "0" * 40


class DoesNotApply(QueueError):
    """A patch does not apply to a tree; ``reasons`` has one line of git for each file and hunk."""

    def __init__(self, patch: Patch, reasons: list[str]):
        super().__init__(f"{patch.name} does not apply:\n  " + "\n  ".join(reasons))
        self.patch = patch
        self.reasons = reasons


def blob_id(content: bytes | None) -> str:
    """git's hash of a file's content, as in a patch's index line."""
    if content is None:
        return _ABSENT
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _git(args: list[str], cwd: Path, stdin: str | None = None) -> subprocess.CompletedProcess:
    # Outside any repository that contains the temporary directory: `git apply` in a subdirectory of
    # a work tree silently skips files.
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    env.update(GIT_CEILING_DIRECTORIES=str(cwd.resolve().parent), LC_ALL="C")
    env.update(GIT_CONFIG_GLOBAL=os.devnull, GIT_CONFIG_SYSTEM=os.devnull)
    try:
        return subprocess.run(
            ["git", *args], cwd=cwd, env=env, input=stdin, capture_output=True, encoding="utf-8"
        )
    except FileNotFoundError:
        raise QueueError(
            "git was not found on PATH; it applies the patches. Install git."
        ) from None


def _write(tree: Tree, folder: Path) -> None:
    for name, content in tree.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def apply_patch(tree: Tree, patch: Patch, reverse: bool = False) -> Tree:
    """A new tree with the patch applied; context must match exactly, line numbers may be off.

    Raises:
        DoesNotApply: with git's reason for each file, and nothing changed.
    """
    if not patch.diff:  # one for older versions alone
        return dict(tree)
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp).resolve()
        _write({name: tree[name] for name in patch.paths if name in tree}, folder)
        args = ["apply", "--whitespace=nowarn"] + (["--reverse"] if reverse else [])
        result = _git([*args, "-"], folder, stdin=patch.diff)
        if result.returncode:
            lines = [line.removeprefix("error: ") for line in result.stderr.splitlines()]
            raise DoesNotApply(patch, lines)
        applied = dict(tree)
        for name in patch.paths:
            path = folder / name
            if path.is_file():
                applied[name] = path.read_bytes()
            else:
                applied.pop(name, None)
    unchanged = [name for name in patch.paths if applied.get(name) == tree.get(name)]
    if unchanged:  # git reports success for a file that it skipped
        raise DoesNotApply(patch, [f"{name}: left unchanged" for name in unchanged])
    return applied


def apply_series(tree: Tree, patches: list[Patch], exact: bool = True) -> Tree:
    """Apply patches in order; ``exact`` also compares each file with the patch's index line."""
    for patch in patches:
        tree = apply_patch(tree, patch)
        if exact:
            off = [n for n, blob in patch.results.items() if blob_id(tree.get(n)) != blob]
            if off:
                raise DoesNotApply(
                    patch,
                    [
                        f"{name}: applied, but the result differs from the patch's index line. "
                        "Run `python tools/patches.py refresh`."
                        for name in off
                    ],
                )
    return tree


def diff_trees(old: Tree, new: Tree, context: int = 3) -> str:
    """A git diff with full index lines of every path on which the trees differ, or ''."""
    changed = sorted(n for n in old.keys() | new.keys() if old.get(n) != new.get(n))
    if not changed:
        return ""
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp).resolve()
        for side, tree in (("a", old), ("b", new)):
            (folder / side).mkdir()
            _write({name: tree[name] for name in changed if name in tree}, folder / side)
        args = ["diff", "--no-index", "--no-prefix", "--full-index", "--no-color"]
        args += ["--no-ext-diff", "--no-renames", "--diff-algorithm=histogram"]
        args += [f"--unified={context}"]
        result = _git([*args, "a", "b"], folder)
    if result.returncode != 1:
        raise QueueError(f"git diff failed (exit {result.returncode}): {result.stderr.strip()}")
    # --no-index names an added or deleted file b/x b/x or a/x a/x; git apply and readers want a/x b/x.
    return re.sub(
        r"^diff --git [ab]/(\S+) [ab]/\1$", r"diff --git a/\1 b/\1", result.stdout, flags=re.M
    )
