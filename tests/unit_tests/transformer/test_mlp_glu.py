# Copyright (c) 2026, the megatron-core gptoss authors.
"""Gated MLPs against gpt-oss' own expert and a hand formula in float64, fused and not fused."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from megatron.core import activations
from megatron.core.fusions import fused_bias_geglu
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe import shared_experts
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig

HIDDEN, FFN, CLAMP = 12, 20, 7.0


@pytest.fixture(autouse=True)
def eager():
    """Compiling each activation takes seconds; their maths is what is tested here."""
    with torch.compiler.set_stance("force_eager"):
        yield


class OneRank:
    """The attributes of a one-rank process group that the MLP uses."""

    def size(self):
        return 1

    def rank(self):
        return 0


class Linear(torch.nn.Module):
    """linear_fc1 and linear_fc2 without tensor parallelism; both leave their bias to the caller."""

    def __init__(self, input_size, output_size, bias, skip_bias_add, **kwargs):
        super().__init__()
        assert skip_bias_add
        random = lambda *size: torch.nn.Parameter(torch.randn(*size, dtype=torch.float64))
        self.weight, self.bias = random(output_size, input_size), random(output_size)
        if not bias:
            self.bias = None

    def forward(self, x):
        return F.linear(x, self.weight), self.bias


def make_config(**kwargs):
    """A config with gpt-oss' activation by default."""
    return TransformerConfig(
        **dict(
            num_layers=1,
            hidden_size=HIDDEN,
            ffn_hidden_size=FFN,
            num_attention_heads=2,
            gated_linear_unit=True,
            activation_func=fused_bias_geglu.quick_gelu,
            glu_linear_offset=1.0,
            activation_func_clamp_value=CLAMP,
            add_bias_linear=True,
        )
        | kwargs
    )


def make_mlp(config, is_expert=False):
    torch.manual_seed(5)
    return MLP(
        config,
        MLPSubmodules(linear_fc1=Linear, linear_fc2=Linear),
        is_expert=is_expert,
        ffn_hidden_size=FFN,
        tp_group=OneRank(),
    )


def assert_past_clamp(mlp, hidden):
    """Both halves pass the clamp on both sides, and the bias carries values over it both ways."""
    product = F.linear(hidden, mlp.linear_fc1.weight).flatten(0, -2)
    for before, after in zip(product.chunk(2, -1), (product + mlp.linear_fc1.bias).chunk(2, -1)):
        for side in (1, -1):
            past_before, past_after = side * before > CLAMP, side * after > CLAMP
            assert (past_before & ~past_after).any() and (~past_before & past_after).any()


