# Copyright (c) 2026, the megatron-core gptoss authors.

"""FP8 (e4m3) operands for GEMMs on Hopper, without TransformerEngine.

`quantize` quantises by powers of two, `gemm` multiplies what it returns.
"""
