# Copyright (c) 2026, the megatron-core gptoss authors.
"""The fused RoPE paths against a rotation of complex numbers in float64.

TransformerEngine's kernels are not needed: a PyTorch function with the kernel's own signature and
meaning stands in for each, so what is tested is what Megatron asks of them.
"""

from types import SimpleNamespace

import pytest
import torch

from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer import attention as attention_module
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

MSCALE = 1.3465735902799727  # gpt-oss: 0.1 ln(32) + 1


class OneRank:
    """The attributes of a one-rank process group that attention and RoPE use."""

    def size(self):
        return 1

    def rank(self):
        return 0


def rotate_ref(x, positions, inv_freq, mscale, interleaved=False):
    """Rotate pairs of the last dimension as complex numbers, in float64.

    Args:
        x: [t, ..., hn], any float.
        positions: [t], int.
        inv_freq: [hn / 2].
    Returns:
        [t, ..., hn] float64.
    """
    x = x.double()
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    angle = torch.outer(positions.double(), inv_freq.double())
    angle = angle.view(angle.size(0), *[1] * (x.dim() - 2), angle.size(1))
    turned = torch.complex(first, second) * torch.polar(torch.full_like(angle, mscale), angle)
    if interleaved:
        return torch.stack((turned.real, turned.imag), dim=-1).flatten(-2)
    return torch.cat((turned.real, turned.imag), dim=-1)


def rotate_kernel(x, freqs, interleaved):
    """What a fused kernel computes: rotation by freqs, no mscale."""
    positions = torch.arange(x.size(0))
    inv_freq = (freqs[1] - freqs[0]).flatten()
    inv_freq = inv_freq[::2] if interleaved else inv_freq[: inv_freq.numel() // 2]
    return rotate_ref(x, positions, inv_freq, 1.0, interleaved).to(x.dtype)


def thd_kernel(t, cu_seqlens, freqs, cp_size=1, cp_rank=0, interleaved=False):
    """Stands in for TE's fused_apply_rotary_pos_emb_thd at cp_size 1."""
    assert (cp_size, cp_rank) == (1, 0)
    documents = t.split((cu_seqlens[1:] - cu_seqlens[:-1]).tolist())
    return torch.cat([rotate_kernel(document, freqs, interleaved) for document in documents])


def qkv_kernel(qkv, q_freqs, k_freqs, split, tensor_format="sbhd", interleaved=False):
    """Stands in for TE's apply_fused_qkv_rotary_pos_emb: [s, b, groups, q.. + k + v] to q, k, v."""
    assert tensor_format == "sbhd"
    query, key, value = qkv.split(split, dim=3)
    query = query.reshape(*query.shape[:2], -1, key.size(3))
    rotated = [rotate_kernel(x, f, interleaved) for x, f in ((query, q_freqs), (key, k_freqs))]
    return rotated[0], rotated[1], value


def make_freqs(length, head_dim, interleaved=False):
    inv_freq = 150000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    freqs = torch.outer(torch.arange(length, dtype=torch.float32), inv_freq)
    freqs = freqs.repeat_interleave(2, -1) if interleaved else torch.cat((freqs, freqs), -1)
    return inv_freq, freqs[:, None, None, :]


@pytest.mark.parametrize("mscale", [1.0, MSCALE], ids=["plain", "yarn"])
def test_thd_mscale(monkeypatch, mscale):
    """The fused path of packed sequences ignored mscale: q and k were 1/1.3466 of sbhd's."""
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb_thd", thd_kernel)
    torch.manual_seed(0)
    config = SimpleNamespace(
        apply_rope_fusion=True,
        rotary_interleaved=False,
        multi_latent_attention=False,
        mrope_section=None,
    )
    cu_seqlens = torch.tensor([0, 97, 98, 173, 300], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in (97, 1, 75, 127)])
    inv_freq, freqs = make_freqs(127, 16)
    x = torch.randn(300, 3, 16, requires_grad=True)

    out = rope_utils.apply_rotary_pos_emb(
        x, freqs, config, cu_seqlens=cu_seqlens, mscale=mscale, cp_group=OneRank()
    )
    weight = torch.randn(300, 3, 16)
    (grad,) = torch.autograd.grad((out * weight).sum(), x)

    x_ref = x.detach().double().requires_grad_()
    ref = rotate_ref(x_ref, positions, inv_freq, mscale)
    (grad_ref,) = torch.autograd.grad((ref * weight).sum(), x_ref)
    torch.testing.assert_close(out.double(), ref, rtol=0, atol=2e-5)
    torch.testing.assert_close(grad.double(), grad_ref, rtol=0, atol=2e-5)


