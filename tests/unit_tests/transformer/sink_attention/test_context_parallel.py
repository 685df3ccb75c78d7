# Copyright (c) 2026, the megatron-core gptoss authors.

"""sink_attention over context parallel ranks against one rank, and against the definition.

Eight gloo ranks: groups of 2, 4 and 8 of them, each group with its share of the cases. In float64
everything agrees to rounding, whatever is exchanged.
"""

import dataclasses
import os
import re
import time
from datetime import timedelta

import pytest
import torch

from megatron.core.transformer.sink_attention import sink_attention
from megatron.core.transformer.sink_attention.context_parallel import (
    count_traffic,
    from_zigzag,
    halo_bytes,
    local_tokens,
)
from megatron.core.transformer.sink_attention.context_parallel.choose import halo_window
from tests.unit_tests.distributed import RankFailure, RankPool
from tests.unit_tests.transformer.sink_attention.reference import Example, gradients

NAMES = ("out", "dq", "dk", "dv", "dsink")
LIMIT = 1e-10
FLAT = ("all_gather", "p2p", "a2a", "auto")
# Levels [a2a, p2p] by the group's size.
LEVELS = {4: [(2, 2)], 8: [(2, 4), (4, 2)]}

# 96 tokens: chunks of 24, 12 and 6 at cp 2, 4 and 8. Sinks from -8 to 8, mixed by head.
EXAMPLES = {
    "B2": Example(tokens=96, batch=2, dim=8),
    "B2-W9-chunk-shorter": Example(tokens=96, batch=2, dim=8, window=9),
    "W40-several-ranks": Example(tokens=96, dim=8, window=40, scale=0.7),
    "B2-W7-halo-is-chunk": Example(tokens=96, batch=2, dim=8, window=7),
    "W1": Example(tokens=96, dim=8, window=1),
    "W96-no-window": Example(tokens=96, dim=8, window=96),
    "packed": Example(cu=(0, 1, 2, 40, 41, 41, 77, 95, 96), dim=8),
    "packed-one-document": Example(cu=(0, 96), dim=8, fused_qkv=True),
    "packed-on-the-cuts": Example(cu=(0, 24, 48, 72, 96), dim=8),
    "packed-W9-begins-in-halo": Example(cu=(0, 3, 20, 21, 46, 69, 94, 96), dim=8, window=9),
    "packed-W30-fused-qkv": Example(cu=(0, 1, 50, 96), dim=8, window=30, fused_qkv=True),
    "packed-short": Example(cu=(0, 5, 6, 11, 17, 20, 26, *range(32, 97, 4)), dim=8),
    "one-group": Example(tokens=96, batch=2, dim=8, groups=1, sinks=(3.0, 9.0)),
    "packed-H24_3-parts-of-groups": Example(cu=(0, 30, 96), heads=24, groups=3, dim=4),
    "H6_3-not-shareable": Example(tokens=96, heads=6, groups=3, dim=4, scale=2.0),
}


@pytest.fixture(scope="module")
def ranks():
    with RankPool(8) as pool:
        yield pool


def make_groups(cp, size=None):
    """Of this rank: its group of cp ranks, that group's index, and [a2a, p2p] for each LEVELS."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mine, levels = None, [[None, None] for _ in LEVELS.get(cp, [])]

    def make(members):
        group = torch.distributed.new_group(members)
        return group if rank in members else None

    for first in range(0, world, cp):
        mine = make(list(range(first, first + cp))) or mine
        for pair, (inner, outer) in zip(levels, LEVELS.get(cp, [])):
            for p in range(outer):
                start = first + p * inner
                pair[0] = make(list(range(start, start + inner))) or pair[0]
            for a in range(inner):
                pair[1] = make(list(range(first + a, first + cp, inner))) or pair[1]
    return mine, rank // cp, levels


def run_one(example, group, scheme, with_sink=True, **changes):
    """Local out, dq, dk, dv, and dsink summed over the group as Megatron does."""
    q, k, v, sink, dout = example.tensors(torch.float64)
    flat = group if isinstance(group, torch.distributed.ProcessGroup) else None
    q, k, v = (local_tokens(x, group).detach().requires_grad_() for x in (q, k, v))
    if example.fused_qkv:  # as the split of a projection leaves them
        kv = torch.stack([k, v], dim=-2).detach()
        k, v = (x.requires_grad_() for x in kv.unbind(-2))
    sink = sink if with_sink else None
    options = {**example.options(), **changes}
    out = sink_attention(q, k, v, sink, cp_group=group, cp_comm_type=scheme, **options)
    assert out.is_contiguous() and out.shape == q.shape
    inputs = (q, k, v) if sink is None else (q, k, v, sink)
    values = [out.detach(), *gradients(out, inputs, local_tokens(dout, group))]
    if sink is not None:
        for level in [group] if flat else group:
            torch.distributed.all_reduce(values[4], group=level)
    return values


def expected_of(example, with_sink=True, by_definition=False):
    """The same on one rank, of the whole sequence."""
    q, k, v, sink, dout = example.tensors(torch.float64)
    sink = sink if with_sink else None
    if by_definition:
        return example.reference(q, k, v, sink, dout)
    out = sink_attention(q, k, v, sink, **example.options())
    return [out.detach(), *gradients(out, (q, k, v, sink)[: 3 + with_sink], dout)]


def worst_errors(values, expected, group):
    """Per tensor: largest difference of this rank's part over the norm of the whole."""
    errors = {}
    for name, value, target in zip(NAMES, values, expected):
        part = target if name == "dsink" else local_tokens(target, group)
        errors[name] = ((value - part).norm() / target.norm()).item()
    return errors


def sweep(cp, names):
    """All schemes of the group's share of the examples; the errors beyond the limit."""
    group, index, levels = make_groups(cp)
    share = list(names)[index :: torch.distributed.get_world_size() // cp]
    failures, cases = [], 0
    for number, name in enumerate(share):
        example = EXAMPLES[name]
        with_sink = name != "packed-on-the-cuts"
        expected = expected_of(example, with_sink, by_definition=number % 2 == 0)
        runs = [(scheme, group) for scheme in FLAT] + [("a2a+p2p", pair) for pair in levels]
        for scheme, where in runs:
            ranks = where[0].size() if scheme == "a2a+p2p" else cp
            if scheme.startswith("a2a") and example.heads % ranks and example.window is None:
                continue
            values = run_one(example, where, scheme, with_sink)
            cases += 1
            for label, error in worst_errors(values, expected, where).items():
                if not error < LIMIT:
                    failures.append(f"cp {cp} {scheme} {name} {label}: {error:.1e}")
    return failures, cases


@pytest.mark.parametrize("cp", [2, 4, 8])
def test_equals_one_rank(ranks, cp):
    """out, dq, dk, dv, dsink of every scheme, windowed and packed or not."""
    results = ranks.run(sweep, cp, list(EXAMPLES), world_size=8)
    failures = [line for found, _ in results for line in found]
    assert not failures, "\n".join(failures)
    assert sum(cases for _, cases in results) >= cp * 4 * (len(EXAMPLES) - 1)
