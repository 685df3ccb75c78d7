# Copyright (c) 2026, the megatron-core gptoss authors.
from tests.unit_tests.tools.invented_upstream import fork, root, wheel  # noqa: F401
