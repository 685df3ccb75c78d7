# Copyright (c) 2026, the megatron-core gptoss authors.

import subprocess
import sys

PROGRAM = """
import sys
sys.modules["triton"] = None  # import triton now raises ImportError
import megatron.core.pipeline_parallel.schedules as schedules
assert callable(schedules.get_forward_backward_func)
"""


def test_schedules_import_without_triton():
    """Upstream imports a Triton kernel module from schedules.py, unguarded."""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True)
    assert result.returncode == 0, result.stderr.decode()
