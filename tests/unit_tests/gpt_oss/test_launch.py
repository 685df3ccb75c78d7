# Copyright (c) 2026, the megatron-core gptoss authors.

"""gptoss launch: torchrun's options, exit status and messages of the ranks."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.harness import commands

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import os, signal, sys, time
what, rank, ready = sys.argv[1], int(os.environ['RANK']), sys.argv[2]
signal.signal(signal.SIGUSR1, lambda *_: (open(f'{ready}-saved{rank}', 'w'), sys.exit(0)))
open(f'{ready}{rank}', 'w').close()
if what == 'wait' or (rank == 0 and what != 'usage'):
    time.sleep(600)
if what == 'killed':
    os.kill(os.getpid(), signal.SIGKILL)
if what == 'usage':
    time.sleep(rank)
    print('error: no such thing', file=sys.stderr)
sys.exit({'usage': 2, 'fault': 1, 'seven': 7}[what])
"""


def start(tmp_path, *words, popen=commands.Popen):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        "from megatron.gpt_oss.cli import main; main()",
    ]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    environ.pop("OMP_NUM_THREADS", None)
    return popen([*command, "launch", *words], stderr=subprocess.PIPE, text=True, env=environ)


def ranks(tmp_path, what, **options):
    words = ("--standalone", "--nproc-per-node", "2", str(tmp_path / "script.py"))
    return start(tmp_path, *words, what, str(tmp_path / "ready"), **options)


@pytest.mark.parametrize(
    "what, code, error",
    [
        ("usage", 2, "error: no such thing\n"),
        ("seven", 7, ""),
        ("killed", 128 + signal.SIGKILL, "was killed by SIGKILL. Rerun the same command"),
    ],
)
def test_status(tmp_path, what, code, error):
    """The status of the failed rank; for a killed rank also a message with its rank and signal."""
    # One in a Python of its own: what an import says would be printed too.
    process = ranks(tmp_path, what, popen=subprocess.Popen if what == "usage" else commands.Popen)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == code
    assert (error in printed) if what == "killed" else printed == error
    assert printed.count("\n") <= 1


def wait_until_ready(process, tmp_path):
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)


def test_nohup(tmp_path):
    """A signal that is ignored at the start stays ignored; torchrun would end the run."""

    def without_sighup(command, **options):
        words = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *command]
        return subprocess.Popen(words, **options)

    process = ranks(tmp_path, "wait", popen=without_sighup)
    wait_until_ready(process, tmp_path)
    process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGUSR1


def test_usr1_reaches_the_ranks(tmp_path):
    process = ranks(tmp_path, "wait")
    wait_until_ready(process, tmp_path)
    process.send_signal(signal.SIGUSR1)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGUSR1 and printed == ""
    assert all((tmp_path / f"ready-saved{rank}").exists() for rank in (0, 1))


@pytest.mark.parametrize(
    "words, message",
    [
        ((), "training_script"),
        (("--nproc-per-nod",), "expected one argument"),
        (("--nproc-per-node", "many", "x.py"), "torchrun refuses these options: .*'?many"),
        (("--nnodes", "0:x", "x.py"), "refuses these options"),
        (("--nnodes", "2:1", "x.py"), "refuses these options"),
        (("--nproc-per-node", "\N{SUPERSCRIPT TWO}", "x.py"), "refuses these options"),
        (("--nnodes", "1:2:3", "x.py"), "refuses these options"),
        (("--nproc-per-node", "0", "x.py"), "--nproc-per-node 0: expected more than 0"),
        (("--max-restarts", "-1", "x.py"), "refuses these options"),
        (("--monitor-interval", "0", "x.py"), "--monitor-interval 0.0: expected more than 0"),
        (("--standalone", "--nnodes", "2", "x.py"), "--standalone is for one machine"),
    ],
)
def test_mistakes(tmp_path, words, message):
    process = start(tmp_path, *words)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 2 and printed.startswith("error: ")
    assert re.search(message, printed) and printed.count("\n") == 1
