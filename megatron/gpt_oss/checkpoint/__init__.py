# Copyright (c) 2026, the megatron-core gptoss authors.

"""Exchange of weights with Hugging Face gpt-oss checkpoints.

mapping.py           which Hugging Face tensor is which Megatron tensor
hf/                  config.json and weight files, read and written by slices
torch_dist/          Megatron's checkpoint format, read without a process group
load_hf.py           fills a live Megatron model (--load-hf)
import_hf.py         `gptoss convert to-megatron`
export_hf.py         `gptoss convert to-hf`
verify.py            compares the two formats
resumable_output.py  an output directory that appears when it is complete
"""
