# Copyright (c) 2026, the megatron-core gptoss authors.
"""Which Megatron-Core a tree is, and which of the known releases is nearest to it."""

import re

from .errors import QueueError
from .tree import Tree
from .upstream import RELEASES

PACKAGE_INFO = "megatron/core/package_info.py"
TRAINING = "megatron/training/"
# Earlier packages hold megatron/core alone, so there is nothing to write the hunks against.
TRAINING_SINCE = (0, 17)


def minor(version: str) -> tuple[int, int]:
    """(0, 17) of "0.17", "0.17.1" or "0.17.0rc1".

    Raises:
        QueueError: the text does not begin with two numbers.
    """
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        raise QueueError(f"'{version}' is not a version of Megatron-Core, such as 0.17 or 0.17.1.")
    return int(match[1]), int(match[2])


def numbers(version: str) -> tuple[int, ...]:
    """(0, 17, 1) of "0.17.1" or "0.17.1rc0", (0, 17) of "0.17"."""
    first, second = minor(version)
    match = re.match(r"\d+\.\d+\.(\d+)", version)
    return (first, second, int(match[1])) if match else (first, second)


def in_ranges(version: str, text: str) -> bool:
    """Whether the version is in "0.15", "0.15-0.17", "0.15-0.19.0" or several after commas.

    A bound of two numbers includes all versions that start with them.
    """
    found = numbers(version)
    for part in text.split(","):
        low, _, high = part.strip().partition("-")
        low, high = numbers(low), numbers(high or low)
        if low <= found[: len(low)] and found[: len(high)] <= high:
            return True
    return False


def detect(tree: Tree) -> str | None:
    """The version in megatron/core/package_info.py, or None."""
    text = tree.get(PACKAGE_INFO, b"").decode("utf-8", "replace")
    parts = [re.search(rf"^{name}\s*=\s*(\d+)", text, re.M) for name in ("MAJOR", "MINOR", "PATCH")]
    if None in parts:
        return None
    pre = re.search(r"^PRE_RELEASE\s*=\s*['\"](\w*)['\"]", text, re.M)
    return ".".join(match[1] for match in parts) + (pre[1] if pre else "")


def nearest(version: str | None) -> str:
    """The known release to treat a tree as: of the same minor version, else the closest one.

    A tree without a version counts as the newest release.
    """
    if version is None:
        return list(RELEASES)[-1]
    wanted = minor(version)
    if version in RELEASES:
        return version

    def distance(release: str) -> tuple:
        major, middle = minor(release)
        apart = abs((major - wanted[0]) * 1000 + middle - wanted[1])
        return apart, -list(RELEASES).index(release)

    return min(RELEASES, key=distance)


def is_known(version: str | None) -> bool:
    """Whether the minor version is one of those that the series is tried on."""
    return version is not None and minor(version) in {minor(release) for release in RELEASES}
