# Copyright (c) 2026, the megatron-core gptoss authors.

"""The local attention with sinks against Hugging Face's eager attention of gpt-oss.

[sq, b, np, hn] = tokens, micro batch, query heads, head size; 8 query heads share 2 key heads.
"""

from types import SimpleNamespace

import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

HEADS, GROUPS, HEAD_DIM, BATCH = 8, 2, 16, 2
SINKS = torch.tensor([8.0, -8.0, 0.0, 2.0, -3.0, 8.0, -8.0, 1.0])


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def attention(dtype, window, **changes):
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=HEAD_DIM,
        attention_dropout=0.0,
        softmax_type="learnable",
        window_size=None if window is None else (window - 1, 0),
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        **changes,
    )
    module = DotProductAttention(config, 1, AttnMaskType.causal, "self")
    with torch.no_grad():
        module.softmax_offset.copy_(SINKS)
    return module


def qkv(seq_length, dtype):
    generator = torch.Generator().manual_seed(seq_length)
    shapes = [(seq_length, BATCH, heads, HEAD_DIM) for heads in (HEADS, GROUPS, GROUPS, HEADS)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def hidden_keys(seq_length, window, cut):
    """True = hidden, [b, 1, sq, sk]; the second row of the batch is two documents."""
    query, key = torch.arange(seq_length)[:, None], torch.arange(seq_length)
    hidden = key > query
    if window is not None:
        hidden = hidden | (key <= query - window)
    hidden = hidden.expand(BATCH, 1, -1, -1).clone()
    if cut is not None:
        hidden[1, 0] |= (query >= cut) & (key < cut)
    return hidden


def hf_attention(query, key, value, sinks, hidden):
    mask = torch.zeros(hidden.shape, dtype=query.dtype).masked_fill(hidden, float("-inf"))
    module = SimpleNamespace(sinks=sinks, num_key_value_groups=HEADS // GROUPS, training=False)
    bnsd = [t.permute(1, 2, 0, 3) for t in (query, key, value)]
    out, _ = eager_attention_forward(module, *bnsd, mask, scaling=HEAD_DIM**-0.5)
    return out.transpose(0, 1).flatten(2)  # [b, sq, np, hn] -> [sq, b, np * hn]


def run(function, tensors, dout):
    """The output and the gradients of q, k, v and the sinks."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    out.backward(dout.flatten(2))
    return [out, *(leaf.grad for leaf in leaves)]


def relative_error(value, reference):
    value, reference = value.detach().double(), reference.detach().double()
    return ((value - reference).norm() / reference.norm()).item()


# Across the window, odd, a single token; documents as the caller's mask.
CASES = {
    "T37-full": (37, None, None),
    "T37-window8": (37, 8, None),
    "T8-window8": (8, 8, None),
    "T1-window8": (1, 8, None),
    "T37-window8-documents": (37, 8, 13),
    "T37-full-documents": (37, None, 13),
}


@pytest.mark.parametrize("seq_length, window, cut", CASES.values(), ids=CASES)
@pytest.mark.parametrize("fusion", [False, True], ids=["unfused", "fusion-flag"])
def test_forward_backward(seq_length, window, cut, fusion):
    """Float64: output, dq, dk, dv and dsinks are Hugging Face's."""
    query, key, value, dout = qkv(seq_length, torch.float64)
    hidden = hidden_keys(seq_length, window, cut)
    module = attention(torch.float64, window, masked_softmax_fusion=fusion)
    mask = None if cut is None else hidden_keys(seq_length, None, cut)

    def megatron(query, key, value):
        return module(query, key, value, mask)

    results = run(megatron, (query, key, value), dout) + [module.softmax_offset.grad]

    def reference(query, key, value, sinks):
        return hf_attention(query, key, value, sinks, hidden)

    references = run(reference, (query, key, value, SINKS.double()), dout)
    for name, result, ref in zip(("out", "dq", "dk", "dv", "dsinks"), results, references):
        assert relative_error(result, ref) < 1e-12, name


def test_bfloat16():
    """Softmax in float32: no further from float64 than Hugging Face's, which stays in bfloat16."""
    query, key, value, dout = qkv(96, torch.bfloat16)  # a shape that the fused kernels take
    hidden = hidden_keys(96, None, None)
    module = attention(torch.bfloat16, None, masked_softmax_fusion=True)
    sinks = SINKS.bfloat16()
    results = run(lambda *qkv: module(*qkv, None), (query, key, value), dout)
    results.append(module.softmax_offset.grad)

    def hf(query, key, value, sinks):
        return hf_attention(query, key, value, sinks, hidden)

    hf_results = run(hf, (query, key, value, sinks), dout)
    exact = run(hf, [t.double() for t in (query, key, value, sinks)], dout.double())
    for name, result, hf_result, ref in zip(
        ("out", "dq", "dk", "dv", "dsinks"), results, hf_results, exact
    ):
        assert result.dtype == torch.bfloat16, name
        error, hf_error = relative_error(result, ref), relative_error(hf_result, ref)
        assert error < 1.1 * hf_error, f"{name}: {error:.2e}, Hugging Face {hf_error:.2e}"
