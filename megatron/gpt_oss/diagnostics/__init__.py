# Copyright (c) 2026, the megatron-core gptoss authors.

"""Commands and models for looking at a machine or a model outside of a training run."""
