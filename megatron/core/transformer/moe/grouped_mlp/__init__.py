# Copyright (c) 2026, the megatron-core gptoss authors.

"""All experts of a layer as grouped GEMMs, without TransformerEngine.

module.py           GroupedExperts, which takes the place of TEGroupedMLP
linear.py           grouped GEMM with bias: gemm_triton.py, or PyTorch's grouped_mm
activation.py       clamped SwiGLU with bias and router weight; activation_triton.py: its kernels
experts_fp8.py      all six GEMMs in FP8 (core/float8); activation_fp8.py, activation_fp8_triton.py
expert_segments.py  which routed tokens belong to which expert, on the device
permute.py          permute and unpermute with sums in fp32; permute_triton.py: its kernels
dispatch.py         which implementation takes a tensor
checkpoint.py       one tensor a layer in memory, one matrix an expert in a checkpoint
"""
