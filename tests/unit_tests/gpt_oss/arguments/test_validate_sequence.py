# Copyright (c) 2026, the megatron-core gptoss authors.

"""Sequence split and packing: invalid options are rejected before a process group is created."""

import pytest

from megatron.gpt_oss.arguments.parse import read
from megatron.gpt_oss.errors import UsageError

NULL = "--tokenizer-type NullTokenizer --vocab-size 256 --micro-batch-size 1"
TINY = "--preset tiny --context-parallel-size"  # 4 heads, 4 layers, 512 tokens
B20 = "--preset 20b --context-parallel-size"
HIERARCHY = "--hierarchical-context-parallel-sizes"
DOCUMENTS = "--preset tiny --dataloader-inter-document-masking"

REFUSED = {
    "length": (f"{B20} 4 --seq-length 8190", "8190 .* = 8. Give --seq-length 8192"),
    "length-tp": (
        f"{B20} 2 --tensor-model-parallel-size 8 --seq-length 8200",
        "8200 is not a multiple of 16, for context_parallel_size = 2 and .* = 8. .* 8208",
    ),
    "dropout": (f"{TINY} 2 --attention-dropout 0.1", "--attention-dropout 0.1 .*size 2. Give"),
    "mask": (f"{TINY} 2 --reset-attention-mask", "Give --dataloader-inter-document-masking"),
    "unknown": (f"{TINY} 2 --cp-comm-type allgather", "allgather is unknown.* all_gather"),
    "number": (f"{TINY} 2 --cp-comm-type p2p a2a", "lists 2 layers, the model has 4"),
    "no-hierarchy": (f"{TINY} 4 --cp-comm-type a2a+p2p", "is not given; .*size 4"),
    "hierarchy": (f"{TINY} 4 --cp-comm-type a2a+p2p {HIERARCHY} 2 4", "is 2 4; .* product"),
    "heads": (
        f"{B20} 16 --seq-length 4096 --tensor-model-parallel-size 8 --cp-comm-type a2a",
        "a2a splits the 64 .* = 128 ranks",
    ),
    "heads-hierarchy": (f"{TINY} 16 --cp-comm-type a2a+p2p {HIERARCHY} 8 2", "4 .* 8 = 8 ranks"),
    "packed-batch": (f"{DOCUMENTS} --micro-batch-size 2", "--micro-batch-size 2 .* longer"),
    "positions-without-packing": (
        "--preset tiny --document-positions restart",
        "restart without --dataloader-inter-document-masking",
    ),
    "packed-positions": (f"{DOCUMENTS} --reset-position-ids", "Drop --reset-position-ids"),
}

ACCEPTED = {
    "length": f"{B20} 4 --seq-length 8192",
    "length-cp1": "--preset 20b --seq-length 8191",
    "dropout-cp1": "--preset tiny --attention-dropout 0.1",
    "each-layer": f"{TINY} 2 --cp-comm-type p2p a2a all_gather auto",
    "hierarchy": f"{TINY} 4 --cp-comm-type a2a+p2p {HIERARCHY} 2 2",
    "heads-of-a-node": f"{TINY} 16 --cp-comm-type a2a+p2p {HIERARCHY} 4 4",
    "packed": f"{DOCUMENTS} --context-parallel-size 2",
    "run-on": f"{DOCUMENTS} --document-positions run-on",
    "restart": f"{DOCUMENTS} --document-positions restart",
    "run-on-without-packing": "--preset tiny --document-positions run-on",
}


def parse(words):
    return read([*NULL.split(), *words.split()]).args


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    words, message = REFUSED[name]
    with pytest.raises(UsageError, match=message) as error:
        parse(words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name):
    parse(ACCEPTED[name])


def test_way_to_exchange():
    """auto selects by measurement; TransformerEngine supports one scheme for sinks."""
    assert parse(f"{TINY} 2").cp_comm_type == ["auto"]
    other = f"{TINY} 2 --transformer-impl transformer_engine"
    assert parse(other).cp_comm_type == ["auto"]
    assert parse(f"{other} --cp-comm-type p2p").cp_comm_type == ["p2p"]
    theirs = parse(f"{other} --bf16 --sink-attention te")
    assert theirs.cp_comm_type == ["a2a"]
