# Copyright (c) 2026, the megatron-core gptoss authors.
"""Write upstream + patches into megatron/: atomic, idempotent, and never over an edit."""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from . import upstream
from .errors import QueueError
from .series import Series
from .tree import Tree, apply_series

PACKAGE = "megatron"
MANIFEST = f"{PACKAGE}/.manifest.json"
IGNORE = f"{PACKAGE}/.gitignore"


class Workspace:
    """A checkout: its series, its materialised tree, and the manifest that remembers it.

    The manifest holds the digest of the inputs and the SHA-256 of every materialised file, so that
    an edit is seen as one however old it is, and our own modules, which stand in the same tree,
    are never taken for upstream's.
    """

    def __init__(self, root: Path):
        self.root = root.resolve()
        self.series = Series(self.root / "patches")

    def pristine(self) -> Tree:
        """Upstream's files as released."""
        return upstream.read_wheel(upstream.locate_wheel(self.root))

    def expected(self) -> Tree:
        """Upstream's files with the complete series applied."""
        return apply_series(self.pristine(), self.series.patches)

    def manifest(self) -> dict | None:
        """What was materialised last, or None."""
        try:
            return json.loads((self.root / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def inputs_digest(self) -> str:
        """Changes whenever the materialised tree would."""
        digest = hashlib.sha256(upstream.VERSION.encode())
        for patch in self.series.patches:
            digest.update(f"{patch.name}\n{patch.diff}".encode())
        return digest.hexdigest()

    def read(self, paths) -> Tree:
        """Those of the paths that exist on disk."""
        return {p: (self.root / p).read_bytes() for p in paths if (self.root / p).is_file()}

    def edits(self) -> list[str]:
        """Materialised files that were edited or deleted since."""
        manifest = self.manifest()
        if manifest is None:
            return []
        now = self.read(manifest["files"])
        return [p for p, digest in manifest["files"].items() if _sha256(now.get(p)) != digest]

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One materialisation at a time; the kernel drops the lock of a killed process."""
        (self.root / ".upstream").mkdir(exist_ok=True)
        with open(self.root / ".upstream" / "lock", "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def materialise(self) -> bool:
        """Bring megatron/ up to date. Returns whether anything was written.

        Raises:
            QueueError: an edit and the new series change the same file; nothing was written.
        """
        with self.lock():
            self._recover()
            manifest = self.manifest()
            digest = self.inputs_digest()
            if manifest and manifest["inputs"] == digest and self._complete(manifest):
                return False
            expected = self.expected()
            self._write(expected, self._kept_edits(expected, manifest), digest)
            return True

    def adopt(self, expected: Tree) -> None:
        """Record the tree on disk, which equals ``expected``, as materialised from the series."""
        self.series = Series(self.series.folder)
        self._write(expected, {}, self.inputs_digest())

    def _complete(self, manifest: dict) -> bool:
        return all((self.root / path).exists() for path in manifest["files"])

    def _kept_edits(self, expected: Tree, manifest: dict | None) -> dict[str, bytes]:
        """Edited files that the new tree leaves alone otherwise, so that the edit can stay."""
        before = manifest["files"] if manifest else {}
        on_disk = self.read(expected.keys() | before.keys())
        kept, conflicts = {}, []
        for path, content in on_disk.items():
            if content == expected.get(path) or _sha256(content) == before.get(path):
                continue
            if path in before and before[path] == _sha256(expected.get(path)):
                kept[path] = content
            else:
                conflicts.append(path)
        if conflicts:
            raise QueueError(
                "Not materialised: these files hold edits that are in no patch, and the series now "
                "changes them:\n  " + "\n  ".join(sorted(conflicts)) + "\n"
                "Save them elsewhere, delete them, run `python tools/patches.py apply`, repeat the "
                "edits and add them with `python tools/patches.py refresh PATCH`."
            )
        return kept

    def _write(self, expected: Tree, kept: dict[str, bytes], digest: str) -> None:
        manifest = {
            "upstream": upstream.VERSION,
            "inputs": digest,
            "files": {path: _sha256(content) for path, content in sorted(expected.items())},
        }
        ignored = sorted([*expected, MANIFEST, IGNORE])
        files = expected | kept
        files[MANIFEST] = json.dumps(manifest, indent=1).encode()
        files[IGNORE] = "".join(f"{path.removeprefix(PACKAGE)}\n" for path in ignored).encode()
        staging = Path(tempfile.mkdtemp(prefix=".megatron.staging-", dir=self.root))
        try:
            for path, content in files.items():
                target = staging / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
            self._carry_own_files(staging, files)
            staged = staging / PACKAGE
            staged.chmod(0o755)
            _swap(staged, self.root / PACKAGE, self.root / ".megatron.old")
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            shutil.rmtree(self.root / ".megatron.old", ignore_errors=True)

    def _carry_own_files(self, staging: Path, files: Tree) -> None:
        """Our own modules and build products go over as they are, with their mode and times."""
        old = self.manifest()
        upstream_paths = files.keys() | (old["files"].keys() if old else set())
        for path in (self.root / PACKAGE).rglob("*"):
            name = path.relative_to(self.root).as_posix()
            if name in upstream_paths or "__pycache__" in path.parts or path.is_dir():
                continue
            target = staging / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target, follow_symlinks=False)

    def _recover(self) -> None:
        """After a kill: put the old tree back if the swap was half done, drop what was staged."""
        old, tree = self.root / ".megatron.old", self.root / PACKAGE
        if old.is_dir() and not tree.exists():
            old.rename(tree)
        for leftover in self.root.glob(".megatron.*"):
            shutil.rmtree(leftover, ignore_errors=True)


def _sha256(content: bytes | None) -> str | None:
    return None if content is None else hashlib.sha256(content).hexdigest()


def _swap(new: Path, tree: Path, old: Path) -> None:
    """Put ``new`` in the place of ``tree``: in one step where the kernel can, else in two.

    In two steps, ``tree`` does not exist in between; ``_recover`` repairs a kill there.
    """
    if not tree.exists():
        new.rename(tree)
        return
    if _exchange(new, tree):
        return
    try:
        tree.rename(old)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        # A directory from a lower layer of an overlay file system (a container image) cannot be
        # renamed: copy it, and only then remove it.
        partial = old.with_suffix(".copying")
        shutil.copytree(tree, partial, symlinks=True)
        partial.rename(old)
        shutil.rmtree(tree)
    new.rename(tree)


def _exchange(a: Path, b: Path) -> bool:
    """renameat2(RENAME_EXCHANGE), which Python does not offer. False where it is not available."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_fdcwd, rename_exchange = -100, 2
    return renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0
