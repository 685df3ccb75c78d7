# Copyright (c) 2026, the megatron-core gptoss authors.

"""sink_attention over context parallel ranks against one rank, and against the definition.

Eight gloo ranks: groups of 2, 4 and 8 of them, each group with its share of the cases. In float64
everything agrees to rounding, whatever is exchanged.
"""

import contextlib
import dataclasses
import os
import re
import time
from datetime import timedelta

import pytest
import torch

from megatron.core.transformer.sink_attention import registry, sink_attention
from megatron.core.transformer.sink_attention.context_parallel import (
    count_traffic,
    from_zigzag,
    halo_bytes,
    local_tokens,
)
from tests.harness.attention_reference import Example, gradients, window_size
from tests.harness.compare import relative_error
from tests.harness.ranks import RankFailure, RankPool

pytestmark = pytest.mark.ranks(8)

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


def make_groups(cp, size=None):
    """This rank's group of cp ranks, the index of the group, and [a2a, p2p] for each LEVELS."""
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
    """The results of one rank for the complete sequence."""
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
        errors[name] = relative_error(value, part, target)
    return errors


@contextlib.contextmanager
def unwritten_memory():
    """nan in empty tensors, and in gradients that another kernel may leave unwritten.

    Those are of keys whose document has no query.
    """
    math = registry.BACKENDS["math"]

    def backward(q, k, v, out, lse, dout, params):
        grads = type(math).backward(math, q, k, v, out, lse, dout, params)
        if params.packed:
            queries = params.cu_seqlens_q.diff()
            for start, end, n in zip(params.cu_seqlens_k, params.cu_seqlens_k[1:], queries):
                for grad in grads[1:] if n == 0 else ():
                    grad[start:end] = torch.nan
        return grads

    math.backward = backward
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        del math.backward


def sweep(cp, names):
    """All schemes of the group's share of the examples; the errors beyond the limit."""
    with unwritten_memory():
        return run_share(cp, names)


def run_share(cp, names):
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


def twice(cp):
    """Whether two runs differ anywhere, in float32, with and without checkpointing."""
    group, _, levels = make_groups(cp)
    found = []
    for name in ("B2", "B2-W9-chunk-shorter", "packed"):
        example = EXAMPLES[name]
        for scheme, where in [(s, group) for s in FLAT] + [("a2a+p2p", pair) for pair in levels]:
            first, again = (run_in(torch.float32, example, where, scheme) for _ in range(2))
            recomputed = run_in(torch.float32, example, where, scheme, checkpointed=True)
            for label, *values in zip(NAMES, first, again, recomputed):
                if not all(torch.equal(values[0], x) for x in values[1:]):
                    found.append(f"{scheme} {name} {label}")
    return found


def run_in(dtype, example, group, scheme, checkpointed=False):
    """Local out, dq, dk, dv and this rank's own dsink."""
    q, k, v, sink, dout = example.tensors(dtype)
    q, k, v = (local_tokens(x, group).detach().requires_grad_() for x in (q, k, v))
    options = {**example.options(), "cp_group": group, "cp_comm_type": scheme}

    def attention(*tensors):
        return sink_attention(*tensors, **options)

    if checkpointed:
        out = torch.utils.checkpoint.checkpoint(attention, q, k, v, sink, use_reentrant=False)
    else:
        out = attention(q, k, v, sink)
    return [out.detach(), *gradients(out, (q, k, v, sink), local_tokens(dout, group))]


def test_same_bits(ranks):
    assert ranks.run(twice, 4, world_size=4) == [[]] * 4


def saved_elements(scheme):
    """Elements that a forward saves for the backward, and the expected number."""
    group = torch.distributed.group.WORLD
    q, k, v, sink, _ = EXAMPLES["B2"].tensors(torch.float32)
    q, k, v = (local_tokens(x, group).detach().requires_grad_() for x in (q, k, v))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        sink_attention(q, k, v, sink, cp_group=group, cp_comm_type=scheme)
    wanted = 2 * q.numel() + k.numel() + v.numel() + sink.numel() + q.numel() // q.shape[-1]
    return sum(x.numel() for x in saved), wanted


@pytest.mark.parametrize("scheme", ["all_gather", "p2p", "a2a"])
def test_keeps_its_own_part_only(ranks, scheme):
    """q, k, v, out, lse of a rank's share and the sink: nothing that was gathered."""
    for saved, wanted in ranks.run(saved_elements, scheme, world_size=4):
        if scheme == "a2a":  # key heads copied for 4 ranks, the sinks of a quarter of the heads
            wanted += 2 * 96 // 4 * 2 * 8 * 2 - 6
        assert saved == wanted


