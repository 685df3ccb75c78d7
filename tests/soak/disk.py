# Copyright (c) 2026, the megatron-core gptoss authors.

"""A disk that can be full: a small tmpfs, or a limit on file size if mounting is not allowed."""

import contextlib
import os
import resource
import subprocess
from pathlib import Path
from typing import Iterable

SIZE = 96 * 2**20
_BALLAST = "ballast"


class Disk:
    """The file system of a run.

    Attributes:
        kind: 'tmpfs', or 'limit' where this process must not mount one: the ranks' files may then
            not grow beyond a kilobyte (RLIMIT_FSIZE), which is EFBIG instead of ENOSPC.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
        done = subprocess.run(mount, capture_output=True) if os.geteuid() == 0 else None
        self.kind = "tmpfs" if done is not None and done.returncode == 0 else "limit"

    def fill(self, ranks: Iterable[int]) -> None:
        """Prevent further writes by these processes."""
        if self.kind == "limit":
            for pid in ranks:
                with contextlib.suppress(ProcessLookupError):
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
            return
        with open(self.folder / _BALLAST, "wb", buffering=0) as file:
            for piece in (2**20, 4096):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(piece))

    def empty(self) -> None:
        """Free the space; the limit ended with its processes."""
        (self.folder / _BALLAST).unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount the file system."""
        if self.kind == "tmpfs":
            subprocess.run(["umount", str(self.folder)], check=True)
