# Copyright (c) 2026, the megatron-core gptoss authors.

"""The sinks of TransformerEngine's attention, with a stand-in for its class: no TransformerEngine."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version

from megatron.core.extensions import transformer_engine as extension
from megatron.core.transformer import te_softmax_offset
from megatron.core.transformer.enums import AttnMaskType

HEADS, GROUPS, DIM, LENGTH = 4, 2, 8, 16


class StandIn(torch.nn.Module):
    """TransformerEngine's handling of the sinks' gradient with a2a, in plain PyTorch.

    After the exchange a rank has all tokens of its heads; the backward gathers the gradients of all
    heads' sinks, so that every rank has all of them.
    """

    def __init__(self, num_attention_heads, cp_group=None, tp_size=1, **kwargs):
        super().__init__()
        self.cp_group = cp_group
        self.softmax_offset = torch.nn.Parameter(torch.zeros(num_attention_heads // tp_size))

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        pass

    def forward(self, query, key, value):
        return _Attention.apply(query, key, value, self.softmax_offset, self.cp_group)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, sinks, group):
        rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
        heads = torch.arange(HEADS).chunk(ranks)[rank]
        with torch.enable_grad():
            leaf = sinks.detach()[heads].requires_grad_()
            out = attend(query[:, heads], key[:, heads], value[:, heads], leaf)
        ctx.out, ctx.leaf, ctx.group = out, leaf, group
        return out.detach()

    @staticmethod
    def backward(ctx, dout):
        (own,) = torch.autograd.grad(ctx.out, ctx.leaf, dout)
        if ctx.group is None:
            return None, None, None, own, None
        everyone = [torch.empty_like(own) for _ in range(ctx.group.size())]
        torch.distributed.all_gather(everyone, own.contiguous(), group=ctx.group)
        return None, None, None, torch.cat(everyone), None


def attend(query, key, value, sinks):
    """[t, np, hn] each: causal attention with a column of value 0 for the sink."""
    scores = torch.einsum("qhd,khd->hqk", query, key)
    scores = scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf)
    column = sinks[:, None, None].expand(-1, LENGTH, 1)
    weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    return torch.einsum("hqk,khd->qhd", weights, value)


def attention_class():
    """TEDotProductAttention as the extension has it, over the stand-in."""
    source = Path(extension.__file__).read_text()
    (found,) = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "TEDotProductAttention"
    ]
    names = dict(vars(extension))
    names.update(
        te=SimpleNamespace(pytorch=SimpleNamespace(DotProductAttention=StandIn)),
        HAVE_TE=True,
        is_te_min_version=lambda *args, **kwargs: True,
        get_te_version=lambda: Version("2.20.2"),
    )
    module = ast.Module(body=[found], type_ignores=[])
    future = __import__("__future__").annotations.compiler_flag
    exec(compile(module, extension.__file__, "exec", flags=future), names)
    names["TEDotProductAttention"].cp_stream = object()  # replaces a CUDA stream
    return names["TEDotProductAttention"]


def build(cp_group=None, tp_group=None):
    config = SimpleNamespace(
        batch_invariant_mode=False,
        apply_query_key_layer_scaling=False,
        num_query_groups=GROUPS,
        num_attention_heads=HEADS,
        kv_channels=DIM,
        context_parallel_size=1 if cp_group is None else cp_group.size(),
        tensor_model_parallel_size=1,
        sequence_parallel=False,
        deterministic_mode=False,
        window_size=None,
        window_attn_skip_freq=None,
        softmax_type="learnable",
        attention_dropout=0.0,
        qk_clip=False,
        log_max_attention_logit=False,
        use_cpu_initialization=False,
        perform_initialization=True,
    )
    groups = SimpleNamespace(tp=tp_group, cp=cp_group)
    return attention_class()(
        config, 1, AttnMaskType.causal, "self", cp_comm_type="a2a", pg_collection=groups
    )


def gradient(cp: bool):
    """[HEADS], reduced as Megatron does over the ranks of a context parallel group."""
    group = torch.distributed.group.WORLD if cp else None
    module = build(group)
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(LENGTH, HEADS, DIM, generator=generator) for _ in range(4)]
    with torch.no_grad():
        module.softmax_offset.copy_(torch.linspace(-2, 3, HEADS))
    out = StandIn.forward(module, *tensors[:3])
    dout = tensors[3]
    if cp:
        dout = dout[:, torch.arange(HEADS).chunk(group.size())[group.rank()]]
    out.backward(dout)
    total = module.softmax_offset.grad
    if cp:
        torch.distributed.all_reduce(total)
    return total.tolist()


@pytest.fixture(autouse=True)
def no_random_states(monkeypatch):
    """Those that tests before may have left: the stand-in's config says nothing of initialisation."""
    tracker = SimpleNamespace(is_initialized=lambda: False)
    monkeypatch.setattr(te_softmax_offset, "get_cuda_rng_tracker", lambda: tracker)


def expected():
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(LENGTH, HEADS, DIM, generator=generator).double() for _ in range(4)]
    sinks = torch.linspace(-2, 3, HEADS).double().requires_grad_()
    attend(*tensors[:3], sinks).backward(tensors[3])
    return sinks.grad.tolist()


def test_one_rank():
    assert gradient(False) == pytest.approx(expected(), rel=1e-4)


def test_cp2_gradient(ranks):
    """The sum over the ranks was twice the gradient: each had all of it."""
    for found in ranks.run(gradient, True, world_size=2):
        assert found == pytest.approx(expected(), rel=1e-4)


def test_marked_as_split_over_heads():
    """Else the gradient norm counts the sinks of tensor parallel rank 0 alone."""
    param = build().softmax_offset
    assert param.tensor_model_parallel and param.partition_dim == 0


def test_checkpoint_holds_the_sinks_alone():
    """With other softmax types nothing is saved; an object that local attention lacks ends a load."""
    group = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    module = build(tp_group=group)
    found = module.sharded_state_dict(metadata={"dp_cp_group": group})
    assert list(found) == ["softmax_offset"]


def test_hook_survives_the_cast():
    """Megatron casts the module to bf16 after it is made."""
    module = build().bfloat16()
    module.cp_group = None
    calls = module.softmax_offset._backward_hooks
    assert module.softmax_offset.dtype == torch.bfloat16 and len(calls) == 1