def rounding(cp, dtype):
    """Relative errors against float64, and those of one rank."""
    group, _, levels = make_groups(cp)
    found = []
    for name in ("B2", "B2-W9-chunk-shorter", "packed"):
        example = EXAMPLES[name]
        q, k, v, sink, dout = example.tensors(dtype)
        exact = example.reference(q, k, v, sink, dout)
        out = sink_attention(q, k, v, sink, **example.options())
        alone = [out.detach(), *gradients(out, (q, k, v, sink), dout)]
        limits = [relative_error(x, y) for x, y in zip(alone[:4], exact)]
        for scheme, where in [(s, group) for s in FLAT] + [("a2a+p2p", pair) for pair in levels]:
            values = run_in(dtype, example, where, scheme)
            parts = [torch.empty(group.size(), *x.shape, dtype=x.dtype) for x in values[:4]]
            for gathered, value in zip(parts, values):
                torch.distributed.all_gather(list(gathered.unbind(0)), value, group=group)
            whole = [from_zigzag(x.flatten(0, 1), group.size()) for x in parts]
            for label, value, target, limit in zip(NAMES, whole, exact, limits):
                found.append((f"{scheme} {name} {label}", relative_error(value, target), limit))
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_rounding(ranks, dtype):
    """Partial results rounded and merged: at most 1.5 times the error of one rank."""
    for found in ranks.run(rounding, 4, dtype, world_size=4):
        wrong = [f"{name}: {error:.2e} {limit:.2e}" for name, error, limit in found
                 if not error < 1.5 * limit]  # fmt: skip
        assert not wrong, "\n".join(wrong)


def traffic(cp, window):
    """Bytes received in the forward and the backward, by kind."""
    group, _, _ = make_groups(cp)
    example = dataclasses.replace(EXAMPLES["B2"], window=window)
    q, k, v, sink, dout = example.tensors(torch.float32)
    q, k, v = (local_tokens(x, group).detach().requires_grad_() for x in (q, k, v))
    with count_traffic() as forward:
        out = sink_attention(q, k, v, sink, window_size=window_size(window), cp_group=group)
    with count_traffic() as backward:
        gradients(out, (q, k, v, sink), local_tokens(dout, group))
    return dict(forward), dict(backward)


