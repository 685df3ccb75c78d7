# Copyright (c) 2026, the megatron-core gptoss authors.

"""Hugging Face gpt-oss directories: config.json, weight files, MXFP4, and the files next to them."""
