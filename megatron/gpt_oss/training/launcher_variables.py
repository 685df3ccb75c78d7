# Copyright (c) 2026, the megatron-core gptoss authors.
"""The environment variables by which torchrun tells a process its rank."""

import contextlib
import os
import re
from collections.abc import Iterator

from megatron.gpt_oss.errors import UsageError

_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
LAUNCHER_VARIABLES = (*_RANK, "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def check_rank_variables() -> None:
    """Refuse variables of torchrun that hold no rank.

    Raises:
        UsageError: names the variable and its value.
    """
    hint = "Start the run with torchrun, which sets it, or unset it."
    for name in _RANK:
        value = os.environ.get(name, "1")
        if not re.fullmatch(r"[0-9]{1,6}", value) or (name == "WORLD_SIZE" and int(value) == 0):
            raise UsageError(f"The environment variable {name} is {value!r}. {hint}")
    rank, ranks = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if int(rank) >= int(ranks):
        raise UsageError(f"The environment variable RANK is {rank} of {ranks} ranks. {hint}")


def set_launcher_variables() -> None:
    """Set torchrun's variables for one rank, if the script was started without torchrun.

    Raises:
        UsageError: a rank is set, but not where the ranks meet.
    """
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = "0"  # any free port
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UsageError(
            f"The environment variable RANK is set, {' and '.join(missing)} not. Start the run "
            "with torchrun, which sets them, or unset RANK."
        )


@contextlib.contextmanager
def as_rank_of(world_size: int) -> Iterator[None]:
    """Set the variables of a rank among so many, for Megatron's validation, which reads them."""
    before = {name: os.environ.get(name) for name in _RANK}
    os.environ["WORLD_SIZE"] = str(world_size)
    for name in ("RANK", "LOCAL_RANK"):
        os.environ.setdefault(name, "0")
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
