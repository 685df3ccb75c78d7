# Copyright (c) 2026, the megatron-core gptoss authors.

"""Index files are those of Megatron's builder; damage is reported."""

import io
import struct

import numpy
import pytest

from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.gpt_oss.data.indexed_dataset import check_dataset, read_lengths, write_index
from megatron.gpt_oss.errors import UsageError

LENGTHS = [3, 1, 700, 2]


@pytest.fixture
def prefix(tmp_path):
    """A dataset by Megatron's builder."""
    prefix = str(tmp_path / "data")
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=numpy.int32)
    for length in LENGTHS:
        builder.add_document(numpy.arange(length), [length])
    builder.finalize(prefix + ".idx")
    return prefix


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_same_bytes_as_megatron(tmp_path, dtype):
    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=getattr(numpy, dtype))
    for length in LENGTHS:
        builder.add_document(numpy.arange(length), [length])
    builder.finalize(str(tmp_path / "a.idx"))
    stream = io.BytesIO()
    write_index(stream, numpy.array(LENGTHS), dtype)
    assert stream.getvalue() == (tmp_path / "a.idx").read_bytes()


def test_sound(prefix):
    header = check_dataset(prefix)
    assert (header.dtype, header.sequences, header.documents) == ("int32", 4, 5)
    assert read_lengths(prefix).tolist() == LENGTHS


def _cut(content):
    return content[:-9]


def _at(offset, form, value):
    def change(content):
        packed = struct.pack(form, value)
        return content[:offset] + packed + content[offset + len(packed) :]

    return change


@pytest.mark.parametrize(
    "change, words",
    [
        (_cut, "data.idx has 113 bytes; with 4 sequences it must have 122"),
        (lambda content: b"", "data.idx is empty: not a Megatron index"),
        (
            lambda content: b"<html>" + content,
            "data.idx begins with .*html.*: not a Megatron index",
        ),
        (lambda content: content[:20], "data.idx ends after 20 bytes, within its header"),
        (lambda content: content + b"xx", "data.idx has 124 bytes"),
        (_at(9, "<Q", 2), "version 2 and type 4"),
        (_at(17, "<B", 77), "version 1 and type 77"),
        (_at(34 + 12, "<i", -5), "damaged: its last sequence has -5 tokens"),
        (_at(114, "<q", 3), "end at sequence 3 of 4"),
        (_at(34 + 12, "<i", 3), "data.bin has 2,824 bytes, .* 2,828"),
    ],
)
def test_damaged(prefix, change, words):
    path = f"{prefix}.idx"
    content = open(path, "rb").read()
    open(path, "wb").write(change(content))
    with pytest.raises(UsageError, match=words) as error:
        check_dataset(prefix)
    assert "gptoss tokenize ... --overwrite" in str(error.value) and "\n" not in str(error.value)


def test_data_cut_short(prefix):
    content = open(f"{prefix}.bin", "rb").read()
    open(f"{prefix}.bin", "wb").write(content[:-4])
    with pytest.raises(UsageError, match="data.bin has 2,820 bytes, .*data.idx expects"):
        check_dataset(prefix)
