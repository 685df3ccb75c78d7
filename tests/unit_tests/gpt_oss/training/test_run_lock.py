# Copyright (c) 2026, the megatron-core gptoss authors.

"""Only one run at a time uses a directory; the lock of a dead run is detected and reported."""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.training import run_dir, run_lock
from megatron.gpt_oss.training.run_lock import RunLock
from tests.harness import commands

ROOT = Path(__file__).resolve().parents[4]
# Holds the lock of argv[1] until it is killed; argv[2] may say that locks are not known here.
HOLD = """
import errno, fcntl, sys, time
from pathlib import Path
from megatron.gpt_oss.training import run_lock
run_lock.BEAT = 0.1
if sys.argv[2:] == ['no locks']:
    def lockf(*args):
        raise OSError(errno.ENOLCK, 'no locks')
    fcntl.lockf = lockf
with run_lock.RunLock(Path(sys.argv[1]), print):
    print('held', flush=True)
    if sys.argv[2:] == ['child']:
        import os
        if os.fork() == 0:
            os.close(1)
        time.sleep(600)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    for name, seconds in (("BEAT", 0.1), ("PATIENCE", 1.0), ("GRACE", 1.0)):
        monkeypatch.setattr(run_lock, name, seconds)


@pytest.fixture
def holder(tmp_path):
    """Starts a process that holds the lock of tmp_path."""
    started = []

    def start(*words, directory=tmp_path):
        command = [sys.executable, "-c", HOLD, str(directory), *words]
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        started.append(commands.Popen(command, stdout=subprocess.PIPE, text=True, env=environ))
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield start
    for process in started:
        process.close()


def kept(tmp_path):
    return json.loads((tmp_path / "run.lock.json").read_text())


def test_taken_and_given_back(tmp_path):
    lines = []
    for _ in range(2):
        with RunLock(tmp_path, lines.append):
            assert kept(tmp_path)["pid"] == os.getpid()
        assert not (tmp_path / "run.lock.json").exists()
    assert lines == []


def test_second_run(tmp_path, holder):
    process = holder()
    with pytest.raises(
        UsageError, match=f"in use by another run: process {process.pid} on .*, sta"
    ):
        with RunLock(tmp_path, print):
            pass
    assert kept(tmp_path)["pid"] == process.pid


@pytest.mark.parametrize("words", [(), ("child",)])
def test_killed(tmp_path, holder, words):
    """The lock goes with the process, though what it forked lives on."""
    process = holder(*words)
    process.send_signal(signal.SIGKILL)
    process.wait()
    lines = []
    with RunLock(tmp_path, lines.append):
        assert kept(tmp_path)["pid"] == os.getpid()
    assert (
        len(lines) == 1
        and f"ended without releasing its lock: process {process.pid} on" in lines[0]
    )


def test_killed_while_it_is_waited_for(tmp_path, holder):
    process = holder()
    subprocess.Popen(["sh", "-c", f"sleep 0.4; kill -9 {process.pid}"])
    with RunLock(tmp_path, lambda line: None):
        assert kept(tmp_path)["pid"] == os.getpid()


def of_another_machine(tmp_path):
    found = kept(tmp_path) | {"boot": "another", "host": "node7"}
    (tmp_path / "run.lock.json").write_text(json.dumps(found))
    return found


def test_dead_machine(tmp_path, holder):
    """Its lock is not seen here, and its number stands still."""
    process = holder()
    process.kill()
    process.wait()
    of_another_machine(tmp_path)
    lines = []
    start = time.monotonic()
    with RunLock(tmp_path, lines.append):
        assert time.monotonic() - start > run_lock.PATIENCE
    assert "to see whether it is alive" in lines[0] and "on node7" in lines[0]
    assert "takes the lock over" in lines[1]


def test_live_machine_whose_locks_are_not_seen(tmp_path, holder, monkeypatch):
    holder("no locks")
    monkeypatch.setattr(run_lock, "_boot", lambda: "another")
    with pytest.raises(UsageError, match="in use by another run"):
        with RunLock(tmp_path, lambda line: None):
            pass


def test_taken_over_while_it_stood_still(tmp_path, holder):
    """Two runs never train at the same time: the suspended one ends when it continues."""
    process = holder("no locks")
    process.send_signal(signal.SIGSTOP)
    of_another_machine(tmp_path)
    with RunLock(tmp_path, lambda line: None):
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=20) == 1
        assert kept(tmp_path)["pid"] == os.getpid()


def test_a_link(tmp_path):
    """A link may lead to the lock of another directory."""
    (tmp_path / "run.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="^.*/run.lock is a symbolic link.* Remove it"):
        with RunLock(tmp_path, print):
            pass
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("text", ["", '{"pid', "[1]", '{"pid": "x", "boot": 3}'])
def test_damaged_holder(tmp_path, text):
    (tmp_path / "run.lock.json").write_text(text)
    with RunLock(tmp_path, lambda line: None):
        assert kept(tmp_path)["pid"] == os.getpid()


@pytest.mark.parametrize(
    "held, flags",
    [
        ("run", {"run_dir": None, "save": "run/checkpoints"}),
        ("run", {"run_dir": "other", "save": "run/checkpoints"}),
        ("run/checkpoints", {"run_dir": "run", "save": "run/checkpoints"}),
        ("saved", {"run_dir": "other", "save": "saved"}),
        ("saved", {"run_dir": "other", "save": "link"}),
    ],
)
def test_same_save_directory(tmp_path, holder, monkeypatch, held, flags):
    """Each --save is locked, whatever --run-dir is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")
    for name in ("run/checkpoints", "saved"):
        os.makedirs(name)
    os.symlink("saved", "link")
    holder(directory=tmp_path / held)
    with pytest.raises(UsageError, match="is in use by another run"):
        with run_dir.locked(Namespace(**flags)):
            pass


def test_one_lock_of_a_run_directory(tmp_path, monkeypatch):
    """--run-dir alone has no second lock in its checkpoints."""
    monkeypatch.setenv("RANK", "0")
    with run_dir.locked(Namespace(run_dir=str(tmp_path), save=str(tmp_path / "checkpoints"))):
        assert sorted(os.listdir(tmp_path)) == ["run.lock", "run.lock.json"]