@pytest.mark.parametrize("window", [9, 20, None])
def test_bytes(ranks, window):
    """A halo's are the keys in reach that are not the rank's own, counted one by one."""
    cp, tokens, token_bytes = 4, 96, 2 * 2 * 2 * 8 * 4
    length = tokens // (2 * cp)
    for rank, (forward, backward) in enumerate(ranks.run(traffic, cp, window, world_size=cp)):
        if window is None:
            others = (cp - 1) * 2 * length * token_bytes
            assert forward == {"all_gather": others}
            assert backward == {"all_gather": others, "reduce_scatter": others // (cp - 1) * 3}
            continue
        needed = 0
        for chunk in (rank, 2 * cp - 1 - rank):
            reach = range(max(0, chunk * length - window + 1), chunk * length)
            needed += sum(t // length not in (rank, 2 * cp - 1 - rank) for t in reach)
        assert forward == {"all_to_all": needed * token_bytes}
        assert halo_bytes(rank, cp, tokens, window - 1, token_bytes) == needed * token_bytes
        sent = 0  # gradients come back for every key that another rank's halo reached
        for other in set(range(cp)) - {rank}:
            for chunk in (other, 2 * cp - 1 - other):
                reach = range(max(0, chunk * length - window + 1), chunk * length)
                sent += sum(t // length in (rank, 2 * cp - 1 - rank) for t in reach)
        assert backward == {"all_to_all": sent * token_bytes}


def counted_for_the_plan(inner):
    """Bytes received in forward and backward, per scheme, with gpt-oss' heads in bf16."""
    world = torch.distributed.get_world_size()
    group, _, levels = make_groups(world)
    pair = next(pair for pair in levels if pair[0].size() == inner)
    example = Example(tokens=2 * world, heads=64, groups=8, dim=64)
    found = {}
    for scheme, where in [("all_gather", group), ("p2p", group), ("a2a", group), ("a2a+p2p", pair)]:
        with count_traffic() as counted:
            run_in(torch.bfloat16, example, where, scheme)
        found[scheme] = sum(counted.values())
    return found


def test_bytes_of_the_plan(ranks, monkeypatch):
    """The arithmetic behind docs/context_parallel.md against what the code moves, on 8 ranks."""
    from benchmarks.kernels import context_parallel_plan as plan

    monkeypatch.setattr(plan, "NODE", 4)
    _, expected = plan.full_layer(16, 8, 1e9)
    for found in ranks.run(counted_for_the_plan, 4, world_size=8):
        assert found == {scheme: received for scheme, (received, _) in expected.items()}


def refusals(cp):
    """The errors of invalid calls on this rank; no call waits for another rank."""
    group, _, levels = make_groups(cp)

    def attention(tokens=8, heads=8, groups=2, where=group, scheme="auto", keys=None, **options):
        lead = (tokens,) if "cu_seqlens" in options else (tokens, 1)
        key_lead = lead if keys is None else (keys, 1)
        q, kv = torch.zeros(*lead, heads, 4), torch.zeros(*key_lead, groups, 4)
        try:
            sink_attention(q, kv, kv, cp_group=where, cp_comm_type=scheme, **options)
        except ValueError as error:
            return str(error)

    cu = torch.tensor([0, 8], dtype=torch.int32)
    return [
        attention(tokens=7),
        attention(heads=6, scheme="a2a"),
        attention(scheme="a2a+p2p"),
        attention(where=levels[0], scheme="p2p"),
        attention(where=[*levels[0], group]),
        attention(keys=16),
        attention(scheme="ring"),
        attention(cu_seqlens=cu),
        attention(cu_seqlens=cu.new_tensor([0, 32]), max_seqlen=8),
        attention(heads=2, groups=1, scheme="a2a+p2p", where=levels[0]),
    ]


def test_refusals(ranks):
    wanted = [
        r"Sequence length 28 is not a multiple of 2 \* context parallel size = 8\. Pad it to 32",
        r"a2a splits 6 query heads over 4 ranks.*use 'all_gather' or 'p2p'",
        r"needs two, \[a2a, p2p\].*--hierarchical-context-parallel-sizes",
        r"is 'p2p' with two groups",
        r"is 3 groups; wanted one, or two",
        r"key: has 16 tokens with a cp_group; wanted 8",
        r"'ring' is unknown; wanted one of auto, p2p",
        r"cu_seqlens: ends with 8; wanted the number of tokens, 32",
        r"max_seqlen: 8 is less than the longest document, 32",
        None,
    ]
    for said in ranks.run(refusals, 4, world_size=4):
        for text, pattern in zip(said, wanted, strict=True):
            assert text is None if pattern is None else re.search(pattern, text), (text, pattern)


def mismatch(what):
    """The error on this rank, where rank 1 calls with something else."""
    group = torch.distributed.group.WORLD
    other = group.rank() == 1
    tokens = 16 if what == "tokens" and other else 8
    left = 2 if what == "window_size" and other else 3
    dtype = torch.float64 if what == "dtype" and other else torch.float32
    cut = 5 if what == "cu_seqlens" and other else 6
    q = torch.zeros(tokens, 4, 4, dtype=dtype)
    cu = torch.tensor([0, cut, 2 * tokens], dtype=torch.int32)
    try:
        sink_attention(q, q, q, window_size=(left, 0), cu_seqlens=cu, cp_group=group)
    except RuntimeError as error:
        return str(error)


def test_ranks_that_differ(ranks):
    """Every rank says what differs, and each rank's value."""
    wanted = {
        "tokens": r"query: rank 0: \(\[8, 4, 4\].*rank 1: \(\[16, 4, 4\]",
        "window_size": r"window_size: rank 0: \(3, 0\), rank 1: \(2, 0\)\.$",
        "dtype": r"query: .*torch.float32.*rank 1: .*torch.float64",
        "cu_seqlens": r"cu_seqlens: rank 0: \[3\] (\w+), rank 1: \[3\] (?!\1)",
    }
    for what, pattern in wanted.items():
        for text in ranks.run(mismatch, what, world_size=2):
            assert re.search(pattern, text), (what, text)


def late_rank(seconds):
    """How long rank 0 waits, in a group with a timeout, for a rank that does not come."""
    group = torch.distributed.new_group(timeout=timedelta(seconds=seconds))
    q = torch.zeros(8, 1, 4, 4)
    begin = time.monotonic()
    if group.rank() == 1:
        return None  # its groups stay until rank 0 has returned, too
    try:
        sink_attention(q, q, q, cp_group=group)
    except RuntimeError as error:
        return time.monotonic() - begin, str(error)


def dying_rank():
    group = torch.distributed.group.WORLD
    q = torch.zeros(8, 1, 4, 4, requires_grad=True)
    out = sink_attention(q, q, q, cp_group=group)
    if group.rank() == 1:
        os._exit(7)
    out.sum().backward()


def test_a_rank_that_is_lost():
    """Late beyond the group's timeout, or dead in the backward: an error, not a wait."""
    with RankPool(2) as pool:
        (waited, text), _ = pool.run(late_rank, 2.0, world_size=2)
        assert 1.5 < waited < 5 and re.search("imed out|imeout", text), (waited, text)
        begin = time.monotonic()
        with pytest.raises(RankFailure, match="Rank 1 of 2 died with exit code 7"):
            pool.run(dying_rank, world_size=2)
        assert time.monotonic() - begin < 20
