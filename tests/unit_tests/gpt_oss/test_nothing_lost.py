# Copyright (c) 2026, the megatron-core gptoss authors.

"""Conversions and `verify` of models that differ in rows, tensors, files, constants or dtypes."""

import dataclasses
import functools
import json
import shutil
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.gpt_oss import cli
from megatron.gpt_oss.checkpoint import verify as verify_module
from megatron.gpt_oss.checkpoint.export_hf import export_hf
from megatron.gpt_oss.checkpoint.hf.config import hf_config_from_preset
from megatron.gpt_oss.checkpoint.hf.reader import HFReader
from megatron.gpt_oss.checkpoint.import_hf import convert_to_megatron
from megatron.gpt_oss.checkpoint.load_hf import load_hf
from megatron.gpt_oss.errors import CheckpointError
from megatron.gpt_oss.presets import preset_flags
from tests.harness.models import (
    ODD,
    build_model,
    count_differing,
    trained_tensors,
    write_hf,
)

# Logits are for a process without a process group.
verify = functools.partial(verify_module.verify, logits="no")
GROWN = dataclasses.replace(ODD, vocab_size=111)


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("lost") / "hf", ODD, trained_tensors(ODD))


@pytest.fixture(scope="module")
def grown(hf, tmp_path_factory):
    """The same with ten rows more, as resize_token_embeddings gives them."""
    tensors = trained_tensors(ODD)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat((tensors[name], torch.randn(10, ODD.hidden_size)))
    return write_hf(tmp_path_factory.mktemp("lost") / "grown", GROWN, tensors)


@pytest.fixture
def save(one_rank, hf, tmp_path):
    """save(arguments, change=None, **megatron_arguments) -> a checkpoint as a run saves it."""

    def save(arguments, change=None, **overrides):
        model = build_model(ODD, bf16=True, **overrides).bfloat16()
        load_hf([model], hf)
        state = {"model": model.sharded_state_dict()}
        if change is not None:
            change(model, state["model"])
        if arguments is not None:
            state["args"] = Namespace(**preset_flags(ODD) | arguments)
        folder = tmp_path / "save" / "iter_0000020"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        dist_checkpointing.save(state, str(folder))
        (folder.parent / "latest_checkpointed_iteration.txt").write_text("20")
        return folder.parent

    return save


def _rows(folder):
    config = json.loads((folder / "config.json").read_text())
    shapes = {HFReader(folder).shape(n) for n in ("lm_head.weight", "model.embed_tokens.weight")}
    assert shapes == {(config["vocab_size"], ODD.hidden_size)}
    return config["vocab_size"]


def test_grown_rows_survive(hf, grown, tmp_path, capsys):
    convert_to_megatron(grown, tmp_path / "m")
    assert not verify(hf, tmp_path / "m")
    printed = capsys.readouterr().out
    assert "101 rows in the Hugging Face model, 111 in the Megatron checkpoint" in printed
    assert "rows 101 to 110 are missing" in printed and "bit for bit" not in printed
    out = tmp_path / "out"
    cli.main(f"convert to-hf --load {tmp_path}/m --like {hf} --out {out}".split())
    assert "vocabulary: 111 rows" in capsys.readouterr().out
    assert _rows(out) == 111 and count_differing(grown, out) == 0
    assert verify(out, tmp_path / "m")
    assert "bit for bit" in capsys.readouterr().out
    few = export_hf(tmp_path / "m", tmp_path / "few", like=hf, vocab_size=101)
    assert _rows(few) == 101 and count_differing(hf, few) == 0


def test_fewer_rows_than_the_folder(hf, grown, tmp_path, capsys):
    convert_to_megatron(hf, tmp_path / "m")
    with pytest.raises(CheckpointError, match="101 rows of vocabulary.*111"):
        export_hf(tmp_path / "m", tmp_path / "out", like=grown)
    assert not verify(grown, tmp_path / "m")
    assert "rows 101 to 110 are missing" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="--vocab-size 200: the checkpoint has 101"):
        export_hf(tmp_path / "m", tmp_path / "out", vocab_size=200)


