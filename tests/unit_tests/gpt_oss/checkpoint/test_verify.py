# Copyright (c) 2026, the megatron-core gptoss authors.

"""`gptoss verify` names changed tensors, layers and tokens of a checkpoint."""

import dataclasses
import importlib.util

import pytest
import torch

from megatron.gpt_oss import cli
from megatron.gpt_oss.checkpoint import verify as verify_module
from megatron.gpt_oss.checkpoint.import_hf import convert_to_megatron
from megatron.gpt_oss.checkpoint.torch_dist.layout import ParallelSizes
from megatron.gpt_oss.checkpoint.verify import verify
from megatron.gpt_oss.errors import CheckpointError
from tests.harness.models import (
    TINY,
    mxfp4_tensors,
    trained_tensors,
    write_hf,
    write_mxfp4,
)

PRESET = dataclasses.replace(TINY, num_layers=3)


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("verify") / "hf", PRESET, trained_tensors(PRESET))


def _altered(tmp_path, change):
    """A checkpoint of the same weights but for what `change` does to them."""
    tensors = {k: v.to(torch.bfloat16) for k, v in trained_tensors(PRESET).items()}
    change(tensors)
    return convert_to_megatron(write_hf(tmp_path / "x", PRESET, tensors), tmp_path / "m")


def test_the_same(hf, tmp_path, capsys):
    convert_to_megatron(hf, tmp_path / "m", ParallelSizes(pp=3, ep=2))
    cli.main(["verify", "--hf", str(hf), "--load", str(tmp_path / "m"), "--num-tokens", "40"])
    printed = capsys.readouterr().out
    assert "tensors: all 54 are the same, bit for bit" in printed
    assert "logits: the same as transformers, 40 tokens, error" in printed


def test_mxfp4_is_the_same(tmp_path, capsys):
    hf = write_mxfp4(tmp_path / "hf", PRESET, mxfp4_tensors(trained_tensors(PRESET)))
    convert_to_megatron(hf, tmp_path / "m")
    assert verify(hf, tmp_path / "m")
    assert "the same as transformers" in capsys.readouterr().out


def test_one_value_of_one_expert(hf, tmp_path, capsys):
    def change(tensors):
        tensors["model.layers.2.mlp.experts.down_proj"][3, 7, 11] = 100.0
        tensors["model.layers.1.mlp.experts.gate_up_proj"][5, 2, 9] += 1.0
        tensors["model.layers.1.mlp.experts.gate_up_proj"][6, 2, 9] += 2.0

    checkpoint = _altered(tmp_path, change)
    with pytest.raises(SystemExit) as error:
        cli.main(["verify", "--hf", str(hf), "--load", str(checkpoint)])
    assert error.value.code == 1
    printed = capsys.readouterr().out
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert f"2 of 54 differ. First difference: {name} (layer 1) at [5, 2, 9]: " in printed
    value = trained_tensors(PRESET)[name][5, 2, 9].to(torch.bfloat16).item()
    assert f"{value:.8g} in the Hugging Face model" in printed
    assert "largest difference 2" in printed


def test_layer_and_token_of_the_logits(hf, tmp_path, capsys):
    """The embedding of one token differs: from its place in the sequence on, in layer 0."""
    ids = torch.randint(PRESET.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    place = next(i for i in range(20, 64) if (ids[0] == ids[0, i]).nonzero()[0] == i)

    def change(tensors):
        tensors["model.embed_tokens.weight"][ids[0, place]] *= -1

    assert not verify(hf, _altered(tmp_path, change))
    printed = capsys.readouterr().out
    assert f"First difference: model.embed_tokens.weight at [{int(ids[0, place])}, 0]" in printed
    assert f"Hidden states differ first after layer 0, at token {place}." in printed
    assert f"Logits differ first at token {place}." in printed


def test_deeper_layer(hf, tmp_path, capsys):
    def change(tensors):
        tensors["model.layers.2.self_attn.sinks"] += 3

    assert not verify(hf, _altered(tmp_path, change))
    printed = capsys.readouterr().out
    assert "model.layers.2.self_attn.sinks (layer 2) at [0]" in printed
    assert "Hidden states differ first after layer 2, at token 0" in printed


def test_without_transformers(hf, tmp_path, capsys, monkeypatch):
    convert_to_megatron(hf, tmp_path / "m")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        verify_module.importlib.util,
        "find_spec",
        lambda name: None if name == "transformers" else find_spec(name),
    )
    assert verify(hf, tmp_path / "m")
    assert "the same as Megatron with the Hugging Face weights" in capsys.readouterr().out


def test_too_large_for_logits(hf, tmp_path, capsys, monkeypatch):
    convert_to_megatron(hf, tmp_path / "m")
    memory = type("memory", (), {"available": 10**6})
    monkeypatch.setattr(verify_module.psutil, "virtual_memory", lambda: memory)
    assert verify(hf, tmp_path / "m")
    assert "logits: not compared" in capsys.readouterr().out


def test_other_sizes(hf, tmp_path):
    deeper = dataclasses.replace(PRESET, num_layers=2)
    other = write_hf(tmp_path / "x", deeper, trained_tensors(deeper))
    convert_to_megatron(other, tmp_path / "m")
    with pytest.raises(CheckpointError, match="num_layers = 2.*has 3"):
        verify(hf, tmp_path / "m")
