# Copyright (c) 2026, the megatron-core gptoss authors.

"""--help: this project's flags and those of Megatron's that most runs need; --help-all is every one.

Imports nothing heavy, so that --help is instant.
"""

import os
from argparse import ArgumentParser
from typing import Sequence

from megatron.gpt_oss.arguments.flags import HELP_ALL, add_our_arguments

USAGE = "torchrun --nproc-per-node N pretrain_gpt_oss.py --preset NAME [flags]"
EPILOG = (
    f"{HELP_ALL} lists all flags of Megatron's as well, and docs/flags.md says which of them a test "
    "runs here."
)
# By what they are about: flag, value (None for a switch), meaning.
COMMON: dict[str, list[tuple[str, str | None, str]]] = {
    "length and batch": [
        ("--train-iters", "STEPS", "how long to train; or --train-samples"),
        ("--train-samples", "SAMPLES", "the same in sequences"),
        ("--seq-length", "TOKENS", "of a sample; the preset's by default"),
        ("--micro-batch-size", "N", "samples that go through the model at once; 1"),
        ("--global-batch-size", "N", "samples of a step, over all ranks"),
        (
            "--step-batch-size-schedule",
            "PAIRS",
            'batch sizes that change, as "0:64 10M:128": from so many tokens on',
        ),
        ("--seed", "N", "of weights and of the order of the data; 1234"),
        ("--exit-interval", "STEPS", "save and end at a multiple of it"),
    ],
    "learning rate and optimizer": [
        ("--lr", "RATE", "the largest learning rate"),
        ("--min-lr", "RATE", "the smallest after the decay; 0"),
        ("--lr-decay-style", "STYLE", "constant, linear, cosine, WSD, inverse-square-root"),
        ("--lr-decay-iters", "STEPS", "until --min-lr is reached; the whole run by default"),
        ("--lr-warmup-iters", "STEPS", "up to --lr"),
        ("--lr-warmup-fraction", "SHARE", "the same as a share of the decay"),
        ("--lr-wsd-decay-iters", "STEPS", "with WSD: the decay at the end"),
        ("--lr-wsd-decay-style", "STYLE", "with WSD: its shape"),
        ("--override-opt-param-scheduler", None, "on resume: this command's schedule"),
        ("--optimizer", "NAME", "adam or sgd"),
        ("--weight-decay", "X", "0.01"),
        ("--clip-grad", "NORM", "gradients are scaled down to this norm; 1.0"),
        ("--adam-beta1", "X", "0.9"),
        ("--adam-beta2", "X", "0.999"),
        ("--moe-aux-loss-coeff", "X", "weight of the loss that balances the experts"),
        (
            "--moe-router-load-balancing-type",
            "NAME",
            "none, aux_loss, seq_aux_loss, global_aux_loss",
        ),
    ],
    "data and tokenizer": [
        ("--data-path", "PREFIX", "what gptoss tokenize wrote; several with weights before each"),
        ("--split", "A,B,C", "shares of training, validation and test documents; 969,30,1"),
        ("--tokenizer-model", "FOLDER", "with tokenizer.json; that of --load-hf by default"),
        ("--dataloader-inter-document-masking", None, "attention stays within documents"),
        ("--eod-mask-loss", None, "no loss where a document ends"),
        ("--num-workers", "N", "processes that read samples, of each rank; 2"),
    ],
    "parallelism": [
        ("--tensor-model-parallel-size", "N", "ranks that share each weight matrix"),
        ("--sequence-parallel", None, "with it: they share the norms' tokens too"),
        ("--pipeline-model-parallel-size", "N", "ranks that share out the layers"),
        ("--num-virtual-stages-per-pipeline-rank", "N", "stages of each: fewer idle moments"),
        ("--context-parallel-size", "N", "ranks that share each sequence"),
        ("--cp-comm-type", "WAY", "auto, p2p, all_gather, a2a, a2a+p2p; one or one a layer"),
        ("--expert-model-parallel-size", "N", "ranks that share out the experts"),
        ("--expert-tensor-parallel-size", "N", "ranks that share each expert"),
        ("--use-distributed-optimizer", None, "the optimizer's state is shared out over ranks"),
        ("--overlap-grad-reduce", None, "gradients are reduced beside the backward"),
        ("--overlap-param-gather", None, "weights are gathered beside the forward"),
        ("--distributed-timeout-minutes", "N", "after which a rank gives the others up; 10"),
    ],
    "memory and precision": [
        ("--bf16", None, "weights and products in bf16; fp32 without it"),
        ("--grad-reduce-in-bf16", None, "gradients in bf16: half their memory"),
        ("--recompute-granularity", "NAME", "full or selective, instead of a word of --memory"),
        ("--optimizer-cpu-offload", None, "the optimizer on the host"),
        ("--transformer-impl", "NAME", "local (PyTorch alone) or transformer_engine"),
        ("--fp8-format", "NAME", "hybrid or e4m3, with transformer_engine"),
        ("--fp8-recipe", "NAME", "tensorwise, blockwise, delayed, mxfp8"),
    ],
    "checkpoints": [
        ("--save", "DIR", "RUN_DIR/checkpoints by default"),
        ("--load", "DIR", "RUN_DIR/checkpoints by default"),
        ("--save-interval", "STEPS", "500"),
        ("--async-save", None, "a thread writes while the training goes on"),
        ("--pretrained-checkpoint", "DIR", "weights to start from, in Megatron's format"),
        ("--finetune", None, "take the weights of --load alone and begin at step 0"),
        ("--no-load-optim", None, "begin with a new optimizer"),
    ],
    "evaluation and logging": [
        ("--eval-interval", "STEPS", "500"),
        ("--eval-iters", "BATCHES", "of an evaluation; 10"),
        ("--log-interval", "STEPS", "1"),
        ("--tensorboard-dir", "DIR", "the same numbers for TensorBoard"),
        ("--wandb-project", "NAME", "and for Weights & Biases"),
    ],
}


def help_text() -> str:
    """What --help prints."""
    parser = ArgumentParser(usage=USAGE, add_help=False, allow_abbrev=False, epilog=EPILOG)
    add_our_arguments(parser)
    for title, flags in COMMON.items():
        group = parser.add_argument_group(f"Megatron's: {title}")
        for flag, value, meaning in flags:
            kind = {"action": "store_true"} if value is None else {"metavar": value}
            group.add_argument(flag, help=meaning, **kind)
    return parser.format_help()


def asked_for(words: Sequence[str]) -> bool:
    """Whether a command line asks for `help_text`."""
    return bool({"-h", "--help"} & set(words)) and HELP_ALL not in words


def show_help() -> None:
    """Print it, on the first rank alone."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(help_text(), end="", flush=True)


def show_all(parser: ArgumentParser) -> None:
    """Print every flag of a whole parser, this project's first; on the first rank alone."""
    alone = add_our_arguments(ArgumentParser(add_help=False))
    ours = {group.title for group in alone._action_groups if group._group_actions}
    parser._action_groups.sort(key=lambda group: group.title not in ours)
    parser.usage, parser.description = USAGE, None
    if int(os.environ.get("RANK", "0")) == 0:
        parser.print_help()
