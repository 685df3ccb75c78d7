# Copyright (c) 2026, the megatron-core gptoss authors.
"""The command line's RoPE and YaRN flags reach the model's configuration."""

import argparse

import pytest

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.argument_utils import _apply_yarn_config_from_args, gpt_config_from_args
from megatron.training.arguments import add_megatron_arguments, validate_args

GPT_OSS_ROPE = (
    "--position-embedding-type yarn --no-yarn-correction-range-round-to-int --rotary-base 150000 "
    "--rotary-scaling-factor 32 --mscale 1 --mscale-all-dim 0 "
)


@pytest.fixture(scope="module")
def parser():
    return add_megatron_arguments(argparse.ArgumentParser())


def make_configs(parser, flags):
    args = parser.parse_args(flags.split() + ["--vocab-size", "64"])
    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=2)
    _apply_yarn_config_from_args(config, args)
    return config, gpt_config_from_args(args, config)


def test_rope_scaling_factor(parser):
    """--rope-scaling-factor was parsed and never read: the model always had 8."""
    _, model = make_configs(parser, "--use-rope-scaling --rope-scaling-factor 32")
    assert (model.rope_scaling, model.rope_scaling_factor) == (True, 32.0)
    _, model = make_configs(parser, "--use-rope-scaling")
    assert (model.rope_scaling, model.rope_scaling_factor) == (True, 8.0)


@pytest.mark.parametrize("attention_factor", [None, 1.25])
def test_yarn_flags(parser, attention_factor):
    """Every YaRN flag of gpt-oss, and the explicit attention factor, which had no flag."""
    extra = "" if attention_factor is None else f"--yarn-attention-factor {attention_factor}"
    config, model = make_configs(parser, GPT_OSS_ROPE + extra)
    assert (model.position_embedding_type, model.rotary_base) == ("yarn", 150000)
    assert {name: v for name, v in vars(config).items() if name.startswith("yarn_")} == dict(
        yarn_rotary_scaling_factor=32.0,
        yarn_original_max_position_embeddings=4096,
        yarn_beta_fast=32.0,
        yarn_beta_slow=1.0,
        yarn_mscale=1.0,
        yarn_mscale_all_dim=0.0,
        yarn_attention_factor=attention_factor,
        yarn_correction_range_round_to_int=False,
    )


@pytest.mark.parametrize("asked", ["yarn", "mrope", "none"])
def test_legacy_rope_flag_is_refused(parser, asked):
    """Regression: --use-rotary-position-embeddings silently replaced YaRN with plain RoPE."""
    with pytest.raises(ValueError, match=f"--position-embedding-type {asked} into rope"):
        validate(parser, f"--use-rotary-position-embeddings --position-embedding-type {asked}")


@pytest.mark.parametrize(
    "flags, position_embedding_type",
    [
        ("--use-rotary-position-embeddings", "rope"),
        ("--use-rotary-position-embeddings --position-embedding-type rope", "rope"),
        (GPT_OSS_ROPE, "yarn"),
    ],
    ids=["legacy", "both", "yarn"],
)
def test_legacy_rope_flag(parser, flags, position_embedding_type):
    """Alone, with rope, or left out, all is as it was."""
    assert validate(parser, flags).position_embedding_type == position_embedding_type


def validate(parser, flags):
    """Arguments after Megatron's own checks, for a model of one small layer."""
    model = (
        "--num-layers 1 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --train-iters 1 "
        "--max-position-embeddings 16 --micro-batch-size 1 --lr 1e-3 --transformer-impl local "
    )
    args = parser.parse_args((model + flags).split())
    args.rank, args.world_size = 0, 1
    validate_args(args)
    return args
