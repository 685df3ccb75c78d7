# Copyright (c) 2026, the megatron-core gptoss authors.

"""The end-of-document token is read from the data; gpt-oss' eos_token would be wrong."""

import numpy
import pytest
import torch

from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.datasets.utils import Split
from megatron.gpt_oss.data.eod import DatasetTokenizer, document_end_of
from megatron.gpt_oss.errors import UsageError

RETURN, END_OF_TEXT = 90, 80


class Published:
    """The special tokens as gpt-oss' tokenizer_config.json has them."""

    vocab_size, unique_identifiers = 100, {"class": "test"}
    eos = eod = RETURN
    pad = END_OF_TEXT


def write(prefix, *documents):
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def sample(prefix, tokenizer):
    """A dataset as one sample."""
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=7,
        blend=([prefix], None),
        split="1,0,0",
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=True,
    )
    low_level = GPTDataset.build_low_level_dataset(prefix, config)
    return GPTDataset(
        low_level, prefix, numpy.arange(2, dtype=numpy.int32), 1, Split.train, config
    )[0]


def test_ends_are_learned_and_nothing_after_them(tmp_path):
    """Each end is a label that counts; the first token of the next document is not."""
    prefix = write(tmp_path / "a", [1, 2, 3, END_OF_TEXT], [4, 5, 6, END_OF_TEXT])
    found = sample(prefix, DatasetTokenizer(Published(), document_end_of([prefix])))
    tokens, labels, counts = found["tokens"], found["labels"], found["loss_mask"]
    assert tokens[3] == END_OF_TEXT and labels[2] == labels[6] == END_OF_TEXT
    assert counts.tolist() == [1, 1, 1, 0, 1, 1, 1]
    # What Megatron makes of it by the tokenizer's own account.
    wrong = sample(prefix, Published())
    assert wrong["tokens"][3] == 0 and wrong["loss_mask"].tolist() == [1, 1, 0, 1, 1, 1, 0]


def test_end_of_several_datasets(tmp_path):
    a = write(tmp_path / "a", [1, 7], [2, 3, 7])
    b = write(tmp_path / "b", [7])
    c = write(tmp_path / "c", [1, 9])
    assert document_end_of([a, b]) == 7 and document_end_of([]) is None
    with pytest.raises(UsageError, match="a ends its documents with token 7, .*c with token 9"):
        document_end_of([a, c])
    other = write(tmp_path / "other", [1, 2], [3, 4])
    assert document_end_of([other, a]) is None
    assert DatasetTokenizer(Published(), None).eod == RETURN
    assert DatasetTokenizer(Published(), 7).vocab_size == 100
