# Copyright (c) 2026, the megatron-core gptoss authors.

"""The command line's switches for sink_attention."""

import sys
from typing import get_args, get_type_hints

import pytest

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.arguments import parse_args, validate_args

MODEL = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 "
    "--max-position-embeddings 32 --micro-batch-size 1 --tokenizer-type NullTokenizer "
    "--vocab-size 100"
).split()
LEARNABLE = ["--softmax-type", "learnable"]
LOCAL = ["--transformer-impl", "local"]


@pytest.fixture
def arguments(monkeypatch):
    def parse(*flags):
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *MODEL, *flags])
        args = parse_args()
        args.world_size = args.context_parallel_size
        validate_args(args)
        return args

    return parse


def test_flag(arguments):
    """From the flag to the config; its choices are the backends that there are."""
    from megatron.core.transformer.sink_attention.registry import BACKENDS

    args = arguments(*LOCAL, "--sink-attention-backend", "aten_fa2")
    assert core_transformer_config_from_args(args).sink_attention_backend == "aten_fa2"
    assert arguments(*LOCAL).sink_attention_backend is None
    hint = get_type_hints(TransformerConfig)["sink_attention_backend"]
    assert set(get_args(get_args(hint)[0])) == {"auto", *BACKENDS}
    with pytest.raises(SystemExit):
        arguments("--sink-attention-backend", "fa5")


@pytest.mark.parametrize(
    "flags, made",
    [
        (LOCAL, True),
        (LOCAL + LEARNABLE, False),
        (LOCAL + ["--sink-attention-backend", "auto"], False),
        (LOCAL + ["--context-parallel-size", "2"], False),
        (LOCAL + LEARNABLE + ["--reset-attention-mask"], True),
        (LEARNABLE, True),
        (LEARNABLE + ["--attention-backend", "local"], False),
    ],
    ids=[
        "vanilla",
        "learnable",
        "asked-for",
        "context-parallel",
        "reset-mask",
        "other-spec",
        "local-in-other-spec",
    ],
)
def test_no_mask_from_dataloader(flags, made, arguments):
    assert arguments(*flags).create_attention_mask_in_dataloader is made
