# Copyright (c) 2026, the megatron-core gptoss authors.

"""Imports for ranks of a `RankPool` and for `commands`, done once by their fork server.

Nothing here may fail: on the releases that the patches are proved on, some of it does not exist.
"""

import contextlib
import gc
import importlib
import warnings
from argparse import ArgumentParser

import pytest  # noqa: F401

from tests.harness import commands  # noqa: F401

with warnings.catch_warnings(), contextlib.suppress(Exception):
    warnings.simplefilter("ignore")
    import torch  # noqa: F401

    import megatron.training.training  # noqa: F401
    from megatron.gpt_oss.training import pretrain as run  # noqa: F401
    from megatron.training.arguments import add_megatron_arguments
    from tests.harness.command_lines import docstrings_read_once

    # Megatron's parser reads the source of 26 classes for its help, each time, and pretrain() makes
    # another parser: a second a run.
    docstrings_read_once(for_good=True)
    add_megatron_arguments(ArgumentParser())

# What pretrain() imports only when it gets there: two seconds of the first call of each rank.
for name in (
    "megatron.core.tokenizers.text",
    "megatron.core.datasets.helpers",
    "megatron.core.dist_checkpointing.gpt_checkpoint_interop",
    "megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader",
    "megatron.core.models.mimo",
    "megatron.training.optimizer_state_check",
    "torch.profiler._cupti_monitor",
    "torch.utils.serialization",
    "transformers.models.auto.tokenization_auto",
):
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        importlib.import_module(name)

# The ranks collect what a call left; these objects stay, and are not looked through each time.
gc.freeze()