def assert_same(got, ref):
    for name in ref:
        torch.testing.assert_close(
            got[name], ref[name], rtol=1e-11, atol=1e-11, msg=lambda m: f"{name}: {m}"
        )


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_expert(fused):
    """An expert is gpt-oss' expert; with the default fusion it clamped before the bias."""
    mlp = make_mlp(make_config(bias_activation_fusion=fused), is_expert=True)
    fc1, fc2 = mlp.linear_fc1, mlp.linear_fc2
    hidden = (torch.randn(40, HIDDEN, dtype=torch.float64) * 2).requires_grad_()
    probs = torch.rand(40, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(40, HIDDEN, dtype=torch.float64)
    assert_past_clamp(mlp, hidden)

    out, bias = mlp(hidden, per_token_scale=probs)
    assert bias is None
    given = [hidden, probs, fc1.weight, fc1.bias, fc2.weight, fc2.bias]
    names = ["dhidden", "dprobs", "dweight1", "dbias1", "dweight2", "dbias2"]
    got = dict(zip(names, torch.autograd.grad(out, given, grad)), out=out)

    experts = GptOssExperts(
        GptOssConfig(hidden_size=HIDDEN, intermediate_size=FFN, num_local_experts=1)
    ).double()
    with torch.no_grad():
        # Hugging Face alternates gate and up; Megatron has gate, then up.
        experts.gate_up_proj[0] = torch.stack(fc1.weight.chunk(2), 1).flatten(0, 1).T
        experts.gate_up_proj_bias[0] = torch.stack(fc1.bias.chunk(2), 1).flatten()
        experts.down_proj[0], experts.down_proj_bias[0] = fc2.weight.T, fc2.bias
    indices = torch.zeros(40, 1, dtype=torch.long)
    out_ref = experts(hidden, router_indices=indices, routing_weights=probs[:, None])
    given_ref = [hidden, probs, *experts.parameters()]
    dhidden, dprobs, gate_up, gate_up_bias, down, down_bias = torch.autograd.grad(
        out_ref, given_ref, grad
    )
    assert_same(
        got,
        dict(
            out=out_ref,
            dhidden=dhidden,
            dprobs=dprobs,
            dweight1=torch.cat((gate_up[0, :, ::2], gate_up[0, :, 1::2]), -1).T,
            dbias1=torch.cat((gate_up_bias[0, ::2], gate_up_bias[0, 1::2])),
            dweight2=down[0].T,
            dbias2=down_bias[0],
        ),
    )


@pytest.mark.parametrize("add_bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("clamp", [None, CLAMP], ids=["free", "clamp"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_mlp(fused, clamp, add_bias):
    """Outside an expert a fusion that the config accepts raised in the first forward."""
    mlp = make_mlp(
        make_config(
            bias_activation_fusion=fused,
            activation_func_clamp_value=clamp,
            add_bias_linear=add_bias,
        )
    )
    fc1, fc2 = mlp.linear_fc1, mlp.linear_fc2
    hidden = (torch.randn(20, 2, HIDDEN, dtype=torch.float64) * 2).requires_grad_()
    grad = torch.randn(20, 2, HIDDEN, dtype=torch.float64)
    if add_bias:
        assert_past_clamp(mlp, hidden)
    out, bias2 = mlp(hidden)
    assert bias2 is fc2.bias

    gate, up = F.linear(hidden, fc1.weight, fc1.bias).chunk(2, -1)
    if clamp is not None:
        gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
    out_ref = F.linear((up + 1) * gate * torch.sigmoid(1.702 * gate), fc2.weight)
    given = [v for v in (hidden, fc1.weight, fc1.bias, fc2.weight) if v is not None]
    names = [str(tuple(v.shape)) for v in given]
    got, ref = (
        dict(zip(names, torch.autograd.grad(o, given, grad)), out=o) for o in (out, out_ref)
    )
    assert_same(got, ref)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_overlapped_shared_expert(monkeypatch, fused):
    """With the overlap a shared expert dropped the clamp and the offset, or refused the fusion."""
    monkeypatch.setattr(SharedExpertMLP, "stream", object())  # Made on the GPU where it is None.
    torch.manual_seed(5)
    config = make_config(
        bias_activation_fusion=fused,
        add_bias_linear=False,
        num_moe_experts=2,
        moe_shared_expert_intermediate_size=FFN,
        moe_shared_expert_overlap=True,
        moe_token_dispatcher_type="alltoall",
    )
    submodules = MLPSubmodules(linear_fc1=Linear, linear_fc2=Linear)
    expert = SharedExpertMLP(config, submodules, False, SimpleNamespace(tp=OneRank()))
    expert.stream = None
    hidden = torch.randn(20, 2, HIDDEN, dtype=torch.float64) * 2
    expert.cached_fc1_input = hidden
    if hasattr(shared_experts, "SharedExpertState"):  # since 0.17
        expert._overlap_state = shared_experts.SharedExpertState.PRE_FORWARD_COMM_DONE
    expert.linear_fc1_forward_and_act()
    expert.linear_fc2_forward()

    gate, up = F.linear(hidden, expert.linear_fc1.weight).chunk(2, -1)
    assert (gate > CLAMP).any() and (abs(up) > CLAMP).any()
    gate, up = gate.clamp(max=CLAMP), up.clamp(-CLAMP, CLAMP)
    ref = F.linear((up + 1) * gate * torch.sigmoid(1.702 * gate), expert.linear_fc2.weight)
    torch.testing.assert_close(expert.cached_fc2_output, ref, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(expert(hidden), ref, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("module", [activations, fused_bias_geglu], ids=lambda m: m.__name__)
def test_either_quick_gelu_is_accepted(module):
    """The one of core.activations was refused with the fusion, as not being quick_gelu."""
    config = make_config(bias_activation_fusion=True, activation_func=module.quick_gelu)
    mlp = make_mlp(config, is_expert=True)
    hidden = torch.randn(9, HIDDEN, dtype=torch.float64)
    probs = torch.rand(9, dtype=torch.float64)
    out, _ = mlp(hidden, per_token_scale=probs)
    config.bias_activation_fusion = False
    torch.testing.assert_close(out, mlp(hidden, per_token_scale=probs)[0], rtol=1e-12, atol=1e-12)


FUSED = dict(bias_activation_fusion=True)
TE = dict(use_te_activation_func=True)


@pytest.mark.parametrize(
    "activation, clamp, offset, how, ignored",
    [
        pytest.param(F.silu, 7.0, 0.0, FUSED, "fused gelu and swiglu", id="swiglu"),
        pytest.param(F.gelu, 7.0, 0.0, FUSED, "fused gelu and swiglu", id="geglu"),
        pytest.param(F.silu, 7.0, 0.0, TE, "TransformerEngine", id="te-clamp"),
        pytest.param(F.silu, None, 1.0, TE, "TransformerEngine", id="te-offset"),
        pytest.param(F.silu, None, 0.0, FUSED, None, id="swiglu-without"),
        pytest.param(F.silu, None, 0.0, TE, None, id="te-without"),
        pytest.param(F.silu, 7.0, 1.0, {}, None, id="swiglu-unfused"),
        pytest.param(activations.quick_gelu, 7.0, 1.0, {}, None, id="quick-geglu-unfused"),
        pytest.param(fused_bias_geglu.quick_gelu, 7.0, 1.0, FUSED, None, id="quick-geglu-fused"),
    ],
)
def test_ignored_clamp_is_refused(activation, clamp, offset, how, ignored):
    """The fused swiglu and TE's activations dropped the clamp, TE's the offset too, in silence."""
    make = lambda: make_config(
        activation_func=activation,
        activation_func_clamp_value=clamp,
        glu_linear_offset=offset,
        **how,
    )
    if ignored is None:
        make()
        return
    with pytest.raises(ValueError, match=f"{ignored}.* would ignore") as error:
        make()
    assert str(7.0 if clamp else offset) in str(error.value)


def test_unfused_swiglu_clamps():
    """Why the fused one must not ignore it: unfused, the same configuration clamps."""
    mlp = make_mlp(make_config(activation_func=F.silu, glu_linear_offset=0.0))
    hidden = torch.randn(20, 1, HIDDEN, dtype=torch.float64) * 2
    fc1 = mlp.linear_fc1
    gate, up = F.linear(hidden, fc1.weight, fc1.bias).chunk(2, -1)
    ref = F.linear(F.silu(gate.clamp(max=CLAMP)) * up.clamp(-CLAMP, CLAMP), mlp.linear_fc2.weight)
    torch.testing.assert_close(mlp(hidden)[0], ref, rtol=1e-12, atol=1e-12)
