# Copyright (c) 2026, the megatron-core gptoss authors.

"""Our flags, and our defaults of Megatron's flags.

Does not import torch, so that --help is fast.
"""

import argparse
from argparse import ArgumentParser

from megatron.gpt_oss.arguments.check_values import text
from megatron.gpt_oss.arguments.recompute import POLICIES
from megatron.gpt_oss.planner.machines import TORCHRUN, parse_machines
from megatron.gpt_oss.presets import PRESETS

RECIPE = "--recipe"
DRY_RUN = "--dry-run"
ALLOW_UNTESTED = "--allow-untested-flags"
HELP_ALL = "--help-all"

NO_PRESET = "none"
# Tokens per chunk of the loss: 1.6 GB of logits in bf16, enough for the GEMM's full rate.
LM_LOSS_CHUNK_SIZE = 4096
SINK_ATTENTION = ("megatron", "te")
# Megatron's own writer; its default, nvrx, is nvidia-resiliency-ext's.
ASYNC_STRATEGY = "mcore"


def add_our_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add our flags to Megatron's parser, or to an empty one."""
    _add_model_arguments(parser)
    _add_run_arguments(parser)
    return parser


def _add_model_arguments(parser: ArgumentParser) -> None:
    """Flags of model and data."""
    group = parser.add_argument_group(title="gpt-oss")
    group.add_argument(
        "--preset",
        metavar="NAME",
        default=None,
        help=f"The model: {', '.join(PRESETS)}, or '{NO_PRESET}' to describe it with Megatron's "
        "own flags. Sets the defaults of all other flags.",
    )
    group.add_argument(
        "--preset-layers",
        type=int,
        metavar="N",
        default=None,
        help="Override the preset's number of layers: a shallower model of the same shape, for "
        "tests and benchmarks.",
    )
    group.add_argument(
        "--yarn-factor",
        type=float,
        metavar="F",
        default=None,
        help="Extend the context: positions up to F times 4,096 instead of the published 32 times "
        "(131,072), with YaRN. The model needs training at that length; convert to-hf writes the "
        "factor to config.json.",
    )
    group.add_argument(
        "--load-hf",
        metavar="DIR",
        default=None,
        help="Start from the weights of this Hugging Face gpt-oss checkpoint; any parallel "
        "layout works.",
    )
    group.add_argument(
        "--lm-loss-chunk-size",
        type=int,
        metavar="TOKENS",
        default=0,
        help="Compute the output layer and the loss over this many tokens at a time, so that the "
        "logits of all tokens (0.8 MB per token in fp32) are never stored. 0: no chunking. A "
        f"preset uses {LM_LOSS_CHUNK_SIZE}.",
    )
    group.add_argument(
        "--no-moe-grouped-gemm",
        dest="moe_grouped_gemm",
        action="store_false",
        default=argparse.SUPPRESS,
        help="Use SequentialMLP for the experts. A preset uses two grouped GEMMs.",
    )
    group.add_argument(
        "--sink-attention",
        choices=SINK_ATTENTION,
        default="megatron",
        help="Attention for --transformer-impl transformer_engine: Megatron-Core's own with sinks, "
        "for every layout and cuDNN version, or TransformerEngine's (te), which has stricter "
        "requirements on both (docs/transformer_engine.md).",
    )
    group.add_argument(
        "--data-blend",
        metavar="FILE",
        default=None,
        help="The corpora, their weights and validation sets, in one YAML file "
        "(docs/continual_pretraining.md).",
    )
    group.add_argument(
        "--sft-overlong",
        choices=("drop", "cut-at-turn", "refuse"),
        default="refuse",
        help="With --sft: conversations longer than --seq-length are dropped, cut before the user "
        "message from which on they are too long, or end the run (the default).",
    )
    group.add_argument(
        "--document-positions",
        choices=("restart", "run-on"),
        default=None,
        help="Whether each document of a packed sequence starts at position 0 (the default) or "
        "positions continue. Attention stays within documents and depends only on position "
        "differences, so both give the same result up to rounding.",
    )
    group.add_argument(
        "--memory",
        choices=list(POLICIES),
        default=None,
        help="Activation recompute: fast recomputes nothing, balanced the cheap activations, "
        "experts the MoE layer, lean everything but the input of each layer. --recompute-* and "
        "--lm-loss-chunk-size take precedence.",
    )
    group.add_argument(
        "--fp8",
        dest="fp8_word",
        action="store_true",
        help="The experts' GEMMs in FP8 on Hopper, without TransformerEngine: --fp8-format e4m3 "
        "--fp8-recipe rowwise.",
    )
    group.set_defaults(expert_fp8_recipe=None)


