# Copyright (c) 2026, the megatron-core gptoss authors.

"""Exchange of weights with Hugging Face gpt-oss checkpoints.

`mapping` knows which tensor is which, `hf_reader` and `torch_dist_reader` read slices of the two
formats, `load` fills a live Megatron model, `to_megatron` and `export` write a folder of the other
format, `verify` compares the two.
"""
