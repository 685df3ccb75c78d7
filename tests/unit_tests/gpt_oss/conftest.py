# Copyright (c) 2026, the megatron-core gptoss authors.

"""Fixtures: a process group of one rank, a GPTModel, and inputs of training runs."""

import pytest
import torch

from tests.harness import runs
from tests.harness.models import build_model


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """Megatron's parallel state over one gloo rank, taken down with the module."""
    from megatron.core import parallel_state

    store = tmp_path_factory.mktemp("rendezvous") / "store"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture
def make_model(one_rank):
    """make_model(preset, **megatron_arguments) -> GPTModel in fp32."""
    return build_model


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Inputs of `runs.start`."""
    return runs.write_inputs(tmp_path_factory.mktemp("inputs"))
