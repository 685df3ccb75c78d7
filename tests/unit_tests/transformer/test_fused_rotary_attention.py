# Copyright (c) 2026, the megatron-core gptoss authors.

"""FusedRotarySelfAttention against SelfAttention: what core attention gets, and every gradient."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from megatron.core.fusions import fused_qkv_rotary
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import fused_rotary_attention
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.fused_rotary_attention import FusedRotarySelfAttention
from megatron.core.transformer.sink_attention.packed import PackedSequence
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.harness.compare import relative_error

HEAD_DIM = 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class OneRank:
    """The attributes of a one-rank process group that attention and RoPE use."""

    def size(self):
        return 1

    def rank(self):
        return 0


class Projection(torch.nn.Linear):
    """linear_qkv and linear_proj without tensor parallelism."""

    def __init__(self, input_size, output_size, **kwargs):
        super().__init__(input_size, output_size)

    def forward(self, x):
        return super().forward(x), None


class Core(torch.nn.Module):
    """Core attention that keeps what it gets; its output depends on each of them."""

    def __init__(self, **kwargs):
        super().__init__()

    def forward(self, query, key, value, *args, **kwargs):
        self.seen = query, key, value
        repeats = query.size(-2) // key.size(-2)
        key, value = (x.repeat_interleave(repeats, dim=-2) for x in (key, value))
        return (query * key.sin() + value).flatten(-2)


def build(module, dtype=torch.float64, **overrides):
    """6 query heads in 2 groups; YaRN's factor of gpt-oss."""
    torch.manual_seed(2)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=20,
        num_attention_heads=6,
        num_query_groups=2,
        kv_channels=HEAD_DIM,
        use_cpu_initialization=True,
        **overrides,
    )
    config.yarn_rotary_scaling_factor = 32.0
    config.yarn_mscale, config.yarn_mscale_all_dim = 1.0, 0.0
    return module(
        config,
        SelfAttentionSubmodules(linear_qkv=Projection, core_attention=Core, linear_proj=Projection),
        layer_number=1,
        pg_collection=SimpleNamespace(tp=OneRank(), cp=OneRank()),
    ).to(DEVICE, dtype)


def angles(tokens, dtype=torch.float32, interleaved=False):
    inv_freq = 150000.0 ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM)
    freqs = torch.outer(torch.arange(tokens, dtype=torch.float32), inv_freq).to(dtype)
    freqs = freqs.repeat_interleave(2, -1) if interleaved else torch.cat((freqs, freqs), -1)
    return freqs[:, None, None, :].to(DEVICE)


def run(attention, hidden, **kwargs):
    """What core attention got, the output, the gradients of input and weights."""
    hidden = hidden.detach().requires_grad_()
    out, _ = attention(hidden, attention_mask=None, **kwargs)
    leaves = [hidden, *attention.linear_qkv.parameters()]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
    grads = torch.autograd.grad((out * weight).sum(), leaves)
    names = ("query", "key", "value", "out", "dhidden", "dweight", "dbias")
    return dict(zip(names, (*attention.core_attention.seen, out, *grads), strict=True))


@pytest.fixture
def calls(monkeypatch):
    """The reference in place of the kernels, which need CUDA; the number of its calls."""
    seen = []

    def compiled(num_queries, mscale):
        seen.append(num_queries)
        return partial(
            fused_qkv_rotary.split_and_rotate_ref, num_queries=num_queries, mscale=mscale
        )

    monkeypatch.setattr(fused_qkv_rotary, "compiled", compiled)
    monkeypatch.setattr(fused_rotary_attention, "fused_implementation", lambda tensor: "compiled")
    return seen


