# Copyright (c) 2026, the megatron-core gptoss authors.

"""Two ranks for a test module. One that needs more has a `ranks` of its own."""

import pytest

from tests.unit_tests.distributed import RankPool


@pytest.fixture(scope='module')
def ranks():
    with RankPool(2) as pool:
        yield pool
