# Copyright (c) 2026, the megatron-core gptoss authors.

"""CUDA_DEVICE_MAX_CONNECTIONS is set as Megatron requires, and a value of the user is kept."""

import os

import pytest

from megatron.gpt_oss.arguments.device_connections import VARIABLE
from megatron.gpt_oss.arguments.parse import read

BASE = [
    "--preset",
    "tiny",
    "--seq-length",
    "64",
    "--mock-data",
    "--tokenizer-type",
    "NullTokenizer",
]
FSDP = ["--use-torch-fsdp2", "--allow-untested-flags"]


def variable_after(monkeypatch, *flags, before=None):
    """Its value after the command line was read."""
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k != VARIABLE})
    if before is not None:
        os.environ[VARIABLE] = before
    read([*BASE, *flags])
    return os.environ.get(VARIABLE)


@pytest.mark.parametrize(
    "flags, before, after",
    [
        (["--context-parallel-size", "2"], None, "1"),
        (["--tensor-model-parallel-size", "2"], None, "1"),
        (["--expert-model-parallel-size", "2"], None, None),
        (["--context-parallel-size", "2"], "8", "8"),
        (["--tensor-model-parallel-size", "2", *FSDP], None, None),
    ],
)
def test_set_where_megatron_demands_it(monkeypatch, flags, before, after):
    assert variable_after(monkeypatch, *flags, before=before) == after
