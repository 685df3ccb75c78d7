# Copyright (c) 2026, the megatron-core gptoss authors.

"""Block hashes detect and name a shard whose bytes changed."""

import json
import random

import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint.api import CheckpointException

from megatron.core.dist_checkpointing import block_hashes
from megatron.core.dist_checkpointing.block_hashes import (
    BlockHashes,
    CheckedFileSystemReader,
    DamagedShard,
    HashingFile,
    HashingFileSystem,
)

BLOCK = 512


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(block_hashes, "BLOCK", BLOCK)
    monkeypatch.setattr(block_hashes, "_MIN_SIZE_FOR_THREAD", 200)  # both ways of hashing


@pytest.fixture
def state():
    torch.manual_seed(0)
    return {"a": torch.randn(300), "b": torch.randn(7, 50).bfloat16(), "c": torch.arange(3)}


@pytest.fixture
def folder(tmp_path, state):
    writer = dcp.FileSystemWriter(tmp_path, thread_count=1)
    writer.fs = HashingFileSystem()
    dcp.save(state, storage_writer=writer, no_dist=True)
    return tmp_path


def load(folder, state):
    found = {key: torch.zeros_like(value) for key, value in state.items()}
    dcp.load(found, storage_reader=CheckedFileSystemReader(folder), no_dist=True)
    return found


def flip(path, place, bit=0):
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK, 5 * BLOCK + 7])
def test_hashes_of_blocks(tmp_path, size):
    """Hashes do not depend on sizes and types of the written buffers."""
    rng = random.Random(size)
    data = rng.randbytes(size)
    path = tmp_path / "shard.distcp"
    with HashingFile(str(path)) as file:
        at = 0
        while at < size:
            part = data[at : at + rng.choice((1, 3, BLOCK // 2, BLOCK, 3 * BLOCK))]
            kind = rng.choice((bytes, bytearray, memoryview))
            assert file.write(kind(part)) == len(part)
            at += len(part)
            assert file.tell() == at
    assert path.read_bytes() == data
    found = json.loads((tmp_path / "shard.distcp.xxh3").read_text())
    blocks = [data[start : start + BLOCK] for start in range(0, size, BLOCK)]
    assert found["xxh3_128"] == [xxhash.xxh3_128_hexdigest(block) for block in blocks]


def test_whole(folder, state):
    found = load(folder, state)
    assert all(torch.equal(found[key], value) for key, value in state.items())


def test_any_changed_bit(folder, state):
    path = folder / "__0_0.distcp"
    size, rng = path.stat().st_size, random.Random(1)
    for place in [0, size - 1, *(rng.randrange(size) for _ in range(60))]:
        flip(path, place, bit := rng.randrange(8))
        with pytest.raises(CheckpointException) as failure:
            load(folder, state)
        (error,) = (error for error, _ in failure.value.failures.values())
        assert isinstance(error, DamagedShard) and "__0_0.distcp" in str(error)
        flip(path, place, bit)
    load(folder, state)


def test_only_what_is_read(folder, state):
    """A read checks only the blocks of its part, each once."""
    path = folder / "__0_0.distcp"
    flip(path, 3 * BLOCK)
    hashes = BlockHashes(folder)
    hashes.check(path.name, 0, 3 * BLOCK)
    hashes.check(path.name, 4 * BLOCK, 10)
    for offset, length in ((3 * BLOCK - 1, 2), (3 * BLOCK, 1), (4 * BLOCK - 1, 1)):
        with pytest.raises(DamagedShard, match=f"bytes {3 * BLOCK} to {4 * BLOCK - 1} of __0_0"):
            hashes.check(path.name, offset, length)


@pytest.mark.parametrize("change", [-1, -BLOCK, 1], ids=["cut", "cut-a-block", "longer"])
def test_other_length(folder, state, change):
    path = folder / "__0_0.distcp"
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"x")
    with pytest.raises(CheckpointException):
        load(folder, state)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 1}', '{"version": 1, "block": 0, "xxh3_128": []}']
)
def test_damaged_hashes(folder, state, text):
    (folder / "__0_0.distcp.xxh3").write_text(text)
    with pytest.raises(CheckpointException) as failure:
        load(folder, state)
    (error,) = (error for error, _ in failure.value.failures.values())
    assert isinstance(error, DamagedShard) and "__0_0.distcp.xxh3 is damaged" in str(error)


def test_newer_version(folder):
    (folder / "__0_0.distcp.xxh3").write_text('{"version": 2, "block": 512, "xxh3_128": []}')
    with pytest.raises(DamagedShard, match="the unsupported version 2"):
        BlockHashes(folder).check("__0_0.distcp", 0, 1)


def test_without_hashes(folder, state):
    """Shards of upstream have no hashes and are not checked."""
    (folder / "__0_0.distcp.xxh3").unlink()
    load(folder, state)


def test_without_xxhash(tmp_path, state, monkeypatch):
    monkeypatch.setattr(block_hashes, "xxhash", None)
    writer = dcp.FileSystemWriter(tmp_path, thread_count=1)
    writer.fs = HashingFileSystem()
    dcp.save(state, storage_writer=writer, no_dist=True)
    assert not list(tmp_path.glob("*.xxh3"))
    load(tmp_path, state)
