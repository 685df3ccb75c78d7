# Copyright (c) 2026, the megatron-core gptoss authors.

"""DotProductAttention with sink_attention: against the definition, and when it is not used."""

import pytest
import torch

from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.harness.attention_reference import (
    attention_ref,
    gradients,
)
from tests.harness.compare import relative_error

HEADS, GROUPS, DIM = 4, 2, 8


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def make(
    softmax_type="learnable",
    layer_number=1,
    mask_type=AttnMaskType.causal,
    cp_comm_type=None,
    **fields,
):
    """A layer with sinks of +-6."""
    defaults = dict(
        num_layers=2,
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=DIM,
        softmax_type=softmax_type,
        attention_dropout=0.0,
    )
    config = TransformerConfig(**{**defaults, **fields})
    groups = ProcessGroupCollection.use_mpu_process_groups()
    layer = DotProductAttention(
        config,
        layer_number,
        mask_type,
        "self",
        cp_comm_type=cp_comm_type,
        pg_collection=groups,
    )
    if softmax_type == "learnable":
        with torch.no_grad():
            layer.softmax_offset.copy_(torch.linspace(-6, 6, HEADS))
    return layer


def tensors(*lead, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(*lead, HEADS, DIM), (*lead, GROUPS, DIM), (*lead, GROUPS, DIM)]
    return [torch.randn(s, generator=generator).requires_grad_() for s in shapes]


def exact(values):
    return [x.detach().double().requires_grad_() for x in values]


def check(layer, inputs, out, expected, exact_inputs):
    """Output, and the gradients of q, k, v and the sinks."""
    assert relative_error(out.double(), expected.flatten(-2)) < 1e-6
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    values = gradients(out, [*inputs, layer.softmax_offset], dout)
    targets = gradients(expected.flatten(-2), exact_inputs, dout.double())
    for label, value, target in zip(("dq", "dk", "dv", "dsink"), values, targets):
        assert relative_error(value, target) < 5e-6, label


@pytest.mark.parametrize("layer_number, window", [(1, 5), (2, None)], ids=["window", "full"])
def test_dense(layer_number, window):
    """Odd layers (by Megatron's count from 1) have the window; a micro batch of 2."""
    layer = make(layer_number=layer_number, window_size=(4, 0), window_attn_skip_freq=2)
    q, k, v = tensors(19, 2)
    out = layer(q, k, v, None)
    reference = exact([q, k, v, layer.softmax_offset])
    check(layer, (q, k, v), out, attention_ref(*reference, window=window), reference)


@pytest.mark.parametrize("padded", [False, True], ids=["tight", "padded"])
@pytest.mark.parametrize("softmax_type", ["learnable", "vanilla"])
def test_packed_documents(softmax_type, padded):
    """Refused before. With padding between the documents, its tokens are of the document before."""
    layer = make(softmax_type, window_size=(4, 0))
    cu = [0, 7, 8, 19]
    bounds = torch.tensor(cu, dtype=torch.int32)
    params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    params.max_seqlen_q = params.max_seqlen_kv = 11
    if padded:
        params.cu_seqlens_q = torch.tensor([0, 5, 6, 15], dtype=torch.int32)
        params.cu_seqlens_q_padded = bounds
    q, k, v = tensors(19)
    out = layer(q, k, v, None, AttnMaskType.padding_causal, packed_seq_params=params)
    assert out.shape == (19, HEADS * DIM)
    if softmax_type == "vanilla":
        expected = attention_ref(*exact([q, k, v]), window=5, cu_q=cu)
        assert relative_error(out.double(), expected.flatten(-2)) < 1e-6
        return
    reference = exact([q, k, v, layer.softmax_offset])
    expected = attention_ref(*reference, window=5, cu_q=cu)
    check(layer, (q, k, v), out, expected, reference)


def test_off_by_one():
    layer = make("off-by-one")
    q, k, v = tensors(9, 2)
    zeros = torch.zeros(HEADS, dtype=torch.float64)
    expected = attention_ref(*exact([q, k, v]), zeros)
    assert relative_error(layer(q, k, v, None).double(), expected.flatten(-2)) < 1e-6