def test_thd_mla_interleaving(monkeypatch):
    """Regression: the fused path for packed sequences ignored MLA's interleaved input layout."""
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb_thd", thd_kernel)
    torch.manual_seed(1)
    config = SimpleNamespace(
        apply_rope_fusion=True,
        rotary_interleaved=False,
        multi_latent_attention=True,
        mrope_section=None,
    )
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)
    positions = torch.cat([torch.arange(5), torch.arange(7)])
    inv_freq, freqs = make_freqs(7, 8)
    x = torch.randn(12, 2, 8)
    out = rope_utils.apply_rotary_pos_emb(
        x, freqs, config, cu_seqlens=cu_seqlens, cp_group=OneRank(), mla_rotary_interleaved=True
    )
    halves = torch.cat((x[..., ::2], x[..., 1::2]), dim=-1)
    torch.testing.assert_close(
        out.double(), rotate_ref(halves, positions, inv_freq, 1.0), rtol=0, atol=2e-5
    )


class Projection(torch.nn.Linear):
    """linear_qkv and linear_proj without tensor parallelism."""

    def __init__(self, input_size, output_size, **kwargs):
        super().__init__(input_size, output_size)

    def forward(self, x):
        return super().forward(x), None


class Recorder(torch.nn.Module):
    """Core attention that keeps query and key and returns the query."""

    def __init__(self, **kwargs):
        super().__init__()

    def forward(self, query, key, value, *args, **kwargs):
        self.query, self.key, self.value = query, key, value
        return query.flatten(-2)


def make_attention(monkeypatch, mscale=1.0, interleaved=False, fused=True):
    """Self attention of 4 query heads in 2 groups, with the single-QKV kernel's stand-in."""
    monkeypatch.setattr(attention_module, "HAVE_FUSED_QKV_ROPE", True)
    monkeypatch.setattr(
        attention_module, "apply_fused_qkv_rotary_pos_emb", qkv_kernel, raising=False
    )
    torch.manual_seed(2)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        rotary_interleaved=interleaved,
        fused_single_qkv_rope=fused,
        use_cpu_initialization=True,
    )
    if mscale != 1.0:
        config.yarn_rotary_scaling_factor = 32.0
        config.yarn_mscale, config.yarn_mscale_all_dim = 1.0, 0.0
    return SelfAttention(
        config,
        SelfAttentionSubmodules(
            linear_qkv=Projection, core_attention=Recorder, linear_proj=Projection
        ),
        layer_number=1,
        pg_collection=SimpleNamespace(tp=OneRank(), cp=OneRank()),
    )


def check_attention(attention, mscale, interleaved):
    torch.manual_seed(3)
    hidden = torch.randn(9, 2, 32)
    inv_freq, freqs = make_freqs(9, 8, interleaved)
    attention(hidden, attention_mask=None, rotary_pos_emb=freqs)
    core = attention.core_attention
    qkv = attention.linear_qkv(hidden)[0].view(9, 2, 2, 4, 8)
    query, key, value = qkv[..., :2, :].flatten(2, 3), qkv[..., 2, :], qkv[..., 3, :]
    for name, got, before in (("query", core.query, query), ("key", core.key, key)):
        ref = rotate_ref(before, torch.arange(9), inv_freq, mscale, interleaved)
        torch.testing.assert_close(
            got.double(), ref, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    torch.testing.assert_close(core.value, value, rtol=0, atol=0)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "split"])
@pytest.mark.parametrize("mscale", [1.0, MSCALE], ids=["plain", "yarn"])
@pytest.mark.filterwarnings("ignore:fused_single_qkv_rope does not support YaRN")
def test_fused_single_qkv_mscale(monkeypatch, mscale, fused):
    """fused_single_qkv_rope ignored YaRN's attention factor: q and k were 1/1.3466 of theirs."""
    attention = make_attention(monkeypatch, mscale=mscale, fused=fused)
    check_attention(attention, mscale, interleaved=False)


def test_fused_single_qkv_says_that_it_splits(monkeypatch):
    """A warning says that YaRN does not use the fused kernel, and why."""
    with pytest.warns(
        UserWarning, match=r"does not support YaRN's attention factor, found 1\.3466"
    ):
        make_attention(monkeypatch, mscale=MSCALE)


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
def test_fused_single_qkv_interleaved(monkeypatch, interleaved):
    """Regression: fused_single_qkv_rope rotated halves although rotary_interleaved needs pairs."""
    attention = make_attention(monkeypatch, interleaved=interleaved)
    check_attention(attention, 1.0, interleaved)


@pytest.mark.parametrize("head_dim", [8, 12], ids=["whole-head", "part-of-head"])
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
def test_cos_sin_without_flash_attention(monkeypatch, interleaved, head_dim):
    """Without flash-attn, cos and sin were taken for angles and their cosines and sines applied."""
    monkeypatch.setattr(rope_utils, "apply_rotary_emb_flash", None)
    torch.manual_seed(7)
    inv_freq, _ = make_freqs(9, 8)
    angle = torch.outer(torch.arange(9), inv_freq)
    x = torch.randn(9, 2, 3, head_dim, requires_grad=True)
    out = rope_utils.apply_rotary_pos_emb_with_cos_sin(x, angle.cos(), angle.sin(), interleaved)
    ref = rotate_ref(x[..., :8], torch.arange(9), inv_freq, 1.0, interleaved)
    torch.testing.assert_close(out[..., :8].double(), ref, rtol=0, atol=2e-6)
    assert torch.equal(out[..., 8:], x[..., 8:])
    assert out.shape == x.shape
