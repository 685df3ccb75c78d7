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
# helpers differ, and those are built for the running Python.
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
_NAME = "megatron_core-{}-cp312-cp312-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl"
_DOWNLOAD = _NAME.format(VERSION)

# The releases that the series is tried on: the newest of each minor version, and all of our own.
RELEASES = {
    "0.15.3": "1229221f2b8b37cfefbf3119ff920388f02fefe28aec97f69cfaf8b929459606",
    "0.16.1": "3fb26cb407aa3c4b609c08664022c08146f1648b3d6f2ef2bbe9d3b1294ace61",
    "0.17.1": "6dd0826489ee70a791e38612b25e914c4a18b0b074f2282353f235ee96273cf2",
    "0.18.2": "c2717b84079bf0bad1151525533a251870d1a86201f8c0702e0b5a6d6b5594f1",
    "0.19.0": "ed4f503a4a6944599857c4f702f3a33039656fe119309119fc5bb8cba8a38240",
    VERSION: WHEELS[_DOWNLOAD],
}


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
    return locate_release(root, VERSION)


def locate_release(root: Path, version: str) -> Path:
    """The wheel of one of ``RELEASES``: the copy in ``.upstream/``, else downloaded.

    Raises:
        QueueError: another version, or the download fails.
    """
    if version not in RELEASES:
        raise QueueError(
            f"{version} is not one of the supported releases: {', '.join(RELEASES)}. Give the path "
            "of a tree of it instead."
        )
    cached = root / ".upstream" / _NAME.format(version)
    if not (cached.is_file() and _sha256(cached) == RELEASES[version]):
        _download(cached, version)
    return cached


def _download(cached: Path, version: str) -> None:
    """Fetch through pip, so that the user's own index, proxy and certificates apply."""
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent) as tmp:
        # -I: inside pip's isolated build environment only pip itself is hidden, not installed.
        command = [sys.executable, "-I", "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--python-version=3.12", "--implementation=cp"]
        command += ["--abi=cp312", "--platform=manylinux_2_28_x86_64", "--dest", tmp]
        command += [f"megatron-core=={version}"]
        result = subprocess.run(command, capture_output=True, text=True)
        wheel = Path(tmp) / cached.name
        if result.returncode or not wheel.is_file():
            raise QueueError(
                f"Could not download {cached.name} with pip (exit {result.returncode}):\n"
                f"{result.stderr.strip()}\n"
                f"On a machine without a network, put that file into {cached.parent}, or set "
                f"MEGATRON_CORE_WHEEL=/path/to/it for {VERSION}."
            )
        found = _sha256(wheel)
        if found != RELEASES[version]:
            raise QueueError(
                f"The index served {cached.name} with SHA-256 {found}; expected "
                f"{RELEASES[version]}. Not used. Is a mirror out of date or altered?"
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
