# Copyright (c) 2026, the megatron-core gptoss authors.

"""The command line's switches for the local attention."""

import sys

import pytest

from megatron.core.transformer.enums import AttnBackend
from megatron.training.arguments import parse_args, validate_args

MODEL = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 "
    "--max-position-embeddings 32 --micro-batch-size 1 --tokenizer-type NullTokenizer "
    "--vocab-size 100"
).split()


@pytest.fixture
def arguments(monkeypatch):
    def parse(*flags):
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *MODEL, *flags])
        return parse_args()

    return parse


def test_softmax_in_fp32(arguments):
    """The default was False, against the config's True, and could not be given."""
    assert arguments().attention_softmax_in_fp32 is True
    assert arguments("--attention-softmax-in-fp32").attention_softmax_in_fp32 is True
    assert arguments("--no-attention-softmax-in-fp32").attention_softmax_in_fp32 is False


@pytest.mark.parametrize(
    "flags, transformer_impl",
    [([], "transformer_engine"), (["--spec", "local"], "local")],
    ids=["no-spec", "spec-local"],
)
def test_attention_backend_local(flags, transformer_impl, arguments):
    """TypeError without --spec; with --spec local, `local` was then imported as a module."""
    args = arguments("--attention-backend", "local", *flags)
    validate_args(args)
    assert args.attention_backend == AttnBackend.local
    assert args.transformer_impl == transformer_impl
    assert args.spec is None


def test_spec_is_kept(arguments):
    args = arguments("--spec", "a.module", "a_function")
    validate_args(args)
    assert args.spec == ["a.module", "a_function"]
    assert args.transformer_impl == "transformer_engine"
