# Copyright (c) 2026, the megatron-core gptoss authors.

import signal

import numpy
import pytest
import torch

from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.datasets.utils import Split


class Tokenizer:
    """The tokenizer attributes that the dataset uses."""

    vocab_size, eod, pad, unique_identifiers = 100, 99, 98, {"class": "test"}


def dataset_of(folder, documents, num_samples):
    """The validation split that holds the given documents of three."""
    prefix = str(folder / "data")
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=numpy.uint16)
    for length in (30, 40, 0):
        builder.add_document(torch.arange(length), [length])
    builder.finalize(prefix + ".idx")
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=8,
        blend=([prefix], None),
        split="98,1,1",
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    low_level = GPTDataset.build_low_level_dataset(prefix, config)
    indices = numpy.array(documents, dtype=numpy.int32)
    return GPTDataset(low_level, prefix, indices, num_samples, Split.valid, config)


@pytest.fixture
def ends():
    """Fail instead of an endless loop."""

    def stop(*_):
        raise TimeoutError("still counting epochs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("ends")
@pytest.mark.parametrize("documents", [[], [2]], ids=["no-document", "empty-document"])
def test_split_without_tokens_is_refused(tmp_path, documents):
    """Regression: it added epochs of zero tokens in an endless loop."""
    with pytest.raises(ValueError, match=r"valid.*98,1,1.*data.* no token"):
        dataset_of(tmp_path, documents, 4)


def test_split_with_tokens_repeats_them(tmp_path):
    dataset = dataset_of(tmp_path, [1], 9)
    assert len(dataset) >= 9
    assert dataset[0]["tokens"].max() < 40


@pytest.mark.usefixtures("ends")
def test_a_split_that_nobody_draws_from_needs_no_document(tmp_path):
    """--eval-iters 0 with three documents, of which a split of 98,1,1 has none to hold out."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.gpt_oss.training.datasets import skip_unused_splits

    config = dataset_of(tmp_path, [0], 1).config
    with pytest.raises(ValueError, match="0 samples are wanted"):
        BlendedMegatronDatasetBuilder(GPTDataset, [4, 0, 0], lambda: True, config).build()
    skip_unused_splits(config, [4, 0, 0])
    built = BlendedMegatronDatasetBuilder(GPTDataset, [4, 0, 0], lambda: True, config).build()
    assert len(built[0]) >= 4 and built[1:] == [None, None]
