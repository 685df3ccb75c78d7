# Copyright (c) 2026, the megatron-core gptoss authors.

"""Benchmarks of the conversion from and to Hugging Face, and parity with transformers."""
