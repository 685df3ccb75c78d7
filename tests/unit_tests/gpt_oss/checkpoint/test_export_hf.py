# Copyright (c) 2026, the megatron-core gptoss authors.

"""Hugging Face to torch_dist to Hugging Face is bit-identical; errors of the export."""

import dataclasses
import json
import logging
import shutil
import warnings

import pytest
import torch

from megatron.core import dist_checkpointing
from megatron.gpt_oss.checkpoint import resumable_output
from megatron.gpt_oss.checkpoint.export_hf import ExportJob, export_hf
from megatron.gpt_oss.checkpoint.hf.config import hf_config_from_preset
from megatron.gpt_oss.checkpoint.hf.reader import HFReader
from megatron.gpt_oss.checkpoint.hf.writer import write_hf as write_from_source
from megatron.gpt_oss.checkpoint.import_hf import convert_to_megatron
from megatron.gpt_oss.checkpoint.load_hf import load_hf, load_hf_hook
from megatron.gpt_oss.checkpoint.model_source import ModelSource
from megatron.gpt_oss.data.byte_tokenizer import write_byte_tokenizer
from megatron.gpt_oss.errors import CheckpointError, UsageError
from tests.harness.models import (
    ODD,
    TINY,
    build_model,
    count_differing,
    mxfp4_tensors,
    trained_tensors,
    write_hf,
    write_mxfp4,
)


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A Hugging Face checkpoint with auxiliary files."""
    config = hf_config_from_preset(ODD, eos_token_id=7) | {"torch_dtype": "bfloat16", "note": "x"}
    folder = tmp_path_factory.mktemp("export") / "hf"
    write_hf(folder, ODD, trained_tensors(ODD), config=config)
    write_byte_tokenizer(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    return folder


@pytest.fixture(scope="module")
def saved(one_rank, hf, tmp_path_factory):
    """The same as a --save directory of Megatron; the vocabulary is padded from 101 to 104 rows."""
    model = build_model(ODD, padded_vocab_size=104, bf16=True)
    model.bfloat16()
    load_hf([model], hf)
    assert model.output_layer.weight[101:].eq(0).all() and model.output_layer.weight.shape[0] == 104
    save = tmp_path_factory.mktemp("export") / "save"
    (save / "iter_0000020").mkdir(parents=True)
    dist_checkpointing.save(model.sharded_state_dict(), str(save / "iter_0000020"))
    (save / "latest_checkpointed_iteration.txt").write_text("20")
    return save


def test_round_trip_bit_for_bit(hf, saved, tmp_path, record_property):
    out = export_hf(saved, tmp_path / "new" / "out", like=hf)
    differing = count_differing(hf, out)
    record_property(
        "parity", ("round trip BF16: differing bytes", "load, save, to-hf", differing, 0)
    )
    assert differing == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["dtype"], config["note"], config["eos_token_id"]) == ("bfloat16", "x", 7)
    assert "torch_dtype" not in config
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (hf / name).read_bytes()
    assert sorted(p.name for p in out.parent.iterdir()) == ["out"]  # no temporary directory left
    assert out.stat().st_mode & 0o055 == 0o055 & ~_umask()


def test_damaged_shard_is_refused(hf, saved, tmp_path):
    """One bit of a tensor that is exported, wherever it is."""
    copy = shutil.copytree(saved, tmp_path / "save")
    shard = max(copy.rglob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    for place in (len(data) // 3, len(data) // 2, len(data) - 5000):
        changed = bytearray(data)
        changed[place] ^= 64
        shard.write_bytes(changed)
        with pytest.raises(
            CheckpointError, match=f"bytes 0 to .* of {shard.name} differ from what"
        ):
            export_hf(copy, tmp_path / "out", like=hf)
    shard.write_bytes(data)
    export_hf(copy, tmp_path / "out", like=hf)


def test_unfinished_save_is_refused(hf, saved, tmp_path):
    copy = shutil.copytree(saved, tmp_path / "save")
    (copy / "iter_0000020" / "manifest.json").write_text('{"version": 2, "state": "writing"}')
    with pytest.raises(CheckpointError, match="the save did not finish"):
        export_hf(copy, tmp_path / "out", like=hf)


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "config.json"])
def test_changed_auxiliary_file_is_refused(hf, tmp_path, name):
    """One that lies next to the checkpoint; --like accepts what a user changed on purpose."""
    saved = convert_to_megatron(hf, tmp_path / "saved")
    file = saved / "hf" / name
    data = file.read_bytes()
    file.write_bytes(data.replace(b"7", b"6", 1))
    assert file.read_bytes() != data
    with pytest.raises(CheckpointError, match=f"hf/{name} is not the file that .gptoss convert"):
        export_hf(saved, tmp_path / "out")
    file.unlink()
    with pytest.raises(CheckpointError, match=f"hf/{name} is not the file"):
        export_hf(saved, tmp_path / "out")
    file.write_bytes(data)
    assert count_differing(hf, export_hf(saved, tmp_path / "out")) == 0
    if name == "tokenizer.json":
        file.write_bytes(data + b"\n")
        export_hf(saved, tmp_path / "changed", like=saved / "hf")


def _umask():
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_shards_and_fp32(hf, saved, tmp_path):
    transformers = pytest.importorskip("transformers")
    out = export_hf(saved / "iter_0000020", tmp_path / "out", hf, "fp32", max_shard_bytes=300_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    present = sorted(p.name for p in out.iterdir() if p.suffix == ".safetensors")
    assert present == files
    original, copy = HFReader(hf), HFReader(out)
    total = 0
    for name in original.names():
        tensor = copy.read(name)
        total += tensor.nbytes
        assert torch.equal(tensor, original.read(name).float()), name
    assert index["metadata"]["total_size"] == total
    _, info = transformers.GptOssForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


def test_config_from_the_shapes(hf, saved, tmp_path):
    """Without a Hugging Face directory to go by: sizes from the tensors, the padding rows stay."""
    out = export_hf(saved, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    expected = hf_config_from_preset(dataclasses.replace(ODD, vocab_size=104))
    for shared in ("sliding_window", "rope_scaling", "initial_context_length"):
        # not in the shapes: as published, where ODD differs
        config.pop(shared), expected.pop(shared)
    assert config == expected
    assert HFReader(out).shape("lm_head.weight") == (104, 80)
    assert not (out / "tokenizer.json").exists()


def test_live_model(one_rank, hf, tmp_path):
    model = load_hf_hook(hf)([build_model(ODD)])[0]
    write_from_source(ModelSource(model), ODD, hf_config_from_preset(ODD), tmp_path)
    assert count_differing(hf, tmp_path) == 0


def test_another_model_is_refused(one_rank, hf, saved, tmp_path):
    deeper = dataclasses.replace(ODD, num_layers=4)
    other = write_hf(tmp_path / "deeper", deeper, trained_tensors(deeper))
    with pytest.raises(CheckpointError, match="num_layers = 3.*has 4"):
        export_hf(saved, tmp_path / "out", like=other)
    assert not (tmp_path / "out").exists()
    wider = dataclasses.replace(ODD, moe_ffn_hidden_size=64)
    other = write_hf(tmp_path / "wider", wider, trained_tensors(wider))
    model = build_model(ODD)
    with pytest.raises(CheckpointError, match="moe_ffn_hidden_size = 64, the model 56"):
        load_hf([model], other)
    (other / "config.json").write_text(json.dumps(hf_config_from_preset(ODD)))
    with pytest.raises(CheckpointError, match=r"gate_up_proj.*\(5, 80, 128\).*\(5, 80, 112\)"):
        load_hf([model], other)
    rotated = dataclasses.replace(ODD, yarn_factor=16.0)
    other = write_hf(tmp_path / "rotated", rotated, trained_tensors(rotated))
    with pytest.raises(CheckpointError, match="yarn_rotary_scaling_factor = 16.0, the model 32.0"):
        load_hf([model], other)


def test_output_folder_is_not_overwritten(hf, saved, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        export_hf(saved, tmp_path, like=hf)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_nothing_stays_of_a_failed_export(hf, saved, tmp_path):
    copy = shutil.copytree(saved, tmp_path / "save")
    largest = max((copy / "iter_0000020").glob("*.distcp"), key=lambda p: p.stat().st_size)
    with open(largest, "r+b") as file:
        file.truncate(largest.stat().st_size // 3)
    with pytest.raises(CheckpointError, match="is not a complete checkpoint: .* has .* bytes, exp"):
        export_hf(copy, tmp_path / "out", like=hf)
    assert [p.name for p in tmp_path.iterdir()] == ["save"]


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "mxfp4"])
def test_transformers_says_nothing(tmp_path, dtype, caplog):
    """from_pretrained of an export: no missing or unexpected key, no warning, no log line."""
    transformers = pytest.importorskip("transformers")
    source = write_hf(tmp_path / "hf", TINY, trained_tensors(TINY))
    write_byte_tokenizer(source)
    convert_to_megatron(source, tmp_path / "megatron")
    out = export_hf(tmp_path / "megatron", tmp_path / "out", dtype=dtype)
    options = {}
    if dtype == "mxfp4":  # or it asks for the accelerate package
        options["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _, info = transformers.AutoModelForCausalLM.from_pretrained(
                out, output_loading_info=True, **options
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    finally:
        logger.removeHandler(caplog.handler)
    assert not any(info.values()), info
    # Of MXFP4 on a machine without its kernels it always says that it expands it.
    said = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert not [r for r in said if dtype != "mxfp4" or "We will dequantize" not in r.getMessage()]
    assert tokenizer.decode(tokenizer("Once").input_ids) == "Once"


def test_mxfp4_loads_in_transformers(tmp_path, record_property):
    """As published: two files of the same names, blocks and scales, what transformers expects."""
    transformers = pytest.importorskip("transformers")
    source = write_mxfp4(tmp_path / "hf", TINY, mxfp4_tensors(trained_tensors(TINY)))
    convert_to_megatron(source, tmp_path / "megatron")
    out = export_hf(tmp_path / "megatron", tmp_path / "out", dtype="mxfp4")
    for name in (p.name for p in source.iterdir()):
        assert (out / name).is_file(), name
    index, original = (
        json.loads((f / "model.safetensors.index.json").read_text()) for f in (out, source)
    )
    assert index["weight_map"] == original["weight_map"]
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "mxfp4"
    assert config["dtype"] == "bfloat16"
    differing = count_differing(source, out)
    what = "round trip MXFP4: differing bytes of its BF16 values"
    record_property("parity", (what, "to-megatron, to-hf mxfp4", differing, 0))
    assert differing == 0  # random blocks are representable: the same values come back
    model, info = transformers.GptOssForCausalLM.from_pretrained(
        out,
        quantization_config=transformers.Mxfp4Config(dequantize=True),
        output_loading_info=True,
    )
    assert not any(info.values()), info
    reader = HFReader(source)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, reader.read(name)), name


def test_mxfp4_of_trained_weights_is_the_nearest(tmp_path):
    """BF16 -> MXFP4 -> BF16 moves a value by half a step at most, and a second time by nothing."""
    source = write_hf(tmp_path / "hf", TINY, trained_tensors(TINY))
    convert_to_megatron(source, tmp_path / "megatron")
    once = export_hf(tmp_path / "megatron", tmp_path / "once", dtype="mxfp4")
    convert_to_megatron(once, tmp_path / "again")
    twice = export_hf(tmp_path / "again", tmp_path / "twice", dtype="mxfp4")
    assert count_differing(once, twice) == 0
    first, second = HFReader(source), HFReader(once)
    for name in first.names():
        before, after = first.read(name).double(), second.read(name).double()
        if name.endswith("_proj") and "experts" in name:
            blocks = before.mT.unflatten(-1, (-1, 32))  # along the inputs
            scale = torch.exp2(torch.floor(torch.log2(blocks.abs().amax(-1, keepdim=True))) - 2)
            # Steps of 2 from 4 on; what lies above 6 becomes 6, so that 8 is off by 2.
            error = (after.mT.unflatten(-1, (-1, 32)) - blocks).abs() / scale
            assert 0 < error.max() < 2 and error[blocks.abs() <= 6 * scale].max() <= 1
            assert error[blocks.abs() <= 2 * scale].max() <= 0.25
        else:
            assert torch.equal(before, after), name


def test_mxfp4_refuses(one_rank, hf, saved, tmp_path):
    with pytest.raises(UsageError, match="80 inputs, and MXFP4 needs multiples of 32"):
        export_hf(saved, tmp_path / "out", like=hf, dtype="mxfp4")
    tensors = trained_tensors(TINY)
    tensors["model.layers.1.mlp.experts.down_proj"][2, 5, 7] = torch.inf
    convert_to_megatron(write_hf(tmp_path / "hf", TINY, tensors), tmp_path / "megatron")
    with pytest.raises(
        CheckpointError, match="layers.1.mlp.experts.down_proj' .*expert 2,.*finite"
    ):
        export_hf(tmp_path / "megatron", tmp_path / "out", dtype="mxfp4")
    assert not (tmp_path / "out").exists()


def test_a_killed_export_goes_on(saved, tmp_path):
    """Finished files are kept, and the result equals that of an export that was not killed."""
    from tests.unit_tests.gpt_oss.checkpoint.test_import_hf import run_until_killed

    whole = export_hf(saved, tmp_path / "whole", max_shard_bytes=200_000)
    out = tmp_path / "out"
    killed = run_until_killed("to-hf", saved, out, 40)
    assert killed.returncode == -9 and not out.exists()
    assert not (tmp_path / ".out.partial" / "config.json").exists()
    finished = run_until_killed("to-hf", saved, out, 10**6)
    assert finished.returncode == 0, finished.stderr
    plan = ExportJob(saved, max_shard_bytes=200_000).plan
    total = sum(len(plan.pieces(file)) for file in plan.files)
    assert total - 40 <= int(finished.stdout) < total
    for path in whole.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in whole.iterdir())


def test_no_room(hf, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(resumable_output, "free_space", lambda path: 10**6)
    with pytest.raises(UsageError, match="out needs 0.07 GB on disk, 0.00 GB are free"):
        export_hf(saved, tmp_path / "out", like=hf)
    assert not list(tmp_path.iterdir())


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="No directory"):
        export_hf(tmp_path / "no", tmp_path / "out")
    with pytest.raises(CheckpointError, match="no .metadata"):
        export_hf(tmp_path, tmp_path / "out")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("30")
    with pytest.raises(CheckpointError, match="iter_0000030"):
        export_hf(tmp_path, tmp_path / "out")
