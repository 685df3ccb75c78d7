# Copyright (c) 2026, the megatron-core gptoss authors.

"""Distinguish tests that were skipped for a missing package from those that need a GPU."""

import re
from typing import Iterable, List

# Not installed on a CPU machine, on purpose: they need CUDA.
ALLOWED = ("transformer_engine", "apex", "flash_attn", "flash_attn_3", "flash_attn_interface")

_REASONS = (
    re.compile(r"could not import '([\w.]+)'"),
    re.compile(r"No module named '([\w.]+)'"),
    re.compile(r"Skipped: ([\w.]+) is not installed"),
    re.compile(r"this (Triton)'s interpreter does not know"),
)


def complaints(skips: Iterable[str]) -> List[str]:
    """One line for each skip that names a package which should be there.

    Args:
        skips: what pytest says of a skipped test, file and reason.
    """
    found = []
    for text in skips:
        for pattern in _REASONS:
            match = pattern.search(text)
            if match and match[1].split(".")[0] not in ALLOWED:
                found.append(f"skipped for want of {match[1]}: {text}")
                break
    return found
