# Copyright (c) 2026, the megatron-core gptoss authors.

"""Conversations in OpenAI's harmony format, with a loss weight for each token."""
