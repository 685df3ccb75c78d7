# Copyright (c) 2026, the megatron-core gptoss authors.
"""From what a run starts: its own checkpoint, other weights or random ones."""

import os
from argparse import Namespace
from pathlib import Path

from megatron.core.dist_checkpointing.checkpoint_names import TRACKER
from megatron.gpt_oss.errors import UsageError
from megatron.training.checkpoint_integrity import (
    CheckpointLoadError,
    choose,
    holds_checkpoint,
    iteration_dir,
)


def has_checkpoint(directory: str | None) -> bool:
    """Whether a --save or --load directory has a checkpoint to load, complete or not."""
    if directory is None:
        return False
    return (Path(directory) / TRACKER).is_file() or holds_checkpoint(directory)


def resumes(args: Namespace) -> bool:
    """Whether the run continues at the step of a checkpoint, with its optimizer state."""
    return has_checkpoint(args.load) and not args.finetune


def check_load(args: Namespace) -> None:
    """Refuse to load from a directory without a checkpoint: Megatron would train random weights.

    --load may name the directory that the run itself is going to save to. A --ckpt-step that does not
    exist is refused too.

    Raises:
        UsageError: names the flag and the directory.
    """
    _check_step(args)
    if has_checkpoint(args.load):
        return
    wanted = {"--pretrained-checkpoint": args.pretrained_checkpoint}
    paths = [os.path.realpath(path) for path in (args.load, args.save) if path is not None]
    if args.exit_on_missing_checkpoint or len(paths) < 2 or paths[0] != paths[1]:
        wanted["--load"] = args.load
    for flag, directory in wanted.items():
        if directory is None or has_checkpoint(directory):
            continue
        hint = "Give a directory that has latest_checkpointed_iteration.txt"
        if os.path.isfile(os.path.join(directory, "config.json")):
            hint = f"It is a Hugging Face checkpoint: give --load-hf {directory}"
        raise UsageError(f"{flag} {directory} holds no checkpoint. {hint}, or drop the flag.")


def _check_step(args: Namespace) -> None:
    directories = [args.load, args.pretrained_checkpoint]
    directory = next(filter(has_checkpoint, directories), args.load)
    if not args.ckpt_step or directory is None:
        return
    if os.path.isdir(iteration_dir(directory, args.ckpt_step)):
        return  # the load verifies it
    try:
        choose(directory, args.ckpt_step)
    except CheckpointLoadError as error:
        raise UsageError(str(error)) from error


def check_save(args: Namespace) -> None:
    """Refuse to overwrite the checkpoints of a run that this one does not resume.

    Raises:
        UsageError: names the directory and what to give.
    """
    if args.skip_train or not has_checkpoint(args.save):
        return
    if resumes(args) and os.path.realpath(args.load) == os.path.realpath(args.save):
        return
    other = f"--load {args.load} --finetune" if args.finetune else f"--load {args.load}"
    hint = f"Give --load {args.save} to resume from them"
    if has_checkpoint(args.load):
        hint = f"To resume from them, give --pretrained-checkpoint {args.load} for {other}"
    raise UsageError(
        f"--save {args.save} holds checkpoints that this run would not resume from and would "
        f"overwrite. {hint}; or save to another directory."
    )


def describe_start(args: Namespace) -> str:
    """The weights of the first step, once the checkpoint is loaded."""
    if args.iteration:
        return f"resumed at step {args.iteration}"
    for directory in (args.load, args.pretrained_checkpoint):
        if has_checkpoint(directory):
            return f"starts at step 0 from the weights of {directory}"
    return f"starts from {args.load_hf}" if args.load_hf else "starts from random weights"
