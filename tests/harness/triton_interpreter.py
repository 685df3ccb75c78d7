# Copyright (c) 2026, the megatron-core gptoss authors.

"""Run a file of kernel tests on the CPU, in Triton's interpreter."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

from tests.harness import commands


def run_in_interpreter(tests: Path) -> None:
    """Run in a separate process: triton reads TRITON_INTERPRET when it is imported.

    Skips where triton is missing, or a GPU runs the same tests.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("the kernels are tested on the device")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", str(tests)]
    done = commands.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip("this Triton's interpreter does not know this NumPy (3.6 and 2.4)")
    assert done.returncode == 0, done.stdout[-4000:]
