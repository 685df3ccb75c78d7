# Copyright (c) 2026, the megatron-core gptoss authors.

"""Checks of sequence length, packing and context parallelism."""

import math
from argparse import Namespace

from megatron.core.transformer.sink_attention.context_parallel.choose import COMM_TYPES
from megatron.gpt_oss.errors import UsageError


def check_sequence(args: Namespace) -> None:
    """Refuse what attention would refuse only in a layer, after process groups are created.

    Args:
        args: the arguments, before Megatron's validation.
    Raises:
        UsageError: names the flag, its value and what to give instead.
    """
    if args.dataloader_inter_document_masking:
        _check_packing(args)
    elif args.document_positions == "restart":
        raise UsageError(
            "--document-positions restart without --dataloader-inter-document-masking: attention "
            "then crosses documents, and positions continue. Give both, or neither."
        )
    if args.context_parallel_size > 1:
        _check_length(args)
        if args.sink_attention != "te":
            _check_attention(args)
            _check_comm_types(args)


def _check_packing(args: Namespace) -> None:
    if args.micro_batch_size not in (None, 1):
        raise UsageError(
            f"--micro-batch-size {args.micro_batch_size} with "
            "--dataloader-inter-document-masking: packed documents form one sequence. Give "
            "--micro-batch-size 1 and a longer --seq-length."
        )
    for dest in ("reset_attention_mask", "reset_position_ids"):
        if getattr(args, dest):
            flag = f"--{dest.replace('_', '-')}"
            raise UsageError(
                f"{flag} with --dataloader-inter-document-masking, which already separates "
                f"documents and starts each at position 0. Drop {flag}."
            )


def _check_length(args: Namespace) -> None:
    cp, tp = args.context_parallel_size, args.tensor_model_parallel_size
    length = args.seq_length
    if length is None:
        return
    # A rank has two chunks; experts or sequence parallelism split its tokens over TP.
    parts = math.lcm(2 * cp, cp * tp)
    if length % parts:
        how = f"2 * context_parallel_size = {2 * cp}"
        if parts != 2 * cp:
            how = f"{parts}, for context_parallel_size = {cp} and tensor_model_parallel_size = {tp}"
        raise UsageError(
            f"Sequence length {length} is not a multiple of {how}. "
            f"Give --seq-length {-(-length // parts) * parts}."
        )


def _check_attention(args: Namespace) -> None:
    """Refuse what only unfused attention supports, which sees only one rank's keys."""
    hints = {
        "attention_dropout": "Give --attention-dropout 0.",
        "reset_attention_mask": "Give --dataloader-inter-document-masking instead.",
        "hybrid_context_parallel": "Drop it.",
    }
    for dest, hint in hints.items():
        if getattr(args, dest):
            flag = f"--{dest.replace('_', '-')}"
            found = "" if getattr(args, dest) is True else f" {getattr(args, dest)}"
            raise UsageError(
                f"{flag}{found} cannot be combined with --context-parallel-size "
                f"{args.context_parallel_size}. {hint}"
            )


def _check_comm_types(args: Namespace) -> None:
    cp, tp = args.context_parallel_size, args.tensor_model_parallel_size
    given, layers = args.cp_comm_type, args.num_layers
    for name in given:
        if name not in COMM_TYPES:
            raise UsageError(
                f"--cp-comm-type {name} is unknown. Choose from {', '.join(COMM_TYPES)}."
            )
    if len(given) not in (1, layers):
        raise UsageError(
            f"--cp-comm-type lists {len(given)} layers, the model has {layers}. Give one for all, "
            "or one per layer."
        )
    sizes = args.hierarchical_context_parallel_sizes
    if "a2a+p2p" in given and (not sizes or len(sizes) != 2 or math.prod(sizes) != cp):
        shown = " ".join(map(str, sizes)) if sizes else "not given"
        raise UsageError(
            f"--hierarchical-context-parallel-sizes is {shown}; --cp-comm-type a2a+p2p needs two "
            f"sizes whose product is --context-parallel-size {cp}: the ranks of one all-to-all "
            "(within a node), and of the ring between them."
        )
    heads = args.num_attention_heads
    for name, ranks in (("a2a", cp), ("a2a+p2p", sizes[0] if sizes else 1)):
        if name in given and heads and heads % (tp * ranks):
            raise UsageError(
                f"--cp-comm-type {name} splits the {heads} attention heads over "
                f"tensor_model_parallel_size * {ranks} = {tp * ranks} ranks, which does not "
                "divide them. Choose p2p, all_gather or auto."
            )
