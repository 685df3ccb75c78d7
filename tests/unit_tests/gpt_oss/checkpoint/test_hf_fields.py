# Copyright (c) 2026, the megatron-core gptoss authors.

"""Every field of config.json: same logits as transformers, or an error that names the field."""

import dataclasses
import os
import random
import re
from pathlib import Path

import pytest
import torch

from megatron.gpt_oss.checkpoint.hf import fields as hf_fields
from megatron.gpt_oss.checkpoint.hf.check import open_hf
from megatron.gpt_oss.checkpoint.hf.config import (
    hf_config_from_preset,
    preset_from_hf_config,
    read_hf_config,
)
from megatron.gpt_oss.checkpoint.hf.writer import QUANTIZATION_CONFIG
from megatron.gpt_oss.errors import UsageError
from tests.harness.hf_variations import (
    ABSENT,
    LENGTH,
    draw,
    our_logits,
    transformers_logits,
    varied,
    write_config,
)
from tests.harness.models import (
    TINY,
    mxfp4_tensors,
    trained_tensors,
    write_hf,
    write_mxfp4,
)

ROOT = Path(__file__).resolve().parents[4]
LIMIT = 1e-4
SWEEP = int(os.environ.get("HF_CONFIG_SWEEP", "10"))
SWEEP_SEED = int(os.environ.get("HF_CONFIG_SEED", "0"))

