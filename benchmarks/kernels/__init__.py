# Copyright (c) 2026, the megatron-core gptoss authors.

"""Benchmarks of single operations, and of attention over ranks."""
