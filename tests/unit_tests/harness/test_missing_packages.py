# Copyright (c) 2026, the megatron-core gptoss authors.

"""A test that is skipped for a missing package fails CI."""

import os
import sys
from pathlib import Path

import pytest

from tests.harness import commands
from tests.harness.missing_packages import complaints

CONFTEST = Path(__file__).parents[1] / "conftest.py"


@pytest.mark.parametrize(
    "reason, wrong",
    [
        ("could not import 'triton': No module named 'triton'", True),
        ("Skipped: triton is not installed", True),
        ("could not import 'tensorboard.backend': No module named 'tensorboard'", True),
        ("this Triton's interpreter does not know this NumPy (3.6 and 2.4)", True),
        ("could not import 'transformer_engine': No module named 'transformer_engine'", False),
        ("needs a CUDA device", False),
    ],
)
def test_reasons(reason, wrong):
    assert bool(complaints([reason])) is wrong


@pytest.mark.parametrize("ci, code", [("true", 1), ("", 0)])
def test_run(tmp_path, ci, code):
    """A pytest run passes on a laptop and fails in CI."""
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
    (tmp_path / "test_one.py").write_text(
        "import pytest\n\ndef test_one():\n    pytest.importorskip('no_such_package')\n"
    )
    environment = {**os.environ, "CI": ci, "PYTHONPATH": str(CONFTEST.parents[2])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = commands.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert ("skipped for want of no_such_package" in done.stdout) is bool(code)
