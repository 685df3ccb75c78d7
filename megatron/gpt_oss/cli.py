# Copyright (c) 2026, the megatron-core gptoss authors.

"""The `gptoss` command: what is done before and after a training run.

Each subcommand imports what it needs when it runs, so that --help is instant.
"""

import argparse
import logging
from typing import NoReturn, Sequence

from megatron.gpt_oss.arguments.check_values import number, path, text
from megatron.gpt_oss.data.tokenize.arguments import add_tokenize_arguments
from megatron.gpt_oss.errors import UsageError, run_main
from megatron.gpt_oss.import_warnings import silence_import_notices
from megatron.gpt_oss.presets import PRESETS

_seed = number(int, "0 to 4294967295")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake is one sentence and exit code 2."""

    def run() -> None:
        args = build_parser().parse_args(argv)
        silence_import_notices()
        logging.basicConfig(level=logging.ERROR)
        args.run(args)

    run_main(run)


class _Parser(argparse.ArgumentParser):
    """A parser whose mistakes are one sentence, as all others."""

    def error(self, message: str) -> NoReturn:
        text = f"{message[:1].upper()}{message[1:]}"
        raise UsageError(f"{text}. `{self.prog} --help` lists all options.")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; each sets `run`, a function of its arguments."""
    parser = _Parser(prog="gptoss", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_launch(commands)
    _add_tokenize(commands)
    _add_verify_data(commands)
    _add_init_tiny(commands)
    _add_convert(commands)
    _add_verify(commands)
    _add_sample(commands)
    _add_plot(commands)
    _add_report(commands)
    _add_presets(commands)
    _add_doctor(commands)
    _add_plan(commands)
    return parser


def _add_launch(commands) -> None:
    # No character begins an option of this parser: all words are torchrun's.
    parser = commands.add_parser(
        "launch",
        help="run torchrun; return the exit status of the failed rank",
        prefix_chars="\0",
        add_help=False,
    )
    parser.add_argument("words", nargs="*", metavar="[OPTION ...] SCRIPT [FLAG ...]")
    parser.set_defaults(run=_run_launch)


def _run_launch(args: argparse.Namespace) -> None:
    from megatron.gpt_oss.launch import launch

    launch(args.words)


def _add_tokenize(commands) -> None:
    parser = commands.add_parser(
        "tokenize", help="convert text files to Megatron's indexed dataset"
    )
    add_tokenize_arguments(parser)
    parser.set_defaults(run=_run_tokenize)


def _run_tokenize(args: argparse.Namespace) -> None:
    from megatron.gpt_oss.data.tokenize.command import run_tokenize

    run_tokenize(args)


def _add_verify_data(commands) -> None:
    parser = commands.add_parser(
        "verify-data", help="check a dataset against what gptoss tokenize wrote"
    )
    parser.add_argument(
        "prefix",
        nargs="+",
        type=path,
        metavar="PREFIX",
        help="path of the .bin and .idx, without extension",
    )
    parser.set_defaults(run=_run_verify_data)


def _run_verify_data(args: argparse.Namespace) -> None:
    from megatron.gpt_oss.data.verify_data import verify_data

    if not verify_data(args.prefix, progress=True):
        raise SystemExit(1)


def _add_init_tiny(commands) -> None:
    parser = commands.add_parser("init-tiny", help="write a tiny random Hugging Face checkpoint")
    parser.add_argument("directory", type=path)
    parser.add_argument("--seed", type=_seed, default=0)
    parser.set_defaults(run=_run_init_tiny)


def _run_init_tiny(args: argparse.Namespace) -> None:
    from megatron.gpt_oss.diagnostics.random_checkpoint import write_tiny_hf

    print(f"{write_tiny_hf(args.directory, args.seed)}: tiny gpt-oss, seed {args.seed}")


def _add_convert(commands) -> None:
    parser = commands.add_parser("convert", help="convert checkpoints between formats")
    directions = parser.add_subparsers(required=True, metavar="DIRECTION")
    to_megatron = directions.add_parser(
        "to-megatron", help="convert a Hugging Face checkpoint (BF16 or MXFP4) to Megatron"
    )
    to_megatron.add_argument(
        "--hf", required=True, type=path, help="directory of the Hugging Face checkpoint"
    )
    to_megatron.add_argument("--out", required=True, type=path, help="output directory, for --load")
    for flag, what in (
        ("tp", "tensor"),
        ("pp", "pipeline"),
        ("ep", "expert"),
        ("etp", "expert tensor (default: same as --tp)"),
        ("vpp", "virtual pipeline, per stage"),
    ):
        to_megatron.add_argument(
            f"--{flag}",
            type=number(int, "1 or more"),
            default=None if flag == "etp" else 1,
            metavar="N",
            help=f"parallel size of the written files: {what}. Any layout can load any other",
        )
    to_megatron.set_defaults(run=_run_to_megatron)
    to_hf = directions.add_parser("to-hf", help="convert a Megatron checkpoint to Hugging Face")
    to_hf.add_argument(
        "--load",
        required=True,
        type=path,
        help="a --save directory (its latest) or one iter_*",
    )
    to_hf.add_argument("--out", required=True, type=path, help="output directory")
    to_hf.add_argument(
        "--like", type=path, help="Hugging Face checkpoint that supplies config and tokenizer"
    )
    to_hf.add_argument(
        "--dtype",
        choices=("bf16", "fp32", "mxfp4"),
        default="bf16",
        help="mxfp4: expert weights in MXFP4, rounded to nearest; the rest in bf16",
    )
    to_hf.add_argument(
        "--yarn-factor",
        type=number(float, "more than 0"),
        metavar="F",
        help="value used in training, for config.json; by default from the checkpoint",
    )
    to_hf.add_argument(
        "--vocab-size",
        type=number(int, "1 or more"),
        metavar="N",
        help="write the first N rows of the vocabulary; by default all but padding",
    )
    to_hf.add_argument(
        "--overwrite", action="store_true", help="replace an earlier export, but nothing else"
    )
    to_hf.set_defaults(run=_run_to_hf)


def _run_to_megatron(args: argparse.Namespace) -> None:
    from pathlib import Path

    from megatron.gpt_oss.checkpoint.import_hf import Job
    from megatron.gpt_oss.checkpoint.torch_dist.layout import ParallelSizes

    _settle_in()
    job = Job(Path(args.hf), ParallelSizes(args.tp, args.pp, args.ep, args.etp, args.vpp))
    _announce(args.hf, args.out, job.bytes_total())
    print(f"{job.run(Path(args.out), progress=True)}: written")


def _run_to_hf(args: argparse.Namespace) -> None:
    from pathlib import Path

    from megatron.gpt_oss.checkpoint.export_hf import ExportJob

    _settle_in()
    job = ExportJob(
        args.load,
        args.like,
        args.dtype,
        yarn_factor=args.yarn_factor,
        vocab_size=args.vocab_size,
    )
    if job.vocabulary.note:
        print(job.vocabulary.note)
    _announce(args.load, args.out, job.plan.bytes_total())
    print(f"{job.run(Path(args.out), args.overwrite, progress=True)}: written")


def _settle_in() -> None:
    """What suits a process that only converts."""
    import torch

    from megatron.gpt_oss.checkpoint.read_ahead import keep_freed_memory

    keep_freed_memory()
    # `read_ahead` has threads of its own. PyTorch's would wait for each other on a busy machine:
    # 42 s instead of 17 for one layer of 20b on 2 cores.
    torch.set_num_threads(1)


def _announce(source: str, out: str, needed: int) -> None:
    """Say what a conversion takes before it begins."""
    from megatron.gpt_oss.checkpoint.resumable_output import free_space, gigabytes

    free = gigabytes(free_space(out))
    print(f"{source} -> {out}: needs {gigabytes(needed)}, {free} are free", flush=True)


def _add_verify(commands) -> None:
    parser = commands.add_parser(
        "verify", help="compare a Megatron checkpoint with a Hugging Face checkpoint"
    )
    parser.add_argument(
        "--hf", required=True, type=path, help="directory of the Hugging Face checkpoint"
    )
    parser.add_argument(
        "--load", required=True, type=path, help="a --save directory (its latest) or one iter_*"
    )
    parser.add_argument(
        "--logits",
        choices=("auto", "yes", "no"),
        default="auto",
        help="also compare logits, layer by layer; auto: if both models fit in memory",
    )
    parser.add_argument(
        "--num-tokens",
        type=number(int, "1 or more"),
        default=64,
        help="sequence length for the logits",
    )
    parser.set_defaults(run=_run_verify)


def _run_verify(args: argparse.Namespace) -> None:
    from megatron.gpt_oss.checkpoint.verify import verify

    if not verify(args.hf, args.load, args.logits, args.num_tokens, progress=True):
        raise SystemExit(1)


def _add_sample(commands) -> None:
    parser = commands.add_parser("sample", help="generate text from a Hugging Face checkpoint")
    parser.add_argument("directory", type=path)
    parser.add_argument("--prompt", type=text, default="")
    parser.add_argument("--max-new-tokens", type=number(int, "1 or more"), default=200)
    parser.add_argument(
        "--temperature", type=number(float, "0 or more"), default=0.8, help="0: greedy decoding"
    )
    parser.add_argument("--seed", type=_seed, default=0)
    parser.set_defaults(run=_run_sample)


def _run_sample(args: argparse.Namespace) -> None:
    from megatron.gpt_oss.diagnostics.sample import sample_hf

    print(sample_hf(args.directory, args.prompt, args.max_new_tokens, args.temperature, args.seed))


def _add_plot(commands) -> None:
    parser = commands.add_parser("plot", help="plot the loss curve of a run as PNG")
    parser.add_argument("metrics", type=path, help="metrics.jsonl of a run")
    parser.add_argument("out", help="PNG file to write")
    parser.add_argument("--title", default="gpt-oss")
    parser.set_defaults(run=_run_plot)


def _run_plot(args: argparse.Namespace) -> None:
    from megatron.gpt_oss.training.metrics.plot import plot_loss

    print(f"{plot_loss(args.metrics, args.out, args.title)}: written")


def _add_report(commands) -> None:
    parser = commands.add_parser("report", help="write an HTML report of a run")
    parser.add_argument("run_dir", type=path, metavar="RUN", help="--run-dir of the run")
    parser.add_argument("--out", help="HTML file; RUN/report.html by default")
    parser.set_defaults(run=_run_report)


def _run_report(args: argparse.Namespace) -> None:
    from megatron.gpt_oss.training.metrics.report import write_report

    print(f"{write_report(args.run_dir, args.out)}: written")


def _add_presets(commands) -> None:
    parser = commands.add_parser("presets", help="print the Megatron arguments of a preset")
    parser.add_argument(
        "name", nargs="?", help=f"one of {', '.join(PRESETS)}; by default list the names"
    )
    parser.set_defaults(run=_run_presets)


def _run_presets(args: argparse.Namespace) -> None:
    from megatron.gpt_oss.presets import get_preset, preset_flags

    if args.name is None:
        print("\n".join(PRESETS))
        return
    for name, value in preset_flags(get_preset(args.name)).items():
        print(f"{name:40} {value}")


def _add_doctor(commands) -> None:
    parser = commands.add_parser(
        "doctor", help="list and time the attention kernels of this machine"
    )
    parser.add_argument(
        "--preset", default="20b", help="preset that defines heads and window; 20b by default"
    )
    parser.add_argument("--seqlen", type=int, default=8192)
    parser.add_argument(
        "--no-measure", action="store_true", help="list what can run, without timing"
    )
    parser.add_argument("--flex", action="store_true", help="also compile and time FlexAttention")
    parser.add_argument("--json", metavar="PATH", help="also write the report to PATH")
    parser.set_defaults(run=_run_doctor)


def _run_doctor(args: argparse.Namespace) -> None:
    from megatron.gpt_oss.diagnostics.doctor import run_doctor

    run_doctor(args.preset, args.seqlen, not args.no_measure, args.flex, args.json)


def _add_plan(commands) -> None:
    parser = commands.add_parser(
        "plan", help="list layouts that fit given GPUs: memory, time, flags"
    )
    from megatron.gpt_oss.planner.command import add_arguments

    add_arguments(parser)


if __name__ == "__main__":
    main()
