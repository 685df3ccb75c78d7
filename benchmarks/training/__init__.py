# Copyright (c) 2026, the megatron-core gptoss authors.

"""Benchmarks of training steps, runs and checkpoints."""