YARN4 = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
# The same function as transformers'.
READ = [
    {},
    {"rope.attention_factor": 0.6},
    {"rope.attention_factor": 0},
    {"rope.attention_factor": None},
    {"rope.mscale": 0.7, "rope.mscale_all_dim": 1.3},
    {"rope.mscale": 0.7},
    {"rope.mscale_all_dim": 0.7},
    {"rope.mscale": 0.7, "rope.mscale_all_dim": 0},
    {"rope.attention_factor": 1.1, "rope.mscale": 0.7, "rope.mscale_all_dim": 1.3},
    {"rope.truncate": ABSENT},
    {"rope.truncate": None},
    {"rope.truncate": True},
    {"rope.original_max_position_embeddings": ABSENT},
    {"rope.original_max_position_embeddings": ABSENT, "max_position_embeddings": 100},
    {"rope.original_max_position_embeddings": 32.0},
    {"original_max_position_embeddings": 32},
    {"rope.factor": None, "max_position_embeddings": 256},
    {"rope.factor": 0.5},
    {"rope.factor": 1},
    {"rope.beta_fast": None, "rope.beta_slow": ABSENT},
    {"rope.beta_fast": 0, "rope.beta_slow": 0},
    {"rope.beta_fast": 0.5, "rope.beta_slow": 4},
    {"rope.rope_theta": 700.5},
    {"rope_theta": 700.5},
    {"rope_theta": ABSENT},
    {"rope.rope_type": ABSENT},
    {"rope.rope_type": ABSENT, "rope.type": "yarn"},
    {"rope.rope_type": "default", "rope.type": "yarn"},
    {"rope.type": "linear"},
    {"rope.partial_rotary_factor": 1.0, "partial_rotary_factor": None},
    {"rope.low_freq_factor": 3},
    {"rope_scaling": None},
    {"rope_scaling": {}},
    {"rope_scaling": ABSENT},
    {"rope_scaling": ABSENT, "rope_parameters": {}},
    {"rope_scaling": ABSENT, "rope_parameters": YARN4 | {"rope_theta": 99}},
    {"rope_scaling": {}, "rope_parameters": YARN4},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}},
    {"initial_context_length": 7},
    {"max_position_embeddings": 8},
    {"max_position_embeddings": ABSENT},
    {"layer_types": ABSENT},
    {"layer_types": None},
    {"layer_types": ["attention"] * 3},
    {"layer_types": ["sliding_attention"] * 3},
    {"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
    {"sliding_window": 1},
    {"sliding_window": 33},
    {"sliding_window": 10_000},
    {"head_dim": 64},
    {"head_dim": ABSENT},
    {"num_experts_per_tok": 2, "experts_per_token": ABSENT},
    {"num_experts_per_tok": 5, "experts_per_token": 5},
    {"num_experts_per_tok": ABSENT},
    {"num_local_experts": ABSENT, "num_experts": 6},
    {"num_experts": 4},
    {"num_key_value_heads": 1},
    {"num_key_value_heads": 6},
    {"rms_norm_eps": 1e-2},
    {"rms_norm_eps": 0.0},
    {"rms_norm_eps": ABSENT},
    {"swiglu_limit": 0.75},
    {"swiglu_limit": ABSENT},
    {"swiglu_alpha": 1.702},
    {"hidden_act": ABSENT},
    {"attention_dropout": 0},
    {"output_router_logits": True},
    {"use_cache": False},
    {"pad_token_id": 3, "eos_token_id": [3, 4], "bos_token_id": None},
    {"tie_word_embeddings": ABSENT, "attention_bias": ABSENT},
    {"dtype": None, "torch_dtype": "float32"},
    {"dtype": "float32"},
    {"per_layer_config": {}},
    {"note": "x", "_name_or_path": "y", "attention_chunk_size": 4, "use_sliding_window": False},
]
# Refused; the words are in the message.
REFUSED = [
    ({"rope.rope_type": "linear"}, "rope_scaling has rope_type = 'linear'"),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "type = 'linear'"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope_type = 'dynamic'"),
    ({"rope.rope_type": None}, "rope_type = None"),
    ({"rope.factor": ABSENT}, "lacks factor"),
    ({"rope.factor": 0}, "factor = 0"),
    ({"rope.factor": "4"}, "factor = '4'"),
    ({"rope.factor": True}, "factor = True"),
    ({"rope.beta_fast": -1}, "beta_fast = -1"),
    ({"rope.attention_factor": "1"}, "attention_factor = '1'"),
    ({"rope.mscale": [1]}, "mscale = [1]"),
    ({"rope.truncate": "no"}, "truncate = 'no'"),
    ({"rope.original_max_position_embeddings": None}, "original_max_position_embeddings = None"),
    ({"rope.original_max_position_embeddings": 64.5}, "original_max_position_embeddings = 64.5"),
    ({"original_max_position_embeddings": None}, "original_max_position_embeddings = None"),
    ({"rope.rope_theta": None}, "rope_theta = None"),
    ({"rope_theta": None}, "rope_theta = None"),
    ({"rope_theta": 1}, "rope_theta = 1"),
    ({"rope.partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ({"rope.partial_rotary_factor": 0.125}, "partial_rotary_factor = 0.125"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ({"rope_scaling": [4.0]}, "rope_scaling = [4.0]"),
    ({"rope_scaling": {"full_attention": YARN4, "sliding_attention": YARN4}}, "sliding_attention"),
    ({"sliding_window": None}, "sliding_window = None"),
    ({"sliding_window": 0}, "sliding_window = 0"),
    ({"sliding_window": 2.5}, "sliding_window = 2.5"),
    ({"sliding_window": True}, "sliding_window = True"),
    ({"layer_types": ["full_attention"] * 2}, "layer_types of 2 layers"),
    ({"layer_types": ["chunked_attention"] * 3}, "layer_types"),
    ({"head_dim": None}, "head_dim = None"),
    ({"head_dim": 15}, "head_dim = 15"),
    ({"num_key_value_heads": None}, "num_key_value_heads = None"),
    ({"num_key_value_heads": 4}, "num_key_value_heads = 4"),
    ({"num_hidden_layers": 3.0}, "num_hidden_layers = 3.0"),
    ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
    ({"hidden_size": 0}, "hidden_size = 0"),
    ({"vocab_size": None}, "vocab_size = None"),
    ({"max_position_embeddings": None}, "max_position_embeddings = None"),
    ({"num_experts_per_tok": 6, "experts_per_token": 6}, "num_experts_per_tok = 6"),
    ({"num_experts_per_tok": 1, "experts_per_token": 1}, "num_experts_per_tok = 1"),
    ({"num_experts_per_tok": 2}, "experts_per_token = 4 and num_experts_per_tok = 2"),
    ({"num_experts_per_tok": ABSENT, "experts_per_token": 2}, "experts_per_token = 2"),
    ({"rms_norm_eps": None}, "rms_norm_eps = None"),
    ({"rms_norm_eps": 1}, "rms_norm_eps = 1"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan"),
    ({"swiglu_limit": None}, "swiglu_limit = None"),
    ({"swiglu_limit": 7}, "swiglu_limit = 7;"),
    ({"swiglu_limit": -1.0}, "swiglu_limit = -1.0"),
    ({"swiglu_alpha": 1.0}, "swiglu_alpha = 1.0"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"attention_bias": False}, "attention_bias = False"),
    ({"attention_dropout": 0.5}, "attention_dropout = 0.5"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings = True"),
    ({"is_causal": False}, "is_causal = False"),
    ({"return_dict": False}, "return_dict = False"),
    ({"pad_token_id": 1000}, "pad_token_id = 1000"),
    ({"dtype": "foo"}, "dtype = 'foo'"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ({"per_layer_config": {"0": {"sliding_window": 4}}}, "per_layer_config"),
    ({"transformers_weights": "x.safetensors"}, "transformers_weights"),
    ({"default_theta": 10.0}, "default_theta"),
    ({"to_dict": 1}, "to_dict"),
    ({"_rope_type_labels": ["factor"]}, "_rope_type_labels"),
    ({"model_type": "llama"}, "'llama', not 'gpt_oss'"),
    ({"model_type": ABSENT}, "'None', not 'gpt_oss'"),
]


def _name(change):
    if isinstance(change, tuple):
        change = change[0]
    shown = {k: "absent" if v is ABSENT else v for k, v in change.items()}
    return str(shown).replace(" ", "")[1:-1][:70] or "published"


def _outcome(folder, seed=0):
    """The error of our logits, relative to transformers', or (refused, its sentence)."""
    ids = torch.randint(97, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    theirs = transformers_logits(folder, ids, seed)
    try:
        ours = our_logits(folder, ids)
    except UsageError as error:
        return "refused", str(error)
    assert isinstance(theirs, torch.Tensor), f"transformers refuses it: {theirs!r}"
    assert theirs.isfinite().all()
    error = _relative(ours, theirs)
    if error > LIMIT:  # a near tie among router logits, say: how far is transformers' own fp32 off?
        own = _relative(theirs, transformers_logits(folder, ids, seed, torch.float64))
        error *= LIMIT / max(LIMIT, 3 * own)
    return "read", error


def _relative(value, expected):
    return ((value - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("change", READ, ids=_name)
def test_the_function_of_transformers(one_rank, tmp_path, change):
    config = varied(change)
    if "head_dim" in change:  # a wider head: two layers of it are enough
        config = varied(change | {"num_hidden_layers": 2, "layer_types": None})
    outcome, error = _outcome(write_config(tmp_path, config))
    assert outcome == "read", error
    assert error < LIMIT


@pytest.mark.parametrize("change, words", REFUSED, ids=map(_name, REFUSED))
def test_refused_by_name(tmp_path, change, words):
    write_config(tmp_path, varied(change))
    with pytest.raises(UsageError) as error:
        preset_from_hf_config(read_hf_config(tmp_path))
    assert words in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("said", [True, False])
def test_config_and_files_disagree_about_mxfp4(tmp_path, said):
    """transformers would leave the experts at random, or fail."""
    tensors = trained_tensors(TINY)
    if said:
        write_hf(tmp_path, TINY, tensors)
    else:
        write_mxfp4(tmp_path, TINY, mxfp4_tensors(tensors))
    extra = {"quantization_config": QUANTIZATION_CONFIG} if said else {}
    write_config(tmp_path, hf_config_from_preset(TINY, **extra))
    with pytest.raises(UsageError, match="quantization_config"):
        open_hf(tmp_path)


@pytest.mark.parametrize("number", range(SWEEP))
def test_drawn_configs(one_rank, tmp_path, number):
    """Several fields at once, sizes included. HF_CONFIG_SWEEP=200 HF_CONFIG_SEED=7 draws more."""
    change = draw(random.Random(SWEEP_SEED * 100_003 + number))
    outcome, error = _outcome(write_config(tmp_path, varied(change)), number)
    if outcome == "read":
        assert error < LIMIT, change
    else:
        assert " = " in error or "lacks" in error, (error, change)


def test_the_page_has_the_tables():
    """docs/hf_config.md: python -m megatron.gpt_oss.checkpoint.hf.fields writes them."""
    page = (ROOT / "docs" / "hf_config.md").read_text(encoding="utf-8")
    assert hf_fields.markdown() in page


def test_every_field_of_transformers_is_known():
    """A field that a new transformers adds to its config, or reads in the model, is noticed."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GptOssConfig
    known = {field.name for field in hf_fields.FIELDS}
    own = {field.name for field in dataclasses.fields(config)}
    assert own - known == OF_NO_FUNCTION
    properties = {n for n in dir(config) if isinstance(getattr(config, n, None), property)}
    shadowed = {n for n in dir(config) if not n.startswith("__")} - own - {"model_type"}
    assert shadowed - properties <= hf_fields.RESERVED
    assert not hf_fields.RESERVED & known


def test_every_field_that_the_model_reads_is_known():
    """Names that transformers' model, masks and rotation take from a config."""
    transformers = pytest.importorskip("transformers")
    known = {field.name for field in hf_fields.FIELDS} | hf_fields.RESERVED | OF_NO_FUNCTION
    root = Path(transformers.__file__).parent
    read = set()
    for file in ("models/gpt_oss/modeling_gpt_oss.py", "masking_utils.py"):
        text = (root / file).read_text(encoding="utf-8")
        read |= set(re.findall(r"\bconfig\.([A-Za-z_]\w*)", text))
        read |= set(re.findall(r'getattr\((?:self\.)?config, "(\w+)"', text))
    assert "sliding_window" in read and "is_causal" in read
    assert read - known <= OF_OTHER_MODELS


# Fields of transformers' config that its forward does not read.
OF_NO_FUNCTION = {
    "architectures",
    "chunk_size_feed_forward",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "output_hidden_states",
    "problem_type",
    "transformers_version",
}
# Of implementation, not function; or masks that gpt-oss does not ask for.
OF_OTHER_MODELS = {
    "_attn_implementation",
    "_experts_implementation",
    "attention_chunk_size",
}
