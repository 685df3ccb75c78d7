# Copyright (c) 2026, the megatron-core gptoss authors.

"""What every rank of a `RankPool` needs, done once by the server that the ranks are forked from.

Nothing here may fail: on the releases that the patches are proved on, some of it does not exist.
"""

import contextlib
import gc
import warnings
from argparse import ArgumentParser

with warnings.catch_warnings(), contextlib.suppress(Exception):
    warnings.simplefilter('ignore')
    import torch  # noqa: F401

    import megatron.training.training  # noqa: F401
    from megatron.gpt_oss.training import run  # noqa: F401
    from megatron.training.arguments import add_megatron_arguments
    from tests.unit_tests.command_lines import docstrings_read_once

    # Megatron's parser reads the source of 26 classes for its help, each time, and pretrain() makes
    # another parser: a second a run.
    docstrings_read_once().start()
    add_megatron_arguments(ArgumentParser())

# The ranks collect what a call left; these objects stay, and are not looked through each time.
gc.freeze()
