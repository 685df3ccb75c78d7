# Copyright (c) 2026, the megatron-core gptoss authors.

"""Damaged and foreign input to conversions: one sentence with file, tensor, found and expected.

Nothing is written, and nothing of what was there is changed.
"""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.gpt_oss import cli
from megatron.gpt_oss.arguments.parse import read
from megatron.gpt_oss.checkpoint.export_hf import export_hf
from megatron.gpt_oss.checkpoint.import_hf import convert_to_megatron
from megatron.gpt_oss.errors import UsageError
from tests.harness.models import TINY, mxfp4_tensors, trained_tensors, write_mxfp4

FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (0, 1))
EXPERTS = "model.layers.0.mlp.experts."
ROUTER = "model.layers.2.mlp.router.weight"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    tensors = mxfp4_tensors(trained_tensors(TINY))
    return write_mxfp4(tmp_path_factory.mktemp("bad") / "hf", TINY, tensors)


def _alter(folder, name, change):
    """Replace a tensor in its file; a change of None removes it."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"].get(name, SECOND)
    tensors = load_file(file)
    tensors[name] = change(tensors.get(name)) if change else None
    save_file({k: v for k, v in tensors.items() if v is not None}, file)


def _missing_shard(folder):
    (folder / SECOND).unlink()


def _truncated(folder):
    with open(folder / SECOND, "r+b") as file:
        file.truncate(file.seek(0, 2) - 1)


def _wrong_dtype(folder):
    _alter(folder, ROUTER, lambda t: t.to(torch.float16))


def _blocks_of_another_dtype(folder):
    _alter(folder, EXPERTS + "down_proj_blocks", lambda t: t.to(torch.int16))


def _wrong_shape(folder):
    _alter(folder, ROUTER, lambda t: t[:, :-1].contiguous())


def _wrong_blocks(folder):
    _alter(folder, EXPERTS + "down_proj_scales", lambda t: t[:, :, :-1].contiguous())


def _extra_tensor(folder):
    _alter(folder, "model.layers.4.self_attn.q_norm.weight", lambda _: torch.ones(64))


def _nan_scale(folder):
    def change(scales):
        scales[3, 5, 1] = 255
        return scales

    _alter(folder, EXPERTS + "gate_up_proj_scales", change)


def _overflow(folder):
    _alter(folder, EXPERTS + "down_proj_scales", lambda t: torch.full_like(t, 254))


def _not_in_its_file(folder):
    _alter(folder, ROUTER, None)


def _another_model(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen3_moe"}))


def _other_sizes(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": 5, "layer_types": None}
    (folder / "config.json").write_text(json.dumps(config))


def _damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": ')


def _unreadable_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()


CASES = {
    _missing_shard: ["1 of 2 files of its index", f"missing: {SECOND}"],
    _truncated: [f"/{SECOND} (", "bytes) is damaged or truncated (expected ", "from its header"],
    _wrong_dtype: [f"'{ROUTER}' has dtype F16, expected BF16 or F32", ".safetensors"],
    _blocks_of_another_dtype: [f"'{EXPERTS}down_proj_blocks' has dtype I16, expected U8", FIRST],
    _wrong_shape: [f"'{ROUTER}' has shape (8, 127), expected (8, 128)", ".safetensors"],
    _wrong_blocks: [
        f"'{EXPERTS}down_proj_scales' has shape (8, 128, 2), expected (8, 128, 3)",
        FIRST,
    ],
    _extra_tensor: [
        f"{SECOND} holds 'model.layers.4.self_attn.q_norm.weight', which gpt-oss does not have",
        "expected the 79 tensors of 4 layers",
    ],
    _nan_scale: [
        f"{FIRST}: '{EXPERTS}gate_up_proj_scales' has 255 at [3, 5, 1] (NaN); expected 252 at most"
    ],
    _overflow: [f"'{EXPERTS}down_proj_scales' has 254 at [0, 0, 0], and its block overflows"],
    _not_in_its_file: [f"does not hold '{ROUTER}', which its index lists"],
    _another_model: ["config.json describes a model of type 'qwen3_moe', not 'gpt_oss'"],
    _other_sizes: ["has no tensor 'model.layers.4.input_layernorm.weight'", "in 4 other layers"],
    _damaged_tokenizer: ["/tokenizer.json is not a tokenizer", "EOF while parsing"],
    _unreadable_tokenizer: ["/tokenizer.json is not a file"],
}


@pytest.mark.parametrize("damage", CASES, ids=lambda damage: damage.__name__.strip("_"))
def test_one_sentence(published, tmp_path, damage, capsys):
    source = shutil.copytree(published, tmp_path / "hf")
    damage(source)
    before = {path: path.read_bytes() for path in source.iterdir() if path.is_file()}
    with pytest.raises(SystemExit) as error:
        cli.main(["convert", "to-megatron", "--hf", str(source), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and len(printed) == 1
    for words in (str(source), *CASES[damage]):
        assert words in printed[0], printed[0]
    assert sorted(os.listdir(tmp_path)) == ["hf"]
    assert before == {path: path.read_bytes() for path in source.iterdir() if path.is_file()}


def test_the_source_itself_is_well(published, tmp_path):
    convert_to_megatron(published, tmp_path / "out")


def test_output_folder_is_not_empty(published, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(UsageError, match="out exists and is not empty"):
        convert_to_megatron(published, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["mine"] and os.listdir(tmp_path) == ["out"]
    (tmp_path / "out" / "mine").unlink()
    convert_to_megatron(published, tmp_path / "out")  # an empty one is taken


def test_a_tokenizer_path_that_is_not_utf_8(tmp_path):
    """Python has such a path also for one in UTF-8, under LC_ALL=C PYTHONUTF8=0."""
    path = tmp_path / os.fsdecode(b"\xff")
    path.mkdir()
    (path / "tokenizer.json").touch()
    with pytest.raises(UsageError, match="--tokenizer-model .* is not UTF-8.*LC_ALL=C.UTF-8"):
        read(["--preset", "tiny", "--mock-data", "--tokenizer-model", str(path)])


def test_a_tokenizer_beside_the_checkpoint_is_looked_at_first(published, tmp_path):
    convert_to_megatron(published, tmp_path / "out")
    (tmp_path / "out" / "hf" / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match="out/hf/tokenizer.json is not the file that"):
        export_hf(tmp_path / "out", tmp_path / "back")
    assert os.listdir(tmp_path) == ["out"]
