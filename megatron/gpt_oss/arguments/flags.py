# Copyright (c) 2026, the megatron-core gptoss authors.

"""Flags of a run that Megatron does not have, and the defaults of its own that suit one.

Imports nothing heavy, so that --help is instant.
"""

import argparse
from argparse import ArgumentParser

from megatron.gpt_oss.arguments.recompute import POLICIES
from megatron.gpt_oss.planner.machines import TORCHRUN, as_machines
from megatron.gpt_oss.presets import PRESETS

RECIPE = "--recipe"
DRY_RUN = "--dry-run"
ALLOW_UNTESTED = "--allow-untested-flags"
HELP_ALL = "--help-all"

NO_PRESET = "none"
# Tokens whose logits live at a time: 1.6 GB in bf16, large enough for the products' full rate.
LM_LOSS_CHUNK_SIZE = 4096
SINK_ATTENTION = ("megatron", "te")
# Megatron's own writer; its default, nvrx, is nvidia-resiliency-ext's.
ASYNC_STRATEGY = "mcore"


def add_our_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add them to Megatron's parser, or to an empty one."""
    _add_model_arguments(parser)
    _add_run_arguments(parser)
    return parser


def _add_model_arguments(parser: ArgumentParser) -> None:
    """What is trained on what."""
    group = parser.add_argument_group(title="gpt-oss")
    group.add_argument(
        "--preset",
        metavar="NAME",
        default=None,
        help=f"The model: {', '.join(PRESETS)}, or '{NO_PRESET}' to describe it with Megatron's "
        "own flags. Supplies the defaults of all other flags.",
    )
    group.add_argument(
        "--preset-layers",
        type=int,
        metavar="N",
        default=None,
        help="Another number of layers than the preset's: a shallower model of the same shape, "
        "for tests and benchmarks.",
    )
    group.add_argument(
        "--yarn-factor",
        type=float,
        metavar="F",
        default=None,
        help="Extend the context: positions up to F times 4,096 instead of the published 32 times "
        "(131,072), by YaRN. Training has to follow; convert to-hf writes it to config.json.",
    )
    group.add_argument(
        "--load-hf",
        metavar="FOLDER",
        default=None,
        help="Start from the weights of this Hugging Face gpt-oss checkpoint, at any parallel "
        "layout.",
    )
    group.add_argument(
        "--lm-loss-chunk-size",
        type=int,
        metavar="TOKENS",
        default=0,
        help="Compute head and loss over this many tokens at a time, so that the logits of all "
        "tokens (0.8 MB a token in fp32) never exist. 0: all at once. A preset takes "
        f"{LM_LOSS_CHUNK_SIZE}.",
    )
    group.add_argument(
        "--no-moe-grouped-gemm",
        dest="moe_grouped_gemm",
        action="store_false",
        default=argparse.SUPPRESS,
        help="Run the experts of a layer one after the other. A preset runs them as two grouped "
        "products.",
    )
    group.add_argument(
        "--sink-attention",
        choices=SINK_ATTENTION,
        default="megatron",
        help="Whose attention runs among TransformerEngine's layers: Megatron-Core's own with "
        "sinks, for every layout and cuDNN, or TransformerEngine's (te), which needs more of both "
        "(docs/transformer_engine.md).",
    )
    group.add_argument(
        "--data-blend",
        metavar="FILE",
        default=None,
        help="The corpora, their weights and validation sets, in one YAML file "
        "(docs/continual_pretraining.md).",
    )
    group.add_argument(
        "--document-positions",
        choices=("restart", "run-on"),
        default=None,
        help="Whether each document of a packed sequence begins at position 0 (the default) or "
        "positions run on. Attention stays within documents and sees differences of positions "
        "alone, so that both are the same function up to rounding.",
    )
    group.add_argument(
        "--memory",
        choices=list(POLICIES),
        default=None,
        help="How much is computed again to keep less: fast keeps all, balanced makes the cheap "
        "part again, experts their whole part, lean keeps a layer's input alone. --recompute-* and "
        "--lm-loss-chunk-size win.",
    )


def _add_run_arguments(parser: ArgumentParser) -> None:
    """--run-dir and what is logged, kept and trained."""
    group = parser.add_argument_group(title="run")
    group.add_argument(
        "--run-dir",
        metavar="DIR",
        default=None,
        help="Everything of the run in one folder: metrics.jsonl, run.json, Megatron's own "
        "output (megatron-rank*.log) and checkpoints/, from which a second start resumes.",
    )
    group.add_argument(
        RECIPE,
        metavar="FILE",
        action="append",
        default=None,
        help="Flags from a file (examples/gpt_oss/recipes); those of the command line win.",
    )
    group.add_argument(
        DRY_RUN,
        type=as_machines,
        nargs="?",
        const=TORCHRUN,
        default=None,
        metavar="GPUS",
        help="Print memory and time of a step with these flags, and stop before anything is made. "
        "GPUS: as if on so many, or MACHINESxGPUS; by default as many as torchrun started, one "
        "without it.",
    )
    group.add_argument(
        HELP_ALL, action="store_true", help="Every flag of Megatron's too, and stop."
    )
    group.add_argument(
        ALLOW_UNTESTED,
        action="store_true",
        help="Let through flags of Megatron's that no test runs here (docs/flags.md), and say "
        "which. Without it they are refused.",
    )
    group.add_argument(
        "--monitor-interval",
        type=int,
        metavar="STEPS",
        default=100,
        help="Every so many steps: load of the experts and entropy of the router in each layer, "
        "norms of weights and gradients by kind of module, range of the sinks. 0: never.",
    )
    group.add_argument(
        "--sample-interval",
        type=int,
        metavar="STEPS",
        default=0,
        help="Every so many steps the model writes a text. 0: never.",
    )
    group.add_argument("--sample-prompt", default="", help="The text that a sample goes on from.")
    group.add_argument(
        "--sample-tokens", type=int, default=64, metavar="N", help="Length of a sample, at most."
    )
    group.add_argument(
        "--sample-temperature", type=float, default=0.8, help="0 takes the likeliest token."
    )
    group.add_argument(
        "--keep-checkpoints",
        type=int,
        metavar="K",
        default=0,
        help="Delete checkpoints older than the K newest whole ones once a new one is complete. "
        "0: keep all.",
    )
    group.add_argument(
        "--freeze",
        nargs="+",
        metavar="PATTERN",
        default=[],
        help="Do not train the parameters whose names fit, for example '*.router.*' 'embedding.*': "
        "no gradient, no optimizer state.",
    )
    group.add_argument(
        "--lr-multiplier",
        nargs="+",
        metavar="PATTERN=FACTOR",
        default=[],
        help="Learning rates of the parameters whose names fit, as multiples of --lr and --min-lr, "
        "for example '*.softmax_offset=0.1'. The last pattern that fits counts. 0 holds them where "
        "they are.",
    )
    parser.set_defaults(
        micro_batch_size=1,
        log_interval=1,
        save_interval=500,
        eval_interval=500,
        eval_iters=10,
        # SIGTERM and SIGUSR1 save and end the run.
        exit_signal_handler=True,
        # Attention is causal in every layer, and its kernels know it.
        create_attention_mask_in_dataloader=False,
        # A checkpoint goes on at any layout; upstream's default is bound to its TP and PP.
        dist_ckpt_optim_fully_reshardable=True,
        # What --async-save writes with.
        async_strategy=ASYNC_STRATEGY,
    )
