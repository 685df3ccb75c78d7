# Copyright (c) 2026, the megatron-core gptoss authors.

"""--help: ours and what most runs need, at once; each line is true of Megatron's parser."""

import subprocess
import sys
from pathlib import Path

from megatron.gpt_oss.arguments.check_flags import entries_of
from megatron.gpt_oss.arguments.flags import add_our_arguments
from megatron.gpt_oss.arguments.help import COMMON, help_text
from tests.harness.parser import whole_parser

ROOT = Path(__file__).resolve().parents[4]
SCRIPT = """
import runpy, sys
sys.argv = ['pretrain_gpt_oss.py', '--preset', 'tiny', '--help']
try:
    runpy.run_path('pretrain_gpt_oss.py', run_name='__main__')
except SystemExit as end:
    assert not end.code
assert 'torch' not in sys.modules and 'numpy' not in sys.modules
"""


def test_nothing_heavy_is_imported():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == help_text()
    assert len(done.stdout.splitlines()) < 250


def test_flags_of_megatron_are_as_told():
    flags = [flag for group in COMMON.values() for flag in group]
    assert 55 <= len(flags) <= 65 and len({flag for flag, *_ in flags}) == len(flags)
    for flag, value, meaning in flags:
        action = whole_parser()._option_string_actions[flag]
        assert (action.nargs == 0) == (value is None), flag
        used = {"--optimizer": "adam", "--transformer-impl": "local"}.get(flag, action.default)
        if flag.startswith("--moe-router-load"):
            used = ["aux_loss"]
        assert all(entry.status == "supported" for entry in entries_of(flag, used)), flag
        assert meaning


def test_ours_are_all_there():
    from argparse import ArgumentParser

    text = help_text()
    for flag in add_our_arguments(ArgumentParser(add_help=False))._option_string_actions:
        assert f"\n  {flag} " in text or f"\n  {flag}\n" in text
