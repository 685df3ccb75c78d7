# Copyright (c) 2026, the megatron-core gptoss authors.

"""Layouts of Hugging Face and Megatron, against independent conversions of complete tensors."""

import itertools

import pytest
import torch

from megatron.gpt_oss.checkpoint.mapping import (
    copy_matrix,
    hf_names,
    hf_shape,
    hf_to_megatron,
    locate,
    megatron_to_hf,
)
from megatron.gpt_oss.errors import CheckpointError
from tests.harness.models import ODD

LAYERS, EXPERTS, WIDTH, HIDDEN = 3, 5, 56, 80
GROUPS, HEADS_PER_GROUP, HEAD_DIM = 3, 2, 16


@pytest.fixture(scope="module")
def hf():
    """Every element of the checkpoint has another value."""
    tensors, start = {}, 0
    for name in hf_names(ODD):
        shape = torch.Size(hf_shape(name, ODD))
        tensors[name] = torch.arange(start, start + shape.numel()).reshape(shape)
        start += shape.numel()
    return tensors


@pytest.fixture(scope="module")
def read(hf):
    def read(name, index):
        assert all(not isinstance(i, slice) or i.step is None for i in index)  # as on disk
        return hf[name][index]

    return read


@pytest.fixture(scope="module")
def megatron(hf):
    """Complete Megatron tensors with stacked layers, built element by element."""
    attention = "model.layers.{}.self_attn.{}_proj.{}"
    experts = "model.layers.{}.mlp.experts.{}"

    def qkv(ending):
        layers = []
        for layer in range(LAYERS):
            rows = []
            for group in range(GROUPS):
                for head in range(HEADS_PER_GROUP):
                    first = (group * HEADS_PER_GROUP + head) * HEAD_DIM
                    rows += list(hf[attention.format(layer, "q", ending)][first : first + HEAD_DIM])
                for letter in "kv":
                    first = group * HEAD_DIM
                    part = hf[attention.format(layer, letter, ending)]
                    rows += list(part[first : first + HEAD_DIM])
            layers.append(torch.stack(rows))
        return torch.stack(layers)

    def fc1(name):
        whole = torch.stack([hf[experts.format(layer, name)] for layer in range(LAYERS)])
        order = [*range(0, 2 * WIDTH, 2), *range(1, 2 * WIDTH, 2)]
        whole = whole[..., order]
        return whole.transpose(2, 3) if whole.dim() == 4 else whole

    def fc2(name):
        whole = torch.stack([hf[experts.format(layer, name)] for layer in range(LAYERS)])
        return whole.transpose(2, 3) if whole.dim() == 4 else whole

    def same(name):
        return torch.stack([hf[f"model.layers.{layer}.{name}"] for layer in range(LAYERS)])

    layers = "decoder.layers."
    return {
        "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
        "output_layer.weight": hf["lm_head.weight"],
        layers + "self_attention.linear_qkv.weight": qkv("weight"),
        layers + "self_attention.linear_qkv.bias": qkv("bias"),
        layers + "self_attention.linear_qkv.layer_norm_weight": same("input_layernorm.weight"),
        layers + "self_attention.core_attention.softmax_offset": same("self_attn.sinks"),
        layers + "self_attention.linear_proj.weight": same("self_attn.o_proj.weight"),
        layers + "self_attention.linear_proj.bias": same("self_attn.o_proj.bias"),
        layers + "pre_mlp_layernorm.weight": same("post_attention_layernorm.weight"),
        layers + "mlp.router.weight": same("mlp.router.weight"),
        layers + "mlp.router.bias": same("mlp.router.bias"),
        layers + "mlp.experts.experts.linear_fc1.weight": fc1("gate_up_proj"),
        layers + "mlp.experts.experts.linear_fc1.bias": fc1("gate_up_proj_bias"),
        layers + "mlp.experts.experts.linear_fc2.weight": fc2("down_proj"),
        layers + "mlp.experts.experts.linear_fc2.bias": fc2("down_proj_bias"),
    }


def _prepended(key):
    return 0 if "layers" not in key else 2 if "experts.experts" in key else 1


