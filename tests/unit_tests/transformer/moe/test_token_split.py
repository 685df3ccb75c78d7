# Copyright (c) 2026, the megatron-core gptoss authors.

"""Options that an MoE layer rejects with tensor parallelism without sequence parallelism."""

from types import SimpleNamespace

import pytest

from megatron.core.transformer.moe.token_split import check_tokens_can_be_split


def config(**changes):
    fields = dict(
        tensor_model_parallel_size=2,
        moe_shared_expert_intermediate_size=None,
        moe_latent_size=None,
        cuda_graph_impl="none",
        cuda_graph_modules=["moe_router"],
    )
    return SimpleNamespace(**{**fields, **changes})


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(moe_shared_expert_intermediate_size=64), "moe_shared_expert_intermediate_size = 64"),
        (dict(moe_latent_size=32), "moe_latent_size = 32"),
        (dict(cuda_graph_impl="local"), "moe_router"),
    ],
    ids=["shared-experts", "latent", "cuda-graph"],
)
def test_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check_tokens_can_be_split(config(**changes))


def test_accepted():
    check_tokens_can_be_split(config())
    check_tokens_can_be_split(config(cuda_graph_impl="local", cuda_graph_modules=[]))
