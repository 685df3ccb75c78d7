# Copyright (c) 2026, the megatron-core gptoss authors.

"""Benchmarks. Run them from the root of the repository: `python -m benchmarks.GROUP.NAME`."""
