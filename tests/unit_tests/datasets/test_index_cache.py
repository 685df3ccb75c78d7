# Copyright (c) 2026, the megatron-core gptoss authors.

"""The cached sample index of a dataset belongs to the files that it was built from."""

import os
import shutil

import numpy
import pytest
import torch

from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.datasets.utils import Split


class Tokenizer:
    """The tokenizer attributes that the dataset uses."""

    vocab_size, eod, pad, unique_identifiers = 100, 99, 98, {"class": "test"}


def write_data(prefix, lengths, first=0):
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for length in lengths:
        builder.add_document(torch.arange(first, first + length), [length])
    builder.finalize(f"{prefix}.idx")


def samples(prefix, documents, cache=None):
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=8,
        blend=([str(prefix)], None),
        split="100,0,0",
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        path_to_cache=cache,
    )
    low_level = GPTDataset.build_low_level_dataset(str(prefix), config)
    indices = numpy.arange(documents, dtype=numpy.int32)
    dataset = GPTDataset(low_level, str(prefix), indices, 12, Split.train, config)
    return [dataset[index]["tokens"].tolist() for index in range(12)]


@pytest.mark.parametrize("own_cache", [False, True], ids=["beside-the-data", "data-cache-path"])
def test_data_of_the_same_name(tmp_path, own_cache):
    """Other documents under the same path get their own samples."""
    cache = str(tmp_path / "cache") if own_cache else None
    for folder, lengths in (("a", [40, 30, 30]), ("b", [20, 10, 90])):
        (tmp_path / folder).mkdir()
        write_data(tmp_path / folder / "data", lengths, 7)
    expected = samples(tmp_path / "b" / "data", 3)
    samples(tmp_path / "a" / "data", 3, cache)
    for end in ("bin", "idx"):
        shutil.copyfile(tmp_path / "b" / f"data.{end}", tmp_path / "a" / f"data.{end}")
    assert samples(tmp_path / "a" / "data", 3, cache) == expected


def test_same_files_are_not_sampled_again(tmp_path):
    write_data(tmp_path / "data", [40, 30, 30])
    samples(tmp_path / "data", 3)
    kept = {path: os.stat(path).st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    assert samples(tmp_path / "data", 3) == samples(tmp_path / "data", 3)
    assert {path: os.stat(path).st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == kept
