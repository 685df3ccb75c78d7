# Copyright (c) 2026, the megatron-core gptoss authors.

"""`load_hf` at parallel layouts: each rank's weights equal what resharding a checkpoint gives it.

The reference is Megatron's own: one rank loads (test_parity.py shows that right) and saves a
torch_dist checkpoint, which every layout loads through dist_checkpointing.
"""

import dataclasses

import pytest
import torch

from megatron.core import dist_checkpointing, parallel_state
from megatron.gpt_oss.checkpoint.hf.reader import HFReader
from megatron.gpt_oss.checkpoint.hf.safetensors_file import SafetensorsFile
from megatron.gpt_oss.checkpoint.load_hf import load_hf
from tests.harness.models import (
    TINY,
    build_model,
    mxfp4_tensors,
    trained_tensors,
    write_hf,
    write_mxfp4,
)

pytestmark = pytest.mark.ranks(4)

PRESET = dataclasses.replace(TINY, vocab_size=269)  # odd: padded to 272 for four ranks
PADDED = 272

LAYOUTS = {
    "tp2": (2, dict(tensor_model_parallel_size=2)),
    "pp2": (2, dict(pipeline_model_parallel_size=2)),
    "ep2": (2, dict(expert_model_parallel_size=2)),
    "pp2-vpp2": (2, dict(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1)),
    "tp2-ep2-etp2-dp2": (4, dict(tensor_model_parallel_size=2, expert_model_parallel_size=2)),
    "tp2-ep4-etp1": (
        4,
        dict(
            tensor_model_parallel_size=2,
            expert_model_parallel_size=4,
            expert_tensor_parallel_size=1,
        ),
    ),
    "tp2-pp2": (4, dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
}


@pytest.fixture(scope="module")
def folders(one_rank, tmp_path_factory):
    hf = write_hf(tmp_path_factory.mktemp("hf") / "hf", PRESET, trained_tensors(PRESET))
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    model = build_model(PRESET, padded_vocab_size=PADDED)
    load_hf([model], hf)
    dist_checkpointing.save(model.sharded_state_dict(), str(checkpoint))
    return str(hf), str(checkpoint)


@pytest.fixture(scope="module")
def published(folders, tmp_path_factory):
    tensors = mxfp4_tensors(trained_tensors(PRESET))
    out = tmp_path_factory.mktemp("published") / "hf"
    return {"bf16": folders[0], "mxfp4": str(write_mxfp4(out, PRESET, tensors))}


def _build(layout):
    names = {
        "num_layers_per_virtual_pipeline_stage": None,
        "tensor_model_parallel_size": "tensor_model_parallel_size",
        "pipeline_model_parallel_size": "pipeline_model_parallel_size",
        "expert_model_parallel_size": "expert_model_parallel_size",
        "expert_tensor_parallel_size": "expert_tensor_parallel_size",
    }
    sizes = {names[key]: value for key, value in layout.items() if names[key]}
    if "num_layers_per_virtual_pipeline_stage" in layout:
        sizes["virtual_pipeline_model_parallel_size"] = 2
    parallel_state.initialize_model_parallel(**sizes)
    model = build_model(PRESET, padded_vocab_size=PADDED, **layout)
    return model if isinstance(model, list) else [model]


def _compare(hf, checkpoint, layout):
    chunks = _build(layout)
    load_hf(chunks, hf)
    loaded = [{name: p.detach().clone() for name, p in c.named_parameters()} for c in chunks]
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))
    wanted = {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
    state = dist_checkpointing.load(wanted, checkpoint)
    compared = 0
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(state[f"model{i}"])
        for name, parameter in chunk.named_parameters():
            assert torch.equal(loaded[i][name], parameter), name
            compared += parameter.numel()
    return compared


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(ranks, folders, name):
    world_size, layout = LAYOUTS[name]
    compared = ranks.run(_compare, *folders, layout, world_size=world_size)
    whole = sum(tensor.numel() for tensor in trained_tensors(PRESET).values())
    assert sum(compared) >= whole  # every element lies on some rank
    assert max(compared) < 0.75 * whole  # and no rank holds all


def _bytes_read(hf, layout):
    """(bytes that this rank read, bytes of its tensors in the files)."""
    read, count = SafetensorsFile.read, 0

    def counted(self, name, index=()):
        nonlocal count
        part = read(self, name, index)
        count += part.nbytes
        return part

    chunks = _build(layout)
    SafetensorsFile.read = counted
    try:
        load_hf(chunks, hf)
    finally:
        SafetensorsFile.read = read
    mxfp4 = HFReader(hf).is_mxfp4("model.layers.0.mlp.experts.down_proj")
    owned = 0
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            matrix = ".experts." in name and name.endswith("weight")
            owned += parameter.numel() * (17 / 32 if mxfp4 and matrix else 2)
    return count, owned


@pytest.mark.parametrize("dtype", ["bf16", "mxfp4"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rank_reads_what_it_owns(ranks, published, name, dtype):
    """Byte for byte; but of the vocabulary's padding nothing is read, and 48 columns of an expert
    lie in two blocks of 32."""
    world_size, layout = LAYOUTS[name]
    cut_in_blocks = dtype == "mxfp4" and "tp2" in name and "etp1" not in name
    for count, owned in ranks.run(_bytes_read, published[dtype], layout, world_size=world_size):
        if cut_in_blocks:
            assert owned * 0.97 < count < owned * 1.15
        else:
            padding = 2 * (PADDED - PRESET.vocab_size) * PRESET.hidden_size * 2
            assert owned - padding <= count <= owned
