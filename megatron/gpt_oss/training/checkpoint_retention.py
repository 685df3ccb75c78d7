# Copyright (c) 2026, the megatron-core gptoss authors.
"""--keep-checkpoints: keep the newest checkpoints of a run and delete older ones.

After a new checkpoint is complete, the directory of an old one is renamed and then deleted in a
thread. A kill in between therefore leaves no partly deleted checkpoint.
"""

import json
import os
import shutil
import threading
from pathlib import Path

from megatron.core.dist_checkpointing.checkpoint_names import MANIFEST, TRACKER, iteration_name
from megatron.gpt_oss.outputs import files_in
from megatron.training import checkpoint_integrity
from megatron.training.step_callbacks import CheckpointSaved

TRASH = ".deleted-"


class CheckpointKeeper:
    """Deletes checkpoints that are older than the `keep` newest complete ones. For rank 0.

    Never deletes checkpoints without a manifest (upstream's), links, the checkpoint that the
    tracker file names, and directories with files that no save wrote. Incomplete checkpoints are
    deleted if they are older than the oldest one that is kept.

    Args:
        keep: number of complete checkpoints to keep, 1 or more.
    """

    def __init__(self, keep: int):
        self._keep = keep
        self._thread: threading.Thread | None = None

    def after_save(self, event: CheckpointSaved) -> None:
        """Callback for `step_callbacks.CheckpointSaved`."""
        self.clean(Path(event.save_dir))

    def clean(self, save_dir: Path) -> list[str]:
        """Rename old checkpoints and start to delete them; returns their names."""
        complete, incomplete = [], []
        for directory in sorted(save_dir.glob("iter_*"), key=_iteration, reverse=True):
            is_ours = _iteration(directory) >= 0 and not directory.is_symlink()
            if not is_ours or not checkpoint_integrity.has_manifest(str(directory)):
                continue
            problem = checkpoint_integrity.find_problem(str(directory))
            (incomplete if problem else complete).append(directory)
        if len(complete) < self._keep:
            return []
        oldest = _iteration(complete[self._keep - 1])
        named = self._named_by_tracker(save_dir)
        doomed = [
            directory
            for directory in complete + incomplete
            if _iteration(directory) < oldest
            and directory.name != named
            and not _holds_more(directory)
        ]
        for directory in doomed:
            os.replace(directory, save_dir / (TRASH + directory.name))
        self._empty_trash(save_dir)
        return [directory.name for directory in doomed]

    def wait(self) -> None:
        """Wait until the renamed checkpoints are deleted."""
        if self._thread is not None:
            self._thread.join()

    def _named_by_tracker(self, save_dir: Path) -> str | None:
        try:
            text = (save_dir / TRACKER).read_text().strip()
        except OSError:
            return None
        return iteration_name(int(text)) if text.isdigit() else None

    def _empty_trash(self, save_dir: Path) -> None:
        self.wait()
        trash = list(save_dir.glob(TRASH + "iter_*"))  # also those of a killed run
        if not trash:
            return
        self._thread = threading.Thread(target=_delete, args=(trash,))
        self._thread.start()


def _holds_more(directory: Path) -> bool:
    """Whether a checkpoint directory has files that no save wrote."""
    try:
        text = (directory / MANIFEST).read_text(encoding="utf-8")
        listed = json.loads(text).get("files")
        if listed is None:  # an incomplete checkpoint
            return False
        own = {*listed, MANIFEST, MANIFEST + ".tmp"}
        return bool(set(files_in(directory, ())) - own)
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _iteration(directory: Path) -> int:
    number = directory.name.removeprefix("iter_")
    return int(number) if number.isdigit() else -1


def _delete(directories: list[Path]) -> None:
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)