def check_same(found, expected, atol=1e-12):
    for name, value in found.items():
        torch.testing.assert_close(
            value, expected[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("batch", [1, 2])
def test_dense(calls, batch):
    """[s, b, h], odd length."""
    hidden = torch.randn(13, batch, 20, dtype=torch.float64, device=DEVICE)
    kwargs = dict(rotary_pos_emb=angles(13, torch.float64))
    found = run(build(FusedRotarySelfAttention), hidden, **kwargs)
    assert calls == [3]  # 3 query heads a group
    check_same(found, run(build(SelfAttention), hidden, **kwargs))
    assert found["value"].is_contiguous()


def test_packed(calls):
    """Documents of 5, 1 and 7 tokens; angles looked up by token."""
    cu_seqlens = torch.tensor([0, 5, 6, 13], dtype=torch.int32, device=DEVICE)
    packed = PackedSequence.of(cu_seqlens, 13)
    hidden = torch.randn(13, 1, 20, dtype=torch.float64, device=DEVICE)
    kwargs = dict(packed_seq_params=packed)
    kwargs["rotary_pos_emb"] = packed.rotary_rows(angles(13, torch.float64))
    found = run(build(FusedRotarySelfAttention), hidden, **kwargs)
    assert calls == [3] and found["query"].shape == (13, 6, HEAD_DIM)
    check_same(found, run(build(SelfAttention), hidden, **kwargs))


def upstreams_packed():
    cu_seqlens = torch.tensor([0, 5, 13], dtype=torch.int32, device=DEVICE)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=13,
        max_seqlen_kv=13,
    )


@pytest.mark.parametrize(
    "options, kwargs",
    [
        ({}, dict(rotary_pos_emb=angles(13), packed_seq_params=upstreams_packed())),
        ({}, dict(rotary_pos_emb=angles(13)[..., 2:6])),
        ({}, dict(rotary_pos_emb=(angles(13), angles(13) + 1))),
        ({}, dict(rotary_pos_emb=None)),
        (dict(rotary_interleaved=True), dict(rotary_pos_emb=angles(13, interleaved=True))),
        (dict(no_rope_freq=[1]), dict(rotary_pos_emb=angles(13))),
        (dict(qk_l2_norm=True), dict(rotary_pos_emb=angles(13))),
    ],
    ids="packed part two-tables no-angles interleaved no-rope norm".split(),
)
def test_where_it_does_not_apply(calls, options, kwargs):
    """SelfAttention's own path, bit for bit."""
    hidden = torch.randn(13, 1, 20, dtype=torch.float64, device=DEVICE)
    found = run(build(FusedRotarySelfAttention, **options), hidden, **kwargs)
    assert calls == []
    expected = run(build(SelfAttention, **options), hidden, **kwargs)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_fewer_groups_than_ranks(calls):
    """A rank that has a part of a group's queries splits them as upstream does."""
    attention = build(FusedRotarySelfAttention)
    hidden = torch.zeros(3, 1, 20, device=DEVICE)
    assert attention._rotates_while_splitting(hidden, rotary_pos_emb=angles(3))
    attention.world_size = 4
    assert not attention._rotates_while_splitting(hidden, rotary_pos_emb=angles(3))


@pytest.mark.skipif(DEVICE == "cuda", reason="about the CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cpu_is_unchanged(dtype):
    """On the CPU the layer is SelfAttention, bit for bit."""
    hidden = torch.randn(13, 2, 20, dtype=dtype)
    found = run(build(FusedRotarySelfAttention, dtype), hidden, rotary_pos_emb=angles(13))
    expected = run(build(SelfAttention, dtype), hidden, rotary_pos_emb=angles(13))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_state_is_upstreams():
    """A checkpoint of one is one of the other."""
    ours, theirs = build(FusedRotarySelfAttention), build(SelfAttention)
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_failure_leaves_nothing_behind(calls):
    """A forward that raised does not affect the rotation of the next one."""
    attention = build(FusedRotarySelfAttention)
    hidden = torch.randn(13, 1, 20, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match="no angles of 13 tokens"):
        attention(hidden, attention_mask=None, rotary_pos_emb=angles(12))
    kwargs = dict(rotary_pos_emb=None)
    check_same(run(attention, hidden, **kwargs), run(build(SelfAttention), hidden, **kwargs), 0)


def check_bf16(packed):
    """No further from float64 than SelfAttention is, forward and every gradient."""
    tokens, batch = (197, 1) if packed else (197, 2)
    kwargs = dict(rotary_pos_emb=angles(tokens))
    if packed:
        cu_seqlens = torch.tensor([0, 97, 98, tokens], dtype=torch.int32, device=DEVICE)
        kwargs["packed_seq_params"] = PackedSequence.of(cu_seqlens, tokens)
        kwargs["rotary_pos_emb"] = kwargs["packed_seq_params"].rotary_rows(angles(tokens))
    torch.manual_seed(0)
    hidden = torch.randn(tokens, batch, 20).to(DEVICE).bfloat16()
    layers = [build(module, torch.bfloat16) for module in (FusedRotarySelfAttention, SelfAttention)]
    exact = build(SelfAttention)
    exact.load_state_dict({k: v.double() for k, v in layers[0].state_dict().items()})
    expected = run(exact, hidden.double(), **kwargs)
    found, theirs = (run(layer, hidden, **kwargs) for layer in layers)
    for name, reference in expected.items():
        errors = [relative_error(values[name], reference) for values in (found, theirs)]
        # 80 biases are few: their errors' norm is known to about a tenth.
        assert errors[0] <= 1.3 * errors[1] + 1e-6, (name, errors)
    assert found["value"].is_contiguous() and not theirs["value"].is_contiguous()


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_bf16(calls, packed):
    """The reference in place of the kernels."""
    check_bf16(packed)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("implementation", ["triton", "compiled"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_cuda(implementation, packed):
    """The kernels."""
    with fused_qkv_rotary.QKV_ROTARY.prefer(implementation):
        selected = fused_qkv_rotary.fused_implementation(torch.zeros(1, device=DEVICE))
        assert selected == implementation
        check_bf16(packed)
