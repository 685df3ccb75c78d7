# Copyright (c) 2026, the megatron-core gptoss authors.

import argparse

from megatron.training.arguments import add_megatron_arguments


def test_help_of_every_flag():
    """Regression: a bare percent sign in one help text ended --help with a ValueError."""
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    text = parser.format_help()
    assert "e.g. 1.10 = 10%" in " ".join(text.split())
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    assert len(shown) > 500 and all(action.option_strings[0] in text for action in shown)