def test_padding_is_no_token(hf, save, tmp_path, capsys):
    """Trained padding, which is not zero: the arguments of the run tell it from tokens."""

    def train(model, state):
        model.output_layer.weight[101:].data.fill_(0.5)
        model.embedding.word_embeddings.weight[101:].data.fill_(0.5)

    arguments = {"make_vocab_size_divisible_by": 8, "tensor_model_parallel_size": 1}
    known = save(arguments | {"tokenizer_vocab_size": 101}, train, padded_vocab_size=104)
    assert _rows(export_hf(known, tmp_path / "like", like=hf)) == 101
    assert _rows(export_hf(known, tmp_path / "alone")) == 101
    assert verify(hf, known)
    assert "rows 101 to 103 of the Megatron checkpoint are padding" in capsys.readouterr().out
    # The directory has rows beyond the tokenizer's: they are kept, as it has them.
    fewer = save(arguments | {"tokenizer_vocab_size": 99}, train, padded_vocab_size=104)
    assert _rows(export_hf(fewer, tmp_path / "fewer", like=hf)) == 101
    # The tokenizer grew beyond the directory's rows.
    more = save(arguments | {"tokenizer_vocab_size": 103}, train, padded_vocab_size=104)
    assert _rows(export_hf(more, tmp_path / "more", like=hf)) == 103
    assert not verify(hf, more)
    # Not the size that padding would have given: whoever asked for it has his rows.
    exact = save(arguments | {"tokenizer_vocab_size": 90}, train, padded_vocab_size=104)
    assert _rows(export_hf(exact, tmp_path / "exact", like=hf)) == 104
    unknown = save(arguments, train, padded_vocab_size=104)
    with pytest.raises(CheckpointError, match="--vocab-size 101 or --vocab-size 104"):
        export_hf(unknown, tmp_path / "unknown", like=hf)
    assert not verify(hf, unknown)
    for rows in (101, 104):
        out = export_hf(unknown, tmp_path / str(rows), like=hf, vocab_size=rows)
        assert _rows(out) == rows
    assert (
        _rows(export_hf(save(None, train, padded_vocab_size=104), tmp_path / "all", like=hf)) == 104
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"rotary_base": 10000}, "rotary_base"),
        ({"window_size": (7, 0)}, "window_size"),
        ({"window_attn_skip_freq": [1, 1, 0]}, "window_attn_skip_freq"),
        ({"rotary_scaling_factor": 16.0}, "rotary_scaling_factor"),
        ({"yarn_attention_factor": 1.0}, "yarn_attention_factor"),
        ({"moe_router_topk": 2}, "moe_router_topk"),
        ({"layernorm_epsilon": 1e-6}, "layernorm_epsilon"),
        ({"activation_func_clamp_value": 3.0}, "activation_func_clamp_value"),
    ],
)
def test_constants_of_the_run(hf, save, tmp_path, capsys, arguments, words):
    """The weights are the same, the function is not."""
    checkpoint = save(arguments)
    with pytest.raises(CheckpointError, match=f"was trained with {words} = "):
        export_hf(checkpoint, tmp_path / "out", like=hf)
    assert not verify(hf, checkpoint)
    assert f"config: {words} is " in capsys.readouterr().out
    out = export_hf(checkpoint, tmp_path / "out")  # its config is that of the run
    assert verify(out, checkpoint)


def test_same_constants_in_other_words(hf, save, tmp_path):
    again = save(
        {"window_attn_skip_freq": [1, 0, 1], "window_size": [15, 0], "moe_layer_freq": [1, 1, 1]}
    )
    assert verify(hf, again)
    assert count_differing(hf, export_hf(again, tmp_path / "out", like=hf)) == 0


def test_a_function_that_hugging_face_cannot_say(save, tmp_path):
    with pytest.raises(CheckpointError, match="position_embedding_type = rope, gpt-oss has yarn"):
        export_hf(save({"position_embedding_type": "rope"}), tmp_path / "out")
    with pytest.raises(CheckpointError, match="rotary_percent = 0.5"):
        export_hf(save({"rotary_percent": 0.5}), tmp_path / "out")


def test_logits_are_those_of_the_run(one_rank, hf, save, capsys):
    from megatron.core import parallel_state

    checkpoint = save({"rotary_base": 10000})
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    try:
        assert not verify_module.verify(hf, checkpoint, logits="yes")
    finally:
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
        parallel_state.initialize_model_parallel()
    assert "logits: not those of transformers" in capsys.readouterr().out


@pytest.mark.parametrize(
    "key", ["mtp.layers.0.weight", "decoder.layers.mlp.router.expert_bias", "output_layer.bias"]
)
def test_a_tensor_without_counterpart(hf, save, tmp_path, key):
    def add(model, state):
        state["extra"] = ShardedTensor.from_rank_offsets(key, torch.ones(3), replica_id=0)

    checkpoint = save({}, add)
    with pytest.raises(CheckpointError, match=f"'{key}'.*would lose it"):
        export_hf(checkpoint, tmp_path / "out", like=hf)
    with pytest.raises(CheckpointError, match=f"'{key}'"):
        verify(hf, checkpoint)


def test_a_missing_tensor(hf, save, tmp_path):
    def drop(model, state):
        for layer in range(ODD.num_layers):
            del state[f"decoder.layers.{layer}.mlp.router.bias"]

    checkpoint = save({}, drop)
    with pytest.raises(CheckpointError, match="mlp.router.bias"):
        export_hf(checkpoint, tmp_path / "out", like=hf)
    with pytest.raises(CheckpointError, match="mlp.router.bias"):
        verify(hf, checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        {"num_experts": 6},
        {"hidden_size": 96},
        {"num_layers": 2},
        {"num_attention_heads": 9},
        {"num_query_groups": 6},
        {"head_dim": 32},
        {"moe_ffn_hidden_size": 40},
    ],
    ids=str,
)
def test_every_size(hf, tmp_path, change):
    other = dataclasses.replace(ODD, **change)
    convert_to_megatron(write_hf(tmp_path / "x", other, trained_tensors(other)), tmp_path / "m")
    with pytest.raises(CheckpointError, match="Give the Hugging Face checkpoint"):
        export_hf(tmp_path / "m", tmp_path / "out", like=hf)
    with pytest.raises(CheckpointError, match="Give the Hugging Face checkpoint"):
        verify(hf, tmp_path / "m")


