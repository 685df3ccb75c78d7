# Copyright (c) 2026, the megatron-core gptoss authors.

"""What the benchmarks share."""
