# Copyright (c) 2026, the megatron-core gptoss authors.

"""Fixture with tokens for training."""

import pytest


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The prefix of a random indexed dataset."""
    from tests.harness import tiny_pretrain  # needs megatron.training

    return tiny_pretrain.write_random_dataset(str(tmp_path_factory.mktemp("data") / "data"))
