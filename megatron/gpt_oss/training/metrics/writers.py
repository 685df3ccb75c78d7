# Copyright (c) 2026, the megatron-core gptoss authors.
"""The run's metrics in TensorBoard and Weights & Biases, through the writers that Megatron opens."""

import importlib.util
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron.gpt_oss.errors import UsageError


def check_writers(args: Namespace) -> dict[str, str]:
    """Refuse a writer whose package is not installed, before Megatron opens it.

    Returns:
        Defaults of Megatron's flags for Weights & Biases: the run's name and where it keeps files.
    Raises:
        UsageError: names the flag and what to install or to give.
    """
    here = args.dry_run is None  # a dry run may be made on another machine than the run
    if here and args.tensorboard_dir and importlib.util.find_spec("tensorboard") is None:
        raise UsageError(
            f"--tensorboard-dir {args.tensorboard_dir} needs TensorBoard, which is not installed: "
            "pip install tensorboard, or drop the flag (metrics.jsonl has the same values)."
        )
    if not args.wandb_project:
        return {}
    if here and importlib.util.find_spec("wandb") is None:
        raise UsageError(
            f"--wandb-project {args.wandb_project} needs Weights & Biases, which is not installed: "
            "pip install wandb, or drop the flag (metrics.jsonl has the same values)."
        )
    if args.run_dir is None:
        for name in ("wandb_exp_name", "wandb_save_dir"):
            if not getattr(args, name):
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"--wandb-project needs {flag}, or --run-dir, which sets it.")
        return {}
    return {
        "wandb_exp_name": Path(args.run_dir).resolve().name,
        "wandb_save_dir": str(Path(args.run_dir) / "wandb"),
    }


class Writers:
    """Sends flat numbers to every writer that is open on this rank, the last one."""

    def write(self, section: str, record: dict[str, Any], step: int) -> None:
        """Send the numbers of a record; lists get one curve a layer, dictionaries one an entry."""
        from megatron.training import get_tensorboard_writer, get_wandb_writer

        tensorboard, wandb = get_tensorboard_writer(), get_wandb_writer()
        if tensorboard is None and wandb is None:
            return
        values = dict(flatten(section, record))
        if tensorboard is not None:
            for name, value in values.items():
                tensorboard.add_scalar(name, value, step)
        if wandb is not None:
            wandb.log(values, step)


def flatten(prefix: str, value: Any):
    """('a/b', 1.0) for every number in nested dictionaries and lists."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from flatten(f"{prefix}/{name}", item)
    elif isinstance(value, list):
        width = len(str(len(value) - 1))
        for index, item in enumerate(value):
            yield from flatten(f"{prefix}/{index:0{width}d}", item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield prefix, value
