# Copyright (c) 2026, the megatron-core gptoss authors.
"""The pinned upstream wheel: found, checked and read."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .errors import QueueError
from .tree import Tree

VERSION = "0.19.2"

# SHA-256 of every Linux wheel of this version. Their Python files are the same; only the compiled
# helpers differ, and those are built anew for the running Python.
WHEELS = {
    "megatron_core-0.19.2-cp312-cp312-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl": (
        "8e3e486f13f559450415b9b9dc0ff3331a0bb83dd154553f7f350a75ff9c42b5"
    ),
    "megatron_core-0.19.2-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl": (
        "3be561cb9c4789e062a43147d3e8632b0750e1f9bbf7aa9f5d8d518b1205951b"
    ),
    "megatron_core-0.19.2-cp313-cp313-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl": (
        "10c70ab5273457f3c8232e35bc18633aa20abc6f6ac2d190914acd6323537826"
    ),
    "megatron_core-0.19.2-cp311-cp311-manylinux_2_24_aarch64.manylinux_2_28_aarch64.whl": (
        "dd5f0eae3a141889901a0e58b54e520511a8c1faee2f7c12468b83271bc68ce1"
    ),
    "megatron_core-0.19.2-cp312-cp312-manylinux_2_24_aarch64.manylinux_2_28_aarch64.whl": (
        "e1717c0cdb7669d2112c3f3d80a2e748d2721b4798044d750cab5a3b2dffe38f"
    ),
    "megatron_core-0.19.2-cp313-cp313-manylinux_2_24_aarch64.manylinux_2_28_aarch64.whl": (
        "346872950e729433c9477c59b5456b859fb7e457a1c0bb39c0c771c302a1d1ea"
    ),
}
_DOWNLOAD = next(iter(WHEELS))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def locate_wheel(root: Path) -> Path:
    """The pinned wheel: ``MEGATRON_CORE_WHEEL``, else the copy in ``.upstream/``, else downloaded.

    Raises:
        QueueError: the file is missing or is not the pinned wheel, or the download fails.
    """
    given = os.environ.get("MEGATRON_CORE_WHEEL")
    if given:
        path = Path(given).expanduser()
        if not path.is_file():
            raise QueueError(
                f"MEGATRON_CORE_WHEEL={given} is not a file. Point it at a megatron-core {VERSION} "
                f"wheel, for example {_DOWNLOAD}."
            )
        found = _sha256(path)
        if found not in WHEELS.values():
            raise QueueError(
                f"MEGATRON_CORE_WHEEL={given} has SHA-256 {found}, which is no megatron-core "
                f"{VERSION} wheel for Linux. Expected {_DOWNLOAD} (SHA-256 {WHEELS[_DOWNLOAD]}) or "
                f"one of the others in {Path(__file__).name}."
            )
        return path
    cached = root / ".upstream" / _DOWNLOAD
    if not (cached.is_file() and _sha256(cached) == WHEELS[_DOWNLOAD]):
        _download(cached)
    return cached


def _download(cached: Path) -> None:
    """Fetch through pip, so that the user's own index, proxy and certificates apply."""
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent) as tmp:
        # -I: inside pip's isolated build environment only pip itself is hidden, not installed.
        command = [sys.executable, "-I", "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--python-version=3.12", "--implementation=cp"]
        command += ["--abi=cp312", "--platform=manylinux_2_28_x86_64", "--dest", tmp]
        command += [f"megatron-core=={VERSION}"]
        result = subprocess.run(command, capture_output=True, text=True)
        wheel = Path(tmp) / _DOWNLOAD
        if result.returncode or not wheel.is_file():
            raise QueueError(
                f"Could not download {_DOWNLOAD} with pip (exit {result.returncode}):\n"
                f"{result.stderr.strip()}\n"
                "On a machine without a network, copy that file here and set "
                "MEGATRON_CORE_WHEEL=/path/to/it."
            )
        found = _sha256(wheel)
        if found != WHEELS[_DOWNLOAD]:
            raise QueueError(
                f"The index served {_DOWNLOAD} with SHA-256 {found}; expected "
                f"{WHEELS[_DOWNLOAD]}. Not used. Is a mirror out of date or altered?"
            )
        os.replace(wheel, cached)


def read_wheel(wheel: Path) -> Tree:
    """Upstream's source files, without compiled ones."""
    with zipfile.ZipFile(wheel) as archive:
        return {
            name: archive.read(name)
            for name in archive.namelist()
            if name.startswith("megatron/") and not name.endswith(("/", ".so"))
        }
