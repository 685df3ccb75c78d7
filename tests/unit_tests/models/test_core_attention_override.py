# Copyright (c) 2026, the megatron-core gptoss authors.

"""--attention-backend local puts DotProductAttention into every kind of GPT spec."""

from types import SimpleNamespace

import pytest
import torch

from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig


class OtherAttention(DotProductAttention):
    """Replaces TransformerEngine's attention."""


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """A model sets these variables for its backend, and rejects those of another."""
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        monkeypatch.setenv(name, "")  # so that it is put back as it was
        monkeypatch.delenv(name)


def spec_with_other_attention(config, block):
    spec = get_gpt_decoder_block_spec(config.transformer, False, normalization="RMSNorm")
    for layer in spec.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = OtherAttention
    return spec if block else spec.layer_specs[0]


@pytest.mark.parametrize("block", [True, False], ids=["block-spec", "layer-spec"])
@pytest.mark.parametrize("backend", [AttnBackend.local, AttnBackend.auto], ids=["local", "auto"])
def test_builder(backend, block):
    """The builder left block specs, which models with experts have, as they were."""
    config = GPTModelConfig(
        transformer=TransformerConfig(
            num_layers=2,
            hidden_size=16,
            num_attention_heads=4,
            num_moe_experts=2,
            moe_layer_freq=[1, 0],
            normalization="RMSNorm",
            attention_backend=backend,
            transformer_impl="local",
            use_cpu_initialization=True,
        ),
        transformer_layer_spec=lambda config: spec_with_other_attention(config, block),
        vocab_size=32,
        seq_length=8,
        position_embedding_type="rope",
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = GPTModelBuilder(config).build_model(groups, pre_process=True, post_process=True)
    built = {type(layer.self_attention.core_attention) for layer in model.decoder.layers}
    assert built == {DotProductAttention if backend == AttnBackend.local else OtherAttention}


def test_layers_without_attention():
    """They are unchanged; a spec without a replaceable attention is rejected."""
    from megatron.core.models.gpt.core_attention_override import override_core_attention

    empty = ModuleSpec(module=object, submodules=SimpleNamespace(self_attention=object))
    attention = SimpleNamespace(submodules=SimpleNamespace(core_attention=OtherAttention))
    layer = ModuleSpec(module=object, submodules=SimpleNamespace(self_attention=attention))
    override_core_attention(SimpleNamespace(layer_specs=[empty, layer]), DotProductAttention)
    assert attention.submodules.core_attention is DotProductAttention
    override_core_attention(SimpleNamespace(layer_specs=[]), DotProductAttention)
    with pytest.raises(ValueError, match="no layer of the spec ModuleSpec has a core_attention"):
        override_core_attention(empty, DotProductAttention)
