# Copyright (c) 2026, the megatron-core gptoss authors.

"""Requirements of --transformer-impl transformer_engine and its layer spec, without the package."""

import re
from argparse import Namespace
from types import SimpleNamespace

import pytest

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.transformer.fused_rotary_attention import FusedRotarySelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.grouped_mlp.module import GroupedExperts
from megatron.core.transformer.sink_attention.sink_dot_product_attention import (
    SinkDotProductAttention,
)
from megatron.gpt_oss import layer_specs
from megatron.gpt_oss.arguments.te_requirements import (
    Versions,
    check_installed,
    check_transformer_engine,
    describe,
)
from megatron.gpt_oss.errors import UsageError

NEW = Versions((2, 20, 2), (9, 19, 0))
BASE = dict(
    transformer_impl="transformer_engine",
    sink_attention="te",
    context_parallel_size=1,
    tensor_model_parallel_size=1,
    sequence_parallel=False,
    softmax_type="learnable",
    dataloader_inter_document_masking=False,
    bf16=True,
    fp16=False,
    attention_backend="auto",
    kv_channels=64,
    reset_attention_mask=False,
    deterministic_mode=False,
    cp_comm_type=["a2a"],
    num_attention_heads=64,
    num_query_groups=8,
    fp8=None,
    fp4=None,
    fp8_recipe="delayed",
    recompute_modules=None,
    seq_length=4096,
    micro_batch_size=1,
)
CP = dict(context_parallel_size=2)
PACKED = dict(dataloader_inter_document_masking=True)


def check(versions=NEW, **changes):
    check_transformer_engine(Namespace(**{**BASE, **changes}), versions)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        CP,
        PACKED,
        dict(CP, cp_comm_type=["a2a", "a2a"]),
        dict(cp_comm_type=["p2p"]),  # nothing is exchanged
        dict(kv_channels=128),
        dict(context_parallel_size=4, tensor_model_parallel_size=2),
        dict(CP, softmax_type="vanilla", cp_comm_type=["p2p"]),
        dict(fp8="hybrid", fp8_recipe="tensorwise"),
        dict(fp8="e4m3", fp8_recipe="blockwise", recompute_modules=["moe_act"]),
        # Ours runs all of this.
        dict(CP, **PACKED, sink_attention="megatron", cp_comm_type=["auto"]),
        dict(sink_attention="megatron", deterministic_mode=True, bf16=False, kv_channels=256),
        dict(transformer_impl="local", sink_attention="megatron"),
    ],
)
def test_accepted(changes):
    check(**changes)


@pytest.mark.parametrize("versions", [Versions((2, 8, 0), (9, 13, 1)), Versions(None, None)])
def test_oldest_and_unknown_versions(versions):
    """A plan is made where there is neither."""
    check(versions)


@pytest.mark.parametrize(
    "versions, changes, words",
    [
        (Versions((2, 7, 9), (9, 19, 0)), {}, ["learnable", "TransformerEngine 2.8.0", "2.7.9"]),
        (Versions((2, 20, 2), (9, 13, 0)), {}, ["learnable", "cuDNN 9.13.1", "found 9.13.0"]),
        (Versions((2, 20, 2), (9, 17, 1)), PACKED, ["thd", "cuDNN 9.18.0", "found 9.17.1"]),
        (NEW, dict(CP, cp_comm_type=["p2p"]), ["needs a2a", "--cp-comm-type is p2p"]),
        (NEW, dict(CP, cp_comm_type=["a2a", "all_gather"]), ["--cp-comm-type is all_gather"]),
        (NEW, dict(CP, **PACKED), ["multiples of 4"]),
        (NEW, dict(context_parallel_size=16), ["8 groups", "16 ranks"]),
        (NEW, dict(CP, tensor_model_parallel_size=8), ["8 groups", "16 ranks"]),
        (NEW, dict(deterministic_mode=True), ["--deterministic-mode"]),
        (NEW, dict(kv_channels=256), ["up to 128", "--kv-channels is 256"]),
        (NEW, dict(kv_channels=60), ["steps of 8", "60"]),
        (NEW, dict(bf16=False), ["--bf16"]),
        (NEW, dict(attention_backend="flash"), ["--attention-backend flash"]),
        (NEW, dict(reset_attention_mask=True), ["--reset-attention-mask"]),
    ],
)
def test_attention_refused(versions, changes, words):
    """One sentence says what is missing, one what to use."""
    with pytest.raises(UsageError) as refused:
        check(versions, **changes)
    message = str(refused.value)
    for word in (*words, "--sink-attention te: ", "Drop the flag: Megatron-Core's own attention"):
        assert word in message
    check(versions, **{**changes, "sink_attention": "megatron"})


