# Copyright (c) 2026, the megatron-core gptoss authors.
"""Pre-training: one step, the datasets, the log, and the run that ties them to Megatron's loop."""
