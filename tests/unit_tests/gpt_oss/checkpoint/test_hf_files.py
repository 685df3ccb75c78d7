# Copyright (c) 2026, the megatron-core gptoss authors.

"""Read Hugging Face directories in BF16 and MXFP4, complete and damaged."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.gpt_oss.checkpoint.hf.config import (
    check_hf_config,
    hf_config_from_preset,
    read_hf_config,
)
from megatron.gpt_oss.checkpoint.hf.mxfp4 import dequantize
from megatron.gpt_oss.checkpoint.hf.reader import HFReader
from megatron.gpt_oss.diagnostics.random_checkpoint import random_hf_tensors, write_tiny_hf
from megatron.gpt_oss.errors import CheckpointError
from tests.harness.models import TINY

EXPERT = "model.layers.1.mlp.experts."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_hf(tmp_path_factory.mktemp("hf") / "tiny", seed=2)


@pytest.fixture(scope="module")
def sharded(folder, tmp_path_factory):
    """The same checkpoint in three files and an index."""
    out = tmp_path_factory.mktemp("hf") / "sharded"
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    weight_map = {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[number::3]}
        save_file(part, out / file)
        weight_map.update(dict.fromkeys(part, file))
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return out


def _copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_reader_gives_the_file_whole_and_in_parts(folder, sharded):
    tensors = load_file(folder / "model.safetensors")
    for reader in (HFReader(folder), HFReader(sharded)):
        reader.check_files()
        assert reader.names() == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(reader.read(name), tensor)
            assert reader.shape(name) == tuple(tensor.shape)
        name = EXPERT + "gate_up_proj"
        index = (3, slice(17, 40), slice(8, 90))
        assert torch.equal(reader.read(name, index), tensors[name][index])
        assert torch.equal(reader.read(name, (3, slice(17, 40))), tensors[name][3, 17:40])


def test_mxfp4_against_transformers():
    """Every code with every scale that a bf16 can hold, against transformers' own expansion."""
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    scales = torch.arange(2, 250, dtype=torch.uint8).reshape(2, 4, 31)
    blocks = torch.randint(0, 256, (2, 4, 31, 16), dtype=torch.uint8)
    blocks[0, 0] = torch.arange(16) * 17 % 256
    ours = dequantize(blocks, scales)
    theirs = mxfp4.convert_moe_packed_tensors(blocks, scales)  # returns [E, in, out]
    assert torch.equal(ours, theirs.transpose(1, 2))
    assert ours.shape == (2, 4, 31 * 32)


def test_mxfp4_by_hand():
    blocks = torch.zeros(1, 16, dtype=torch.uint8)
    blocks[0, 0] = 0xF1  # even element: code 1 = 0.5; odd element: code 15 = -6
    blocks[0, 15] = 0x70  # element 31: code 7 = 6
    values = dequantize(blocks, torch.tensor([129], dtype=torch.uint8))  # exponent 2
    assert values[:2].tolist() == [2.0, -24.0] and values[31] == 24.0 and values[2:31].eq(0).all()


def test_mxfp4_folder_reads_as_bf16(folder, tmp_path):
    """Decided by names: the square down_proj of the published sizes has no telling shape."""
    copy = _copy(folder, tmp_path)
    tensors = load_file(copy / "model.safetensors")
    expected = {}
    for name in list(tensors):
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, fan_in, fan_out = tensors.pop(name).shape
            blocks = torch.randint(0, 256, (experts, fan_out, fan_in // 32, 16), dtype=torch.uint8)
            scales = torch.randint(120, 130, blocks.shape[:3], dtype=torch.uint8)
            tensors[name + "_blocks"], tensors[name + "_scales"] = blocks, scales
            expected[name] = dequantize(blocks, scales).transpose(1, 2)
    save_file(tensors, copy / "model.safetensors")
    reader = HFReader(copy)
    assert set(expected) <= reader.names()
    assert not any(name.endswith(("_blocks", "_scales")) for name in reader.names())
    for name, tensor in expected.items():
        assert torch.equal(reader.read(name), tensor)
        assert reader.shape(name) == tuple(tensor.shape)
        index = (5, slice(31, 66), slice(10, 90))
        assert torch.equal(reader.read(name, index), tensor[index])
    assert torch.equal(reader.read("lm_head.weight"), tensors["lm_head.weight"])


def test_missing_file(sharded, tmp_path):
    copy = _copy(sharded, tmp_path)
    (copy / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="2 of 3 files.*model-00002-of-00003"):
        HFReader(copy).check_files()
    name = next(n for n, f in HFReader(copy)._file_of.items() if "00002" in f)
    with pytest.raises(CheckpointError, match="lacks model-00002"):
        HFReader(copy).read(name)


def test_truncated_file(folder, tmp_path):
    copy = _copy(folder, tmp_path)
    path = copy / "model.safetensors"
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(size - 1000)
    with pytest.raises(CheckpointError, match=rf"{size - 1000} bytes.*truncated"):
        HFReader(copy).check_files()


def test_missing_tensor(folder, tmp_path):
    copy = _copy(folder, tmp_path)
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.3.self_attn.sinks"]
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'model.layers.3.self_attn.sinks'.*3 other layers"):
        HFReader(copy).read("model.layers.3.self_attn.sinks")


def test_no_weights_and_broken_index(folder, tmp_path):
    copy = _copy(folder, tmp_path)
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="neither model.safetensors nor"):
        HFReader(copy)
    (copy / "model.safetensors.index.json").write_text('{"weight_map": ')
    with pytest.raises(CheckpointError, match="not valid JSON"):
        HFReader(copy)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "llama"}, "'llama', not 'gpt_oss'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"swiglu_alpha": 1.0}, "swiglu_alpha = 1.0"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types of 3 layers"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_type = 'linear'"),
        ({"model_type": None}, "'None', not 'gpt_oss'"),
    ],
)
def test_config_of_another_model(change, words):
    config = hf_config_from_preset(TINY) | change
    config = {key: value for key, value in config.items() if value is not None}
    with pytest.raises(CheckpointError) as error:
        check_hf_config(config)
    assert words in str(error.value)
    check_hf_config(hf_config_from_preset(TINY))


def test_config_file_missing_or_broken(folder, tmp_path):
    with pytest.raises(CheckpointError, match="No directory"):
        read_hf_config(tmp_path / "no")
    copy = _copy(folder, tmp_path)
    (copy / "config.json").write_text('{"model_type"')
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_hf_config(copy)


def test_tiny_checkpoint_is_reproducible_and_loads(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    again = write_tiny_hf(tmp_path / "again", seed=2)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    other = write_tiny_hf(again, seed=3)
    assert (other / "model.safetensors").read_bytes() != (folder / "model.safetensors").read_bytes()
    model, info = transformers.GptOssForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    std = torch.cat([p.flatten() for n, p in model.named_parameters() if n.endswith("proj")]).std()
    assert abs(std.item() - 0.02) < 1e-3
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = 'd\u00e9f f(x):\n\treturn "\u65e5\u672c"\r\n'
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token_id == 256 and len(tokenizer) == 257
    assert random_hf_tensors(TINY, 2).keys() == model.state_dict().keys()
