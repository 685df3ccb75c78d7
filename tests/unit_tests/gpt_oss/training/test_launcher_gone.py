# Copyright (c) 2026, the megatron-core gptoss authors.

"""A rank whose launcher is killed while the rank still imports ends too."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from tests.harness.ranks import free_port

ROOT = Path(__file__).resolve().parents[4]
# Starts a rank as torchrun does, says its number, and waits to be killed.
LAUNCHER = """
import subprocess, sys, time
print(subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL).pid, flush=True)
time.sleep(600)
"""


def test_killed_during_the_imports(tmp_path):
    """It came to the rendezvous, whose server had been the launcher, and waited there."""
    rank = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = "--preset tiny --mock-data --micro-batch-size 1 --seq-length 64 --train-iters 2"
    words += f" --tokenizer-type NullTokenizer --vocab-size 256 --run-dir {tmp_path}"
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, sys.executable, "pretrain_gpt_oss.py", *words.split()],
        cwd=ROOT,
        env={**os.environ, **rank, **address, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    started = psutil.Process(int(launcher.stdout.readline()))
    # As soon as it imports torch, which takes a second.
    while not any("libtorch" in region.path for region in started.memory_maps()):
        assert started.is_running()
    launcher.kill()
    launcher.wait()
    try:
        started.wait(5)
    except psutil.TimeoutExpired:
        os.kill(started.pid, signal.SIGKILL)
        raise AssertionError("the rank still runs") from None