def _add_run_arguments(parser: ArgumentParser) -> None:
    """Flags of the run: directory, logging, checkpoints, trained parameters."""
    group = parser.add_argument_group(title="run")
    group.add_argument(
        "--run-dir",
        metavar="DIR",
        default=None,
        help="Directory for all output of the run: metrics.jsonl, run.json, Megatron's own "
        "output (megatron-rank*.log) and checkpoints/, from which a restart resumes.",
    )
    group.add_argument(
        "--no-checkpoints",
        action="store_true",
        help="Write no checkpoints in --run-dir, for a trial or a benchmark: such a run cannot "
        "resume.",
    )
    group.add_argument(
        RECIPE,
        metavar="FILE",
        action="append",
        default=None,
        help="Read flags from a file (examples/gpt_oss/recipes); flags on the command line take "
        "precedence.",
    )
    group.add_argument(
        DRY_RUN,
        type=parse_machines,
        nargs="?",
        const=TORCHRUN,
        default=None,
        metavar="GPUS",
        help="Print memory and time per step for these flags, and exit before creating anything. "
        "GPUS: number of GPUs to assume, or MACHINESxGPUS; by default the number of ranks that "
        "torchrun started, 1 without torchrun.",
    )
    group.add_argument(
        HELP_ALL, action="store_true", help="List all flags, including Megatron's, and exit."
    )
    group.add_argument(
        ALLOW_UNTESTED,
        action="store_true",
        help="Allow Megatron flags that this repository does not test (docs/flags.md), and log "
        "them. By default they are refused.",
    )
    group.add_argument(
        "--monitor-interval",
        type=int,
        metavar="STEPS",
        default=100,
        help="Every N steps, log expert load and router entropy of each layer, weight and gradient "
        "norms by module type, and the range of the sinks. 0: never.",
    )
    group.add_argument(
        "--sample-interval",
        type=int,
        metavar="STEPS",
        default=0,
        help="Generate a text sample every N steps. 0: never.",
    )
    group.add_argument("--sample-prompt", type=text, default="", help="Prompt of the samples.")
    group.add_argument(
        "--sample-tokens", type=int, default=64, metavar="N", help="Maximum sample length."
    )
    group.add_argument("--sample-temperature", type=float, default=0.8, help="0: greedy decoding.")
    group.add_argument(
        "--keep-checkpoints",
        type=int,
        metavar="K",
        default=0,
        help="Keep the K newest complete checkpoints; delete older ones after each save. "
        "0: keep all.",
    )
    group.add_argument(
        "--freeze",
        nargs="+",
        metavar="PATTERN",
        default=[],
        help="Do not train the parameters whose names match, for example '*.router.*' "
        "'embedding.*': "
        "no gradient, no optimizer state.",
    )
    group.add_argument(
        "--lr-multiplier",
        nargs="+",
        metavar="PATTERN=FACTOR",
        default=[],
        help="Learning rates of the parameters whose names match, as multiples of --lr and "
        "--min-lr, for example '*.softmax_offset=0.1'. The last matching pattern applies. 0 keeps "
        "them constant.",
    )
    parser.set_defaults(
        micro_batch_size=1,
        log_interval=1,
        save_interval=500,
        eval_interval=500,
        eval_iters=10,
        # SIGTERM and SIGUSR1 make the run save and exit.
        exit_signal_handler=True,
        # Every layer has causal attention, for which the kernels need no mask.
        create_attention_mask_in_dataloader=False,
        # A checkpoint resumes in any layout; upstream's default needs the same TP and PP.
        dist_ckpt_optim_fully_reshardable=True,
        # Writer of --async-save.
        async_strategy=ASYNC_STRATEGY,
    )
