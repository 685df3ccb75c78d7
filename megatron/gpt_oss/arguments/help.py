# Copyright (c) 2026, the megatron-core gptoss authors.

"""--help prints our flags and common Megatron flags, --help-all every flag.

Does not import torch, so that --help is fast.
"""

import os
from argparse import ArgumentParser
from typing import Sequence

from megatron.gpt_oss.arguments.flags import HELP_ALL, add_our_arguments

USAGE = "torchrun --nproc-per-node N pretrain_gpt_oss.py --preset NAME [flags]"
EPILOG = (
    f"{HELP_ALL} also lists all Megatron flags; docs/flags.md lists those that are tested here."
)
# By topic: flag, value (None for a switch), meaning.
COMMON: dict[str, list[tuple[str, str | None, str]]] = {
    "length and batch": [
        ("--train-iters", "STEPS", "training length; or --train-samples"),
        ("--train-samples", "SAMPLES", "training length in sequences"),
        ("--seq-length", "TOKENS", "tokens per sample; set by the preset"),
        ("--micro-batch-size", "N", "samples per micro-batch; 1"),
        ("--global-batch-size", "N", "samples per step, over all ranks"),
        (
            "--step-batch-size-schedule",
            "PAIRS",
            'batch size by tokens trained, such as "0:64 10M:128"',
        ),
        ("--seed", "N", "seed of the weights and of the data order; 1234"),
        ("--exit-interval", "STEPS", "save and exit at a multiple of STEPS"),
    ],
    "learning rate and optimizer": [
        ("--lr", "RATE", "maximum learning rate"),
        ("--min-lr", "RATE", "learning rate after the decay; 0"),
        ("--lr-decay-style", "STYLE", "constant, linear, cosine, WSD, inverse-square-root"),
        ("--lr-decay-iters", "STEPS", "steps until --min-lr; by default the length of the run"),
        ("--lr-warmup-iters", "STEPS", "linear warm-up to --lr"),
        ("--lr-warmup-fraction", "SHARE", "warm-up as a fraction of the decay"),
        ("--lr-wsd-decay-iters", "STEPS", "with WSD: length of the final decay"),
        ("--lr-wsd-decay-style", "STYLE", "with WSD: shape of the final decay"),
        ("--override-opt-param-scheduler", None, "on resume: use this command's schedule"),
        ("--optimizer", "NAME", "adam or sgd"),
        ("--weight-decay", "X", "0.01"),
        ("--clip-grad", "NORM", "maximum gradient norm; 1.0"),
        ("--adam-beta1", "X", "0.9"),
        ("--adam-beta2", "X", "0.999"),
        ("--moe-aux-loss-coeff", "X", "weight of the load-balancing loss"),
        (
            "--moe-router-load-balancing-type",
            "NAME",
            "none, aux_loss, seq_aux_loss, global_aux_loss",
        ),
    ],
    "data and tokenizer": [
        ("--data-path", "PREFIX", "output of gptoss tokenize; several with a weight before each"),
        ("--split", "A,B,C", "train, validation and test proportions; 969,30,1"),
        ("--tokenizer-model", "DIR", "directory with tokenizer.json; by default that of --load-hf"),
        ("--dataloader-inter-document-masking", None, "no attention across documents"),
        ("--eod-mask-loss", None, "no loss on end-of-document tokens"),
        ("--num-workers", "N", "dataloader processes per rank; 2"),
    ],
    "parallelism": [
        ("--tensor-model-parallel-size", "N", "ranks that split each weight matrix"),
        ("--sequence-parallel", None, "with it: split the tokens of the norms too"),
        ("--pipeline-model-parallel-size", "N", "ranks that split the layers"),
        ("--num-virtual-stages-per-pipeline-rank", "N", "stages per rank: smaller pipeline bubble"),
        ("--context-parallel-size", "N", "ranks that split each sequence"),
        ("--cp-comm-type", "TYPE", "auto, p2p, all_gather, a2a, a2a+p2p; one, or one per layer"),
        ("--expert-model-parallel-size", "N", "ranks that split the experts"),
        ("--expert-tensor-parallel-size", "N", "ranks that split each expert"),
        ("--use-distributed-optimizer", None, "shard the optimizer state over data-parallel ranks"),
        ("--overlap-grad-reduce", None, "overlap gradient reduction with the backward"),
        ("--overlap-param-gather", None, "overlap the weight all-gather with the forward"),
        ("--distributed-timeout-minutes", "N", "timeout of collectives; 10"),
    ],
    "memory and precision": [
        ("--bf16", None, "weights and GEMMs in bf16; default fp32"),
        ("--grad-reduce-in-bf16", None, "gradients in bf16: half the memory"),
        ("--recompute-granularity", "NAME", "full or selective, instead of --memory"),
        ("--optimizer-cpu-offload", None, "optimizer state in CPU memory"),
        ("--transformer-impl", "NAME", "local (PyTorch only) or transformer_engine"),
        ("--fp8-format", "NAME", "e4m3, or hybrid with transformer_engine"),
        ("--fp8-recipe", "NAME", "rowwise; with transformer_engine tensorwise, blockwise, ..."),
    ],
    "checkpoints": [
        ("--save", "DIR", "RUN_DIR/checkpoints by default"),
        ("--load", "DIR", "RUN_DIR/checkpoints by default"),
        ("--save-interval", "STEPS", "500"),
        ("--async-save", None, "write checkpoints in a background thread"),
        ("--pretrained-checkpoint", "DIR", "initial weights, in Megatron's format"),
        ("--finetune", None, "load only the weights and start at step 0"),
        ("--no-load-optim", None, "start with new optimizer state"),
    ],
    "evaluation and logging": [
        ("--eval-interval", "STEPS", "500"),
        ("--eval-iters", "BATCHES", "batches per evaluation; 10"),
        ("--log-interval", "STEPS", "1"),
        ("--tensorboard-dir", "DIR", "log to TensorBoard as well"),
        ("--wandb-project", "NAME", "log to Weights & Biases as well"),
    ],
}


def help_text() -> str:
    """The text of --help."""
    parser = ArgumentParser(usage=USAGE, add_help=False, allow_abbrev=False, epilog=EPILOG)
    add_our_arguments(parser)
    for title, flags in COMMON.items():
        group = parser.add_argument_group(f"Megatron: {title}")
        for flag, value, meaning in flags:
            kind = {"action": "store_true"} if value is None else {"metavar": value}
            group.add_argument(flag, help=meaning, **kind)
    return parser.format_help()


def asked_for(words: Sequence[str]) -> bool:
    """Whether a command line asks for `help_text`."""
    return bool({"-h", "--help"} & set(words)) and HELP_ALL not in words


def show_help() -> None:
    """Print `help_text` on rank 0."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(help_text(), end="", flush=True)


def show_all(parser: ArgumentParser) -> None:
    """Print every flag of a parser on rank 0, with our flags first."""
    alone = add_our_arguments(ArgumentParser(add_help=False))
    ours = {group.title for group in alone._action_groups if group._group_actions}
    parser._action_groups.sort(key=lambda group: group.title not in ours)
    parser.usage, parser.description = USAGE, None
    if int(os.environ.get("RANK", "0")) == 0:
        parser.print_help()