def _parts(key, tensor):
    """Some parts of every layer and expert: complete, and split at irregular offsets."""
    prepended = _prepended(key)
    local = tensor.shape[prepended:]
    for lead in itertools.product(*map(range, tensor.shape[:prepended])):
        yield (*lead, *(0 for _ in local)), tuple(local)
        for cut in (1, local[0] // 2, local[0] // 3 + 1):
            yield (*lead, cut, *(0 for _ in local[1:])), (local[0] - cut, *local[1:])
            if len(local) == 2:
                yield (*lead, 0, local[1] // 2), (cut, local[1] - local[1] // 2)


def _expected(tensor, offset, shape):
    lead = len(offset) - len(shape)
    cut = (slice(start, start + size) for start, size in zip(offset[lead:], shape))
    return tensor[(*offset[:lead], *cut)]


def test_parts_of_every_tensor(megatron, read):
    for key, tensor in megatron.items():
        for offset, shape in _parts(key, tensor):
            part = hf_to_megatron(locate(key, offset, shape), ODD, read)
            assert torch.equal(part, _expected(tensor, offset, shape)), (key, offset, shape)


def test_layer_number_in_the_key(megatron, read):
    """Non-homogeneous checkpoints name the layer instead of stacking."""
    for key, tensor in megatron.items():
        if "layers" not in key:
            continue
        single = key.replace("layers.", "layers.2.")
        whole = tensor[2]
        if "experts.experts" in key:
            where = locate(single, (4, *(0 for _ in whole.shape[1:])), tuple(whole.shape[1:]))
            assert torch.equal(hf_to_megatron(where, ODD, read), whole[4])
        else:
            where = locate(single, (0,) * whole.dim(), tuple(whole.shape))
            assert torch.equal(hf_to_megatron(where, ODD, read), whole)


def test_both_names_of_the_norms(megatron, read):
    norm = megatron["decoder.layers.pre_mlp_layernorm.weight"]
    where = locate("decoder.layers.mlp.linear_fc1.layer_norm_weight", (1, 0), (HIDDEN,))
    assert torch.equal(hf_to_megatron(where, ODD, read), norm[1])
    where = locate("decoder.layers.input_layernorm.weight", (1, 0), (HIDDEN,))
    norm = megatron["decoder.layers.self_attention.linear_qkv.layer_norm_weight"]
    assert torch.equal(hf_to_megatron(where, ODD, read), norm[1])


@pytest.mark.parametrize("rows", [(0, 54), (54, 108), (96, 108), (101, 108), (104, 108)])
def test_vocabulary_padding_is_zero(hf, read, rows):
    """101 rows over two ranks become 108: some parts end in padding, some are nothing else."""
    for key, name in (
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("output_layer.weight", "lm_head.weight"),
    ):
        padded = torch.cat((hf[name], torch.zeros(7, HIDDEN, dtype=torch.int64)))
        where = locate(key, (rows[0], 0), (rows[1] - rows[0], HIDDEN))
        assert torch.equal(hf_to_megatron(where, ODD, read), padded[slice(*rows)])


class _Source:
    def __init__(self, tensors):
        self.tensors = tensors

    def global_tensor(self, key, rows=slice(None)):
        return self.tensors[key][rows]

    def layer(self, keys, layer, expert=None):
        key = next(k for k in keys if f"decoder.layers.{k}" in self.tensors)
        tensor = self.tensors[f"decoder.layers.{key}"][layer]
        return tensor if expert is None else tensor[expert]


def test_back_to_hugging_face(megatron, hf):
    padded = dict(megatron)
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        padded[key] = torch.cat((megatron[key], torch.full((7, HIDDEN), -1)))
    for name, tensor in hf.items():
        result = megatron_to_hf(name, ODD, _Source(padded))
        assert torch.equal(result, tensor), name
        if ".experts." in name:
            for expert in range(EXPERTS):
                part = megatron_to_hf(name, ODD, _Source(padded), expert)
                assert torch.equal(part, tensor[expert]), (name, expert)


def test_copy_matrix_copies_any_stride():
    for shape in ((300, 130), (130, 300), (1, 5), (7,)):
        value = torch.randn(shape)
        for source in (value, value.mT if value.dim() > 1 else value, value[..., ::2]):
            out = torch.empty(source.shape)
            copy_matrix(out, source)
            assert torch.equal(out, source)


def test_foreign_tensors_are_refused(read):
    for key in ("decoder.layers.mlp.linear_fc1.weight", "decoder.layers.mlp.router.expert_bias"):
        with pytest.raises(CheckpointError, match=key.rpartition("layers.")[2]):
            hf_to_megatron(locate(key, (0, 0, 0), (3, 4)), ODD, read)
    with pytest.raises(CheckpointError, match="vision"):
        hf_to_megatron(locate("vision.weight", (0, 0), (3, 4)), ODD, read)
    with pytest.raises(CheckpointError, match="q_norm"):
        megatron_to_hf("model.layers.0.self_attn.q_norm.weight", ODD, _Source({}))
