# Copyright (c) 2026, the megatron-core gptoss authors.

"""--yarn-factor extends the published context, from training to config.json."""

import dataclasses
import json
import shutil

import pytest
import torch

from megatron.gpt_oss.arguments.parse import read
from megatron.gpt_oss.checkpoint.export_hf import export_hf
from megatron.gpt_oss.errors import CheckpointError, UsageError
from megatron.gpt_oss.presets import extend_context, get_preset
from tests.harness import runs
from tests.harness.models import TINY, trained_tensors, write_hf

FACTOR = 64.0
FLAGS = "--train-iters 2 --yarn-factor 64"


@pytest.fixture(scope="module")
def run(ranks, inputs, tmp_path_factory):
    """The directory of a run whose published model has factor 32."""
    folder = tmp_path_factory.mktemp("yarn") / "run"
    runs.start(ranks, inputs, folder, FLAGS)
    return folder


def test_logits_against_transformers(make_model, tmp_path):
    """Far beyond the published context, where the angles of the two factors differ."""
    transformers = pytest.importorskip("transformers")
    preset = dataclasses.replace(TINY, yarn_original_max_position_embeddings=24)
    longer = extend_context(preset, FACTOR)
    folder = write_hf(tmp_path / "hf", longer, trained_tensors(longer))
    reference = transformers.GptOssForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    from megatron.gpt_oss.checkpoint.load_hf import load_hf

    published = write_hf(tmp_path / "published", preset, trained_tensors(preset))
    model = make_model(longer, seq_length=1000, max_position_embeddings=2000)
    with pytest.raises(CheckpointError, match="yarn_rotary_scaling_factor = 32.0, the model 64.0"):
        load_hf([model], published)
    load_hf([model], published, yarn_factor=FACTOR)
    ids = torch.randint(0, 256, (1, 1000), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(ids).logits
        found = model(ids, torch.arange(1000)[None], None)
        unextended = make_model(preset, seq_length=1000, max_position_embeddings=2000)
        load_hf([unextended], published)
        other = unextended(ids, torch.arange(1000)[None], None)
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert (other - expected).norm() > 1e-2 * expected.norm()  # the factor matters here


def test_export_writes_the_factor_of_training(run, inputs, tmp_path):
    out = export_hf(run / "checkpoints", tmp_path / "out", like=inputs / "hf")
    config = json.loads((out / "config.json").read_text())
    assert config["rope_scaling"]["factor"] == FACTOR
    assert config["max_position_embeddings"] == 262_144
    before = json.loads((inputs / "hf" / "config.json").read_text())
    assert before["rope_scaling"]["factor"] == 32
    for name in before.keys() - {"rope_scaling", "max_position_embeddings", "dtype"}:
        assert config[name] == before[name], name


def test_export_of_a_checkpoint_that_was_moved(run, inputs, tmp_path):
    """No arguments.json next to it: the flag says it."""
    moved = shutil.copytree(run / "checkpoints", tmp_path / "elsewhere" / "save")
    out = export_hf(moved, tmp_path / "out", like=inputs / "hf", yarn_factor=FACTOR)
    assert json.loads((out / "config.json").read_text())["rope_scaling"]["factor"] == FACTOR


@pytest.mark.parametrize(
    "words, message",
    [
        ("--preset 20b --yarn-factor 16", "--yarn-factor 16: --preset 20b already has 32"),
        ("--preset 20b --yarn-factor nan", "--yarn-factor nan"),
        ("--preset none --yarn-factor 64", "--preset is 'none'"),
        ("--preset 20b --rotary-scaling-factor 64", "To extend the context give --yarn-factor 64"),
    ],
)
def test_refused(words, message):
    with pytest.raises(UsageError, match=message):
        read(words.split())


def test_extended():
    longer = extend_context(get_preset("20b"), FACTOR)
    assert (longer.yarn_factor, longer.max_position_embeddings) == (64.0, 262_144)
    assert extend_context(get_preset("20b"), None) == get_preset("20b")