@pytest.mark.parametrize("fields", [
    {"softmax_scale": 0.9},
    {"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True},
    {"deterministic_mode": True},
], ids=["scale", "layer-scaling", "deterministic"])  # fmt: skip
def test_options(fields):
    """Options have the same effect as on upstream's path."""
    fields = dict(fields)
    scale = fields.pop("softmax_scale", None)
    layer = make(layer_number=2, **fields)
    if scale is not None:
        layer.softmax_scale = scale
    q, k, v = tensors(9, 2)
    expected = attention_ref(*exact([q, k, v, layer.softmax_offset]), scale=scale)
    assert relative_error(layer(q, k, v, None).double(), expected.flatten(-2)) < 1e-6


def unfused(layer, *inputs):
    """Upstream's path, reached by a mask that hides nothing more."""
    length = inputs[0].shape[0]
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    return layer(*inputs, mask)


def test_vanilla_is_left_alone(monkeypatch):
    """The same bits as upstream's path; with --sink-attention-backend the kernels."""
    from megatron.core.transformer.sink_attention import megatron_module

    q, k, v = tensors(9, 2)
    expected = unfused(make("vanilla"), q, k, v)
    calls = []
    original = megatron_module.sink_attention
    monkeypatch.setattr(
        megatron_module, "sink_attention", lambda *a, **o: calls.append(o) or original(*a, **o)
    )
    assert torch.equal(make("vanilla")(q, k, v, None), expected) and not calls
    out = make("vanilla", sink_attention_backend="auto")(q, k, v, None)
    assert len(calls) == 1 and relative_error(out.double(), expected.double()) < 1e-6


def test_nothing_quadratic_is_kept():
    """The unfused path keeps the scores of all pairs for the backward."""
    q, k, v = tensors(300, 1)
    layer = make()
    largest = []
    for attention in (lambda: layer(q, k, v, None), lambda: unfused(layer, q, k, v)):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            attention()
        largest.append(max(x.numel() for x in saved))
    assert largest[0] <= q.numel() and largest[1] >= HEADS * 300 * 300


def test_mask_tensor_stays_unfused():
    """Documents given as a mask, sinks on top."""
    layer = make(window_size=(4, 0))
    q, k, v = tensors(12, 1)
    document = torch.arange(12) >= 7
    mask = torch.ones(12, 12, dtype=torch.bool).triu(1) | (document[:, None] != document[None])
    out = layer(q, k, v, mask[None, None])
    reference = exact([x[:, 0] for x in (q, k, v)] + [layer.softmax_offset])
    expected = attention_ref(*reference, window=5, cu_q=[0, 7, 12])
    assert relative_error(out[:, 0].double(), expected.flatten(-2)) < 1e-6


def test_dropout_stays_unfused():
    """In training; without dropout in evaluation."""
    layer = make(attention_dropout=0.5)
    q, k, v = tensors(12, 1)
    first, second = layer(q, k, v, None), layer(q, k, v, None)
    assert not torch.equal(first, second)
    layer.eval()
    expected = attention_ref(*exact([q, k, v, layer.softmax_offset]))
    assert relative_error(layer(q, k, v, None).double(), expected.flatten(-2)) < 1e-6


PACKED = dict(
    qkv_format="thd",
    cu_seqlens_q=torch.tensor([0, 12], dtype=torch.int32),
    cu_seqlens_kv=torch.tensor([0, 12], dtype=torch.int32),
)
REFUSED = {
    "dropout": (
        dict(sink_attention_backend="fa4", attention_dropout=0.1),
        {},
        r"--sink-attention-backend fa4 in layer 1: attention dropout is 0.1.*--attention-dropout 0",
    ),
    "mask": (
        dict(sink_attention_backend="cudnn"),
        {"attention_mask": torch.zeros(1, 1, 12, 12, dtype=torch.bool)},
        r"a mask \[1, 1, 12, 12\] is given.*--no-create-attention-mask-in-dataloader",
    ),
    "mask-type": (
        dict(sink_attention_backend="fa4", mask_type=AttnMaskType.no_mask),
        {},
        "the mask type is no_mask",
    ),
    "bias": (
        dict(sink_attention_backend="fa4"),
        {"attention_bias": torch.zeros(1)},
        "an attention bias is given",
    ),
    "unable": (
        dict(sink_attention_backend="cudnn"),
        {},
        "'cudnn' cannot run this call: needs a CUDA device, the tensors are on cpu",
    ),
    "packed-dropout": (
        dict(attention_dropout=0.1),
        {"packed_seq_params": PackedSeqParams(**PACKED)},
        "Packed sequences in layer 1: attention dropout is 0.1",
    ),
    "context-parallel-dropout": (
        dict(context_parallel_size=2, attention_dropout=0.1),
        {},
        "Context parallelism in layer 1: attention dropout is 0.1",
    ),
    "context-parallel-mask": (
        dict(context_parallel_size=2, softmax_type="vanilla"),
        {"attention_mask": torch.zeros(1, 1, 12, 12, dtype=torch.bool)},
        r"Context parallelism in layer 1: a mask \[1, 1, 12, 12\] is given",
    ),
    "context-parallel-packed": (
        dict(context_parallel_size=2),
        {"packed_seq_params": PackedSeqParams(**PACKED)},
        "splits all documents as one sequence here, which PackedSeqParams does not describe; "
        ".*PackedSequence.of",
    ),
    "context-parallel-groups": (
        dict(context_parallel_size=2, cp_comm_type="a2a+p2p"),
        {},
        "cp_comm_type is 'a2a\\+p2p', and there is no process group 'hcp'",
    ),
    "packed-format": (
        {},
        {"packed_seq_params": PackedSeqParams(**{**PACKED, "qkv_format": "sbhd"})},
        "qkv_format is 'sbhd'; wanted 'thd'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    """In one sentence, with what to do; the neighbour `math` is accepted where it can be."""
    fields, call, message = REFUSED[name]
    q, k, v = tensors(12) if "packed_seq_params" in call else tensors(12, 1)
    with pytest.raises(ValueError, match=message):
        make(**fields)(q, k, v, **{"attention_mask": None, **call})
    if name in ("dropout", "mask"):
        make(**{**fields, "sink_attention_backend": "math"})(
            q, k, v, **{"attention_mask": None, **call}
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("softmax_type", ["learnable", "off-by-one"])
def test_gpu_against_unfused(softmax_type):
    """bf16 on the fastest kernel against upstream's unfused path, a window and packed documents."""
    layer = make(softmax_type, window_size=(127, 0), kv_channels=64, bf16=True,
                 params_dtype=torch.bfloat16).cuda()  # fmt: skip
    if softmax_type == "off-by-one":
        layer.softmax_offset = layer.softmax_offset.cuda()
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(500, 2, heads, 64, generator=generator).to("cuda", torch.bfloat16)
        for heads in (HEADS, GROUPS, GROUPS)
    )
    expected = attention_ref(
        *(x.double() for x in (q, k, v)), layer.softmax_offset.double(), window=128
    ).flatten(-2)
    assert relative_error(layer(q, k, v, None), expected) < 4e-3