def test_dtypes(hf, tmp_path, capsys):
    """Equal values in a wider dtype are reported; other values are a difference."""
    tensors = {k: v.to(torch.bfloat16) for k, v in trained_tensors(ODD).items()}
    wide = write_hf(tmp_path / "wide", ODD, tensors, torch.float32)
    convert_to_megatron(wide, tmp_path / "m")
    assert verify(hf, tmp_path / "m")
    assert (
        "BF16 in the Hugging Face model, F32 in the Megatron checkpoint" in capsys.readouterr().out
    )
    exact = write_hf(tmp_path / "exact", ODD, trained_tensors(ODD), torch.float32)
    convert_to_megatron(exact, tmp_path / "m32")
    assert not verify(hf, tmp_path / "m32")


def _second_file(folder, name="other.safetensors"):
    save_file({"model.norm.weight": torch.ones(80)}, folder / name)


def _sharded(folder):
    """Two files and an index, as large models have them."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[:20], "b.safetensors": names[20:]}
    for file, part in files.items():
        save_file({n: tensors[n] for n in part}, folder / file)
    weight_map = {n: f for f, part in files.items() for n in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors, files


def _single_beside_index(folder):
    tensors, _ = _sharded(folder)
    save_file(tensors, folder / "model.safetensors")


def _twice(folder):
    tensors, files = _sharded(folder)
    again = {n: tensors[n] for n in files["a.safetensors"] + ["model.norm.weight"]}
    save_file(again, folder / "a.safetensors")


def _promised(folder):
    _sharded(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.0.extra"] = "a.safetensors"
    path.write_text(json.dumps(index))


def _adapter(folder):
    (folder / "adapter_config.json").write_text("{}")


def _more_layers(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.self_attn.sinks"] = torch.zeros(6, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")


def _more_rows(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.cat((tensors["lm_head.weight"],) * 2)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "change, words",
    [
        (_second_file, "other.safetensors"),
        (_single_beside_index, "transformers reads it instead"),
        (_twice, "'model.norm.weight'.*One tensor in two files"),
        (_promised, "model.layers.0.extra"),
        (_adapter, "adapter_config.json"),
        (_more_layers, "'model.layers.3.self_attn.sinks'"),
        (_more_rows, r"'lm_head.weight' has shape \(202, 80\)"),
    ],
)
def test_what_a_folder_holds_besides(one_rank, hf, tmp_path, change, words):
    """Refused by name wherever the directory is read."""
    copy = shutil.copytree(hf, tmp_path / "copy")
    change(copy)
    with pytest.raises(CheckpointError, match=words):
        convert_to_megatron(copy, tmp_path / "m")
    with pytest.raises(CheckpointError, match=words):
        load_hf([build_model(ODD)], copy)
    convert_to_megatron(hf, tmp_path / "whole")
    with pytest.raises(CheckpointError, match=words):
        verify(copy, tmp_path / "whole")


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"padded_vocab_size": 100}, "101 rows of vocabulary, the model 100"),
        ({"rotary_base": 10000}, "rotary_base = 150000, the model 10000"),
        ({"yarn_attention_factor": 1.0}, "yarn_attention_factor = None, the model 1.0"),
        ({"window_attn_skip_freq": [1, 1, 0]}, r"windowed layers = \[0, 2\], the model \[0, 1\]"),
        ({"position_embedding_type": "none"}, "position_embedding_type = yarn, the model none"),
    ],
)
def test_load_hf_into_another_model(one_rank, hf, arguments, words):
    with pytest.raises(CheckpointError, match=words):
        load_hf([build_model(ODD, **arguments)], hf)


def test_the_config_of_to_hf_is_read_alike(hf, tmp_path):
    """A config that says what ours would leave to defaults comes back as it was."""
    config = hf_config_from_preset(ODD)
    rope = config.pop("rope_scaling") | {"attention_factor": 0.7, "rope_theta": 5000.0}
    del rope["original_max_position_embeddings"], config["rope_theta"], rope["truncate"]
    config |= {"rope_parameters": rope, "max_position_embeddings": 77}
    source = write_hf(tmp_path / "hf", ODD, trained_tensors(ODD), config=config)
    convert_to_megatron(source, tmp_path / "m")
    for number, like in enumerate((source, None)):
        out = export_hf(tmp_path / "m", tmp_path / f"out{number}", like=like)
        assert json.loads((out / "config.json").read_text())["rope_parameters"] == rope
        assert verify(out, tmp_path / "m")
    shutil.rmtree(tmp_path / "m" / "hf")  # neither a directory to go by nor its copy
    out = export_hf(tmp_path / "m", tmp_path / "alone")
    assert verify(out, tmp_path / "m") and verify(source, tmp_path / "m")
