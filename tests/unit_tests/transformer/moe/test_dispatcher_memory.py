# Copyright (c) 2026, the megatron-core gptoss authors.

"""A token dispatcher keeps no reference to the autograd graph of a layer after its backward.

A layer that is recomputed in the backward has its input as a leaf of that graph. Whoever holds the
graph afterwards holds the input and its gradient, of every layer.
"""

import types

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
)

EXPERTS = 4


def alltoall(tokens, routing_map, probs):
    """Rows and their probabilities, by as much of the dispatcher as one rank needs."""
    dispatcher = object.__new__(MoEAlltoAllTokenDispatcher)
    dispatcher.config = types.SimpleNamespace(
        moe_router_padding_for_quantization=False,
        moe_router_padding_for_fp8=False,  # its name in 0.15
        moe_permute_fusion=False,
    )
    dispatcher.shared_experts, dispatcher.drop_and_pad = None, False
    dispatcher.num_out_tokens = int(routing_map.sum())
    dispatcher.preprocess = lambda routing_map: routing_map.sum(0)
    dispatcher._maybe_dtoh_and_synchronize = lambda point, counts=None: counts
    rows, row_probs = dispatcher.dispatch_preprocess(tokens, routing_map, probs)
    return dispatcher, rows, row_probs


def allgather(tokens, routing_map, probs):
    dispatcher = object.__new__(MoEAllGatherTokenDispatcher)
    dispatcher.config = types.SimpleNamespace(moe_permute_fusion=False)
    dispatcher.local_expert_indices = list(range(EXPERTS))
    dispatcher.routing_map = routing_map
    rows, _, row_probs = dispatcher.dispatch_postprocess(tokens.view(-1, tokens.shape[-1]), probs)
    return dispatcher, rows, row_probs


@pytest.mark.parametrize("dispatch", [alltoall, allgather])
def test_no_graph_is_held(dispatch):
    torch.manual_seed(0)
    tokens = torch.randn(6, 1, 8, requires_grad=True)
    probs = (tokens.view(6, 8) @ torch.randn(8, EXPERTS)).softmax(-1)
    routing_map = torch.zeros(6, EXPERTS, dtype=torch.bool)
    routing_map.scatter_(1, probs.topk(2).indices, True)
    dispatcher, rows, row_probs = dispatch(tokens, routing_map, probs)
    # Rows go in the order of experts.
    expected = torch.cat([probs[routing_map[:, i], i] for i in range(EXPERTS)])
    assert torch.equal(row_probs.flatten(), expected)
    (rows.sum() + (row_probs * torch.arange(1.0, 13.0)).sum()).backward()
    assert tokens.grad.abs().sum() > 0
    alive = [StorageWeakRef(tensor.untyped_storage()) for tensor in (tokens, tokens.grad)]
    assert not any(storage.expired() for storage in alive)
    del tokens, probs, rows, row_probs, expected
    assert all(storage.expired() for storage in alive)
    assert dispatcher is not None
