# Copyright (c) 2026, the megatron-core gptoss authors.
"""Materialise upstream into megatron/, then build as usual. Metadata is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

from patch_queue.errors import QueueError  # noqa: E402
from patch_queue.materialise import Workspace  # noqa: E402
from pybind11.setup_helpers import Pybind11Extension  # noqa: E402

try:
    Workspace(ROOT).materialise()
except QueueError as error:
    sys.exit(f"megatron-core gptoss: {error}")

setup(
    ext_modules=[
        Pybind11Extension(
            "megatron.core.datasets.helpers_cpp",
            sources=["megatron/core/datasets/helpers.cpp"],
            extra_compile_args=["-O3"],
            cxx_std=17,
        )
    ]
)
