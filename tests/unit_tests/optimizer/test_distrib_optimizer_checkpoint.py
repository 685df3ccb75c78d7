# Copyright (c) 2026, the megatron-core gptoss authors.

"""The distributed optimizer saves its state correctly for every bucket layout."""

from dataclasses import replace

import pytest
import torch

from tests.harness import odd_model
from tests.harness.checkpoint_entries import read_checkpoint
from tests.harness.odd_model import Case
from tests.harness.ranks import RankFailure

pytestmark = pytest.mark.ranks(4)


def equal(case, found, steps=odd_model.STEPS):
    """The (parameter, tensor) pairs that differ from Adam in one process."""
    return [
        (name, key)
        for name, tensors in odd_model.reference(case, steps).items()
        for key, expected in tensors.items()
        if not torch.allclose(found[name][key].view(-1), expected.view(-1), rtol=1e-5, atol=1e-6)
    ]


TINY = 1  # every parameter a bucket: at four ranks the shards of some hold padding alone
MIXED = ("b", "c", "f", "expert_b")  # a buffer of fp32 parameters next to that of the bf16 ones
RESHARDABLE = {
    # id: (ranks, case that saves, ranks, changes of the case that loads)
    "one-bucket": (2, Case(), 4, dict(bucket_size=200)),
    "buckets": (2, Case(bucket_size=200), 2, {}),
    "buckets-to-one": (2, Case(bucket_size=200), 1, dict(bucket_size=None)),
    "buckets-to-others": (4, Case(bucket_size=400), 2, dict(bucket_size=150)),
    "tiny-buckets": (4, Case(bucket_size=TINY), 2, dict(bucket_size=None)),
    "to-tiny-buckets": (2, Case(), 4, dict(bucket_size=TINY)),
    "rank-without-parameters": (4, Case(sizes=(("a", (2,)),)), 2, {}),
    "bf16": (2, Case(bucket_size=200, fp32=()), 4, {}),
    "two-dtypes": (2, Case(bucket_size=100, fp32=MIXED), 4, dict(bucket_size=TINY)),
    "frozen": (2, Case(bucket_size=200, frozen=("c", "e")), 4, dict(bucket_size=300)),
    "gathered-on-one-rank": (2, Case(bucket_size=200, mem_efficient=True), 4, {}),
    "experts": (4, Case(bucket_size=150, expert_parallel=2), 4, dict(expert_parallel=4)),
    # Without expert parallelism one optimizer has all parameters, with it two.
    "experts-apart": (2, Case(bucket_size=150, expert_parallel=1), 4, dict(expert_parallel=2)),
    "experts-together": (4, Case(bucket_size=150, expert_parallel=2), 2, dict(expert_parallel=1)),
    "experts-bf16": (
        4,
        Case(bucket_size=TINY, expert_parallel=2, fp32=MIXED),
        2,
        dict(bucket_size=None),
    ),
}


@pytest.mark.parametrize("name", RESHARDABLE)
def test_fully_reshardable(ranks, tmp_path, name):
    """Parameters after the first bucket were read from where its padding had been left out."""
    save_size, case, load_size, changes = RESHARDABLE[name]
    ranks.run(odd_model.save, case, str(tmp_path), world_size=save_size)
    case = replace(case, **changes)
    shards = ranks.run(odd_model.load, case, str(tmp_path), world_size=load_size)
    assert equal(case, odd_model.assemble(case, shards)) == []


BUCKETS = {
    "buckets": (2, Case(bucket_size=200), 4),
    # Bucket of 'b', 3 elements in 128: ranks 1 to 3 of 4 have no part of it.
    "padding-alone": (4, Case(bucket_size=TINY), 4),
    "padding-alone-saved": (4, Case(bucket_size=TINY), 1),
    "padding-alone-loaded": (1, Case(bucket_size=TINY), 4),
    # 64 elements apart in one bucket of 128: rank 1 has padding between two parameters alone.
    "padding-between": (4, Case(sizes=(("a", (2,)), ("b", (3,)))), 2),
    "padding-between-loaded": (2, Case(sizes=(("a", (2,)), ("b", (3,)))), 4),
    "rank-without-parameters": (4, Case(sizes=(("a", (2,)),)), 2),
    "rank-without-parameters-loaded": (1, Case(sizes=(("a", (2,)),)), 4),
    "two-dtypes": (4, Case(bucket_size=TINY, fp32=MIXED), 2),
    "frozen": (4, Case(bucket_size=TINY, frozen=("c", "e")), 2),
    "experts": (4, Case(bucket_size=TINY, expert_parallel=2), 4),
}


@pytest.mark.parametrize("name", BUCKETS)
def test_dp_reshardable(ranks, tmp_path, name):
    """Ranks without a parameter in a bucket could neither save nor load; padding was memory."""
    save_size, case, load_size = BUCKETS[name]
    case = replace(case, sharding_type="dp_reshardable")
    ranks.run(odd_model.save, case, str(tmp_path), world_size=save_size)
    for key, value in read_checkpoint(str(tmp_path)).items():
        if isinstance(value, torch.Tensor):
            assert value.isfinite().all(), key  # uninitialised memory is NaN while it is saved
    shards = ranks.run(odd_model.load, case, str(tmp_path), 1, world_size=load_size)
    assert equal(case, odd_model.assemble(case, shards), odd_model.STEPS + 1) == []


def test_flipped_bit_is_refused(ranks, tmp_path):
    """Megatron's own writer records hashes of the shards, and its own reader checks them."""
    ranks.run(odd_model.save, Case(), str(tmp_path), world_size=1)
    shard = max(tmp_path.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(RankFailure, match=f"{shard.name} differ from what was saved"):
        ranks.run(odd_model.load, Case(), str(tmp_path), world_size=1)
