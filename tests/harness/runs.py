# Copyright (c) 2026, the megatron-core gptoss authors.

"""pretrain_gpt_oss.py's main() in the ranks of a RankPool, on a tiny model and a small corpus."""

import contextlib
import io
import signal
import time
from pathlib import Path

from megatron.gpt_oss.training.metrics.jsonl import read_metrics

COMMON = (
    "--preset tiny --preset-layers 2 --split 90,10,0 --seq-length 64 --micro-batch-size 1 "
    "--global-batch-size 4 --lr 1e-3 --lr-warmup-iters 1 --eval-iters 1 --monitor-interval 0 "
    "--distributed-timeout-minutes 1 --num-workers 0"
)


def write_inputs(folder: Path, num_layers: int = 2) -> Path:
    """A tiny model and tokens, for `start`; returns the directory."""
    import dataclasses

    from megatron.gpt_oss.data.byte_tokenizer import build_byte_tokenizer, write_byte_tokenizer
    from megatron.gpt_oss.data.tokenize.files import tokenize_files
    from megatron.gpt_oss.data.tokenizer_files import load_text_tokenizer
    from megatron.gpt_oss.presets import get_preset
    from tests.harness.models import trained_tensors, write_hf

    preset = dataclasses.replace(get_preset("tiny"), num_layers=num_layers)
    write_hf(folder / "hf", preset, trained_tensors(preset))
    write_byte_tokenizer(folder / "hf")
    files = sorted(
        str(path) for path in Path(__file__).parents[1].glob("unit_tests/gpt_oss/**/test_*.py")
    )
    tokenizer = load_text_tokenizer(folder / "hf")
    tokenize_files(files[:12], str(folder / "data"), tokenizer)
    assert build_byte_tokenizer().get_vocab_size() <= preset.vocab_size
    return folder


def command(inputs: Path, run_dir: Path, flags: str) -> list[str]:
    """The arguments of the script."""
    where = f"--load-hf {inputs}/hf --data-path {inputs}/data --run-dir {run_dir}"
    return f"{COMMON} {where} {flags}".split()


def start(ranks, inputs: Path, run_dir: Path, flags: str, world_size: int = 1) -> list[dict]:
    """Train, and return the records of metrics.jsonl."""
    argv = command(inputs, run_dir, flags)
    ranks.run(main_in_rank, argv, world_size=world_size, init_process_group=False)
    return read_metrics(run_dir / "metrics.jsonl")


def main_in_rank(argv: list[str], prepare=None) -> str:
    """main() as a process of its own would run it; returns what it printed for people.

    `prepare()` may register callbacks of its own before.
    """
    from megatron.gpt_oss.training.pretrain import main
    from megatron.training import step_callbacks
    from megatron.training.training import set_startup_timestamps

    step_callbacks.clear()
    # Upstream reduces it over the ranks where it is set, as an earlier run leaves it on some.
    set_startup_timestamps(program_start=time.time())
    if prepare is not None:
        prepare()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            main(argv)
    except SystemExit as stop:
        if stop.code:
            raise
    finally:
        step_callbacks.clear()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return printed.getvalue()


def steps(records: list[dict]) -> dict[int, dict]:
    """The records of training steps, by step."""
    return {record["step"]: record for record in records if "loss" in record}


def only(records: list[dict], key: str) -> dict[int, dict]:
    """What records of one kind hold, by step: 'experts', 'norms' or 'sample'."""
    return {record["step"]: record[key] for record in records if key in record}
