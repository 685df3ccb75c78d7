# Copyright (c) 2026, the megatron-core gptoss authors.
"""Keep the newest checkpoints of a run and delete older ones.

A folder is moved out of sight before its files are deleted, so that a kill in between leaves no half
checkpoint, and only once the new one is whole; the deletion itself is done beside the training.
"""

import json
import os
import shutil
import threading
from pathlib import Path

from megatron.gpt_oss.outputs import files_in
from megatron.training import checkpoint_integrity

TRASH = ".deleted-"


class CheckpointKeeper:
    """Deletes what is older than the `keep` newest whole checkpoints. For rank 0.

    Args:
        keep: how many stay, 1 or more. Folders that are not whole do not count, and stay if they
            are newer than the oldest that is kept; so do checkpoints of upstream, which have no
            manifest, links, and folders with files that no save wrote.
    """

    def __init__(self, keep: int):
        self._keep = keep
        self._thread: threading.Thread | None = None

    def after_save(self, values: dict) -> None:
        """For `step_callbacks.on_checkpoint_saved`."""
        self.clean(Path(values["save_dir"]))

    def clean(self, save_dir: Path) -> list[str]:
        """Move old checkpoints away and begin to delete them; returns their names."""
        whole, others = [], []
        for folder in sorted(save_dir.glob("iter_*"), key=_iteration, reverse=True):
            is_ours = _iteration(folder) >= 0 and not folder.is_symlink()
            if not is_ours or not checkpoint_integrity.has_manifest(str(folder)):
                continue
            problem = checkpoint_integrity.find_problem(str(folder))
            (others if problem else whole).append(folder)
        if len(whole) < self._keep:
            return []
        oldest = _iteration(whole[self._keep - 1])
        named = self._named_by_tracker(save_dir)
        doomed = [
            folder
            for folder in whole + others
            if _iteration(folder) < oldest and folder.name != named and not _holds_more(folder)
        ]
        for folder in doomed:
            os.replace(folder, save_dir / (TRASH + folder.name))
        self._empty_trash(save_dir)
        return [folder.name for folder in doomed]

    def wait(self) -> None:
        """Until what was moved away is deleted."""
        if self._thread is not None:
            self._thread.join()

    def _named_by_tracker(self, save_dir: Path) -> str | None:
        try:
            text = (save_dir / checkpoint_integrity.TRACKER).read_text().strip()
        except OSError:
            return None
        return f"iter_{int(text):07d}" if text.isdigit() else None

    def _empty_trash(self, save_dir: Path) -> None:
        self.wait()
        trash = list(save_dir.glob(TRASH + "iter_*"))  # also what a killed run left
        if not trash:
            return
        self._thread = threading.Thread(target=_delete, args=(trash,))
        self._thread.start()


def _holds_more(folder: Path) -> bool:
    """Whether a checkpoint folder has files that no save wrote; then it is not ours to delete."""
    try:
        text = (folder / checkpoint_integrity.MANIFEST).read_text(encoding="utf-8")
        listed = json.loads(text).get("files")
        if listed is None:  # a save that was not finished lists nothing
            return False
        own = {*listed, checkpoint_integrity.MANIFEST, checkpoint_integrity.MANIFEST + ".tmp"}
        return bool(set(files_in(folder, ())) - own)
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _iteration(folder: Path) -> int:
    number = folder.name.removeprefix("iter_")
    return int(number) if number.isdigit() else -1


def _delete(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
