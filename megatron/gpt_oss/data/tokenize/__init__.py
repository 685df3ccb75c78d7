# Copyright (c) 2026, the megatron-core gptoss authors.

"""`gptoss tokenize`: documents of text files to a Megatron indexed dataset."""
