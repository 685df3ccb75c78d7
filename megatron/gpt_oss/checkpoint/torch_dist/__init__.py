# Copyright (c) 2026, the megatron-core gptoss authors.

"""Megatron's torch_dist checkpoints, read and laid out without a process group."""
