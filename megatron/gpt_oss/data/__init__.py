# Copyright (c) 2026, the megatron-core gptoss authors.

"""From text to Megatron's indexed dataset."""
