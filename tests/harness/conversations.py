# Copyright (c) 2026, the megatron-core gptoss authors.

"""Datasets of conversations, as `gptoss tokenize --chat` writes them, from tokens and weights."""

from pathlib import Path

import numpy

from megatron.gpt_oss.data.indexed_dataset import LOSS, write_index


def write_conversations(prefix: Path, conversations: list[tuple]) -> Path:
    """Write (tokens, loss weights) of each conversation; returns the prefix."""
    lengths = numpy.array([len(ids) for ids, _ in conversations], dtype=numpy.int32)
    for path, column, dtype in ((f"{prefix}", 0, "int32"), (f"{prefix}.{LOSS}", 1, "float32")):
        values = [numpy.asarray(one[column], dtype=dtype) for one in conversations]
        numpy.concatenate(values).tofile(f"{path}.bin")
        with open(f"{path}.idx", "wb") as stream:
            write_index(stream, lengths, dtype)
    return prefix


def random_conversations(count: int, longest: int, seed: int, vocab_size: int = 256) -> list[tuple]:
    """Conversations of 2 to `longest` tokens, a third of which have loss, some half of it."""
    rng = numpy.random.default_rng(seed)
    found = []
    for _ in range(count):
        size = int(rng.integers(2, longest + 1))
        weights = rng.choice([0.0, 0.0, 0.0, 1.0, 0.5], size)
        weights[-1] = 1.0
        found.append((rng.integers(0, vocab_size, size), weights))
    return found
