# Copyright (c) 2026, the megatron-core gptoss authors.

"""Names of the files and directories in a --save directory."""

TRACKER = "latest_checkpointed_iteration.txt"
# What the tracker and the directory of a checkpoint without an iteration are named.
RELEASE = "release"
# List of a checkpoint's files, see megatron/training/checkpoint_integrity.py.
MANIFEST = "manifest.json"


def iteration_name(iteration: int) -> str:
    """Name of the directory of an iteration's checkpoint."""
    return f"iter_{iteration:07d}"