@pytest.mark.parametrize(
    "versions, changes, words",
    [
        (
            Versions((2, 1, 0), None),
            dict(fp8="hybrid", fp8_recipe="tensorwise"),
            ["2.2.0", "2.1.0"],
        ),
        (Versions((2, 2, 0), None), dict(fp8="e4m3", fp8_recipe="blockwise"), ["2.3.0", "2.2.0"]),
        (NEW, dict(fp8="hybrid", seq_length=4104), ["4104 tokens", "multiples of 16"]),
        (NEW, dict(CP, fp8="hybrid", seq_length=4112), ["2056 tokens", "--seq-length", "32"]),
        (
            Versions((2, 5, 0), None),
            dict(fp8="hybrid", fp8_recipe="tensorwise", recompute_modules=["moe_act"]),
            ["moe_act", "2.6.0", "2.5.0"],
        ),
        (NEW, dict(transformer_impl="local"), ["needs --transformer-impl transformer_engine"]),
    ],
)
def test_refused(versions, changes, words):
    with pytest.raises(UsageError) as refused:
        check(versions, **changes)
    assert all(word in str(refused.value) for word in words), refused.value


def test_not_installed():
    with pytest.raises(UsageError, match="not installed. .*--transformer-impl local"):
        check_installed("transformer_engine", Versions(None, None))
    check_installed("local", Versions(None, None))
    check_installed("transformer_engine", NEW)


@pytest.mark.parametrize(
    "versions, words",
    [
        (Versions(None, None), "not installed; --transformer-impl local"),
        (NEW, "2.20.2: .*tensorwise, blockwise; --sink-attention te can be chosen"),
        (Versions((2, 20, 2), (9, 10, 2)), "needs cuDNN 9.13.1, PyTorch has 9.10.2"),
        (Versions((2, 7, 0), (9, 19, 0)), "--sink-attention te needs TransformerEngine 2.8.0"),
        (Versions((2, 20, 2), None), "no GPU"),
    ],
)
def test_doctor_line(versions, words):
    line = describe(versions)
    assert re.search(words, line) and "\n" not in line


@pytest.mark.parametrize("choice", ["megatron", "te"])
def test_layer_spec(choice):
    """TransformerEngine's norms and linears around our attention, or its own."""
    provider = layer_specs.TEGptOssSpecProvider(choice)
    config = SimpleNamespace(num_moe_experts=8, moe_grouped_gemm=True)
    layer = layer_specs.gpt_oss_layer_spec(config, provider).submodules
    theirs = TESpecProvider()
    attention = layer.self_attention
    assert attention.module is FusedRotarySelfAttention
    assert layer.input_layernorm is IdentityOp and layer.sharded_state_dict_keys_map == {}
    assert attention.submodules.linear_qkv is theirs.column_parallel_layer_norm_linear()
    assert attention.submodules.linear_proj is theirs.row_parallel_linear()
    expected = TEDotProductAttention if choice == "te" else SinkDotProductAttention
    assert attention.submodules.core_attention is expected


def test_local_layer_spec():
    """Without TransformerEngine: attention on our kernels, and grouped experts."""
    provider = layer_specs.GptOssSpecProvider()
    config = SimpleNamespace(num_moe_experts=8, moe_grouped_gemm=True)
    layer = layer_specs.gpt_oss_layer_spec(config, provider).submodules
    assert layer.self_attention.submodules.core_attention is SinkDotProductAttention
    assert provider.grouped_mlp_modules(True) is GroupedExperts
    assert provider.grouped_mlp_modules(False) is not GroupedExperts
