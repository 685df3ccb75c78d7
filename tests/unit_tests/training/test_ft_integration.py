# Copyright (c) 2026, the megatron-core gptoss authors.

"""Set-up of fault tolerance at the start of pretrain()."""

from argparse import Namespace

import pytest

from megatron.training import arguments, ft_integration, global_vars


def test_setup_uses_the_parsed_arguments(monkeypatch):
    """It parsed sys.argv again: one second, and other arguments if a script passes its own."""
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", Namespace(enable_ft_package=False))
    monkeypatch.setattr(arguments, "parse_args", lambda **_: pytest.fail("parsed again"))
    ft_integration.setup()
    assert ft_integration.get_rank_monitor_client() is None
