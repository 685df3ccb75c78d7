# Copyright (c) 2026, the megatron-core gptoss authors.

"""Plain torchrun: exit status and output after pretrain_gpt_oss.py failed, and other scripts."""

import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from megatron.gpt_oss import torchrun_exit
from tests.unit_tests.gpt_oss.test_launch import SCRIPT

ROOT = Path(__file__).resolve().parents[3]
RECORDED = """
import sys
from torch.distributed.elastic.multiprocessing.errors import record
@record
def main():
    raise ValueError("of the script")
main()
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Directory with the entry points of pyproject.toml, as pip would install them."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        groups = tomllib.load(file)["project"]["entry-points"]
    return install(tmp_path_factory.mktemp("installed"), groups)


@pytest.fixture(scope="module")
def without_entry_points(tmp_path_factory):
    """Directory that hides the entry points of an installed package."""
    return install(tmp_path_factory.mktemp("without"), {})


def install(directory, groups):
    metadata = directory / "megatron_core-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: megatron-core\nVersion: 1\n")
    lines = [
        line
        for group, entries in groups.items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in entries.items()))
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    return directory


def torchrun(installed, *words, ranks=2, **options):
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
    command += ["--standalone", "--nproc-per-node", str(ranks), *map(str, words)]
    path = os.pathsep.join(map(str, (installed, ROOT)))
    environ = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ, **options)


def ended(process):
    _, printed = process.communicate(timeout=120)
    return process.returncode, printed


@pytest.mark.parametrize("words", [("--learning-rate-typo", "1"), ("--data-path", "/no/such/data")])
def test_mistake(installed, words):
    """A user's mistake: status 2, and the message alone."""
    flags = ["--preset", "tiny", "--micro-batch-size", "1", "--train-iters", "1", *words]
    status, printed = ended(torchrun(installed, ROOT / "pretrain_gpt_oss.py", *flags, ranks=1))
    assert status == 2 and printed.count("\n") == 1, printed
    assert printed.startswith("error: ") and words[0] in printed


@pytest.mark.parametrize(
    "what, status, message",
    [
        ("seven", 7, ""),
        ("killed", 128 + signal.SIGKILL, "was killed by SIGKILL. Rerun the same command"),
    ],
)
def test_failed_rank(installed, tmp_path, what, status, message):
    """The status of a rank that failed while another one was running."""
    script = tmp_path / torchrun_exit.SCRIPT
    script.write_text(SCRIPT)
    found, printed = ended(torchrun(installed, script, what, tmp_path / "ready"))
    assert found == status and message in printed and printed.count("\n") == bool(message), printed


def test_ended_by_a_signal(installed, tmp_path):
    script = tmp_path / torchrun_exit.SCRIPT
    script.write_text(SCRIPT)
    process = torchrun(installed, script, "wait", tmp_path / "ready")
    deadline = time.monotonic() + 120
    while not all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (128 + signal.SIGTERM, "")


@pytest.mark.parametrize("text", [SCRIPT, RECORDED], ids=["exits", "raises"])
def test_another_script(installed, without_entry_points, tmp_path, text):
    """Another script: the output and status of torchrun, even if it gets our script as a word."""
    script = tmp_path / "train.py"
    script.write_text(text)
    words = ("usage", tmp_path / "ready", ROOT / torchrun_exit.SCRIPT)
    paths = (installed, without_entry_points)
    found = [ended(torchrun(path, script, *words, ranks=1)) for path in paths]
    assert [status for status, _ in found] == [1, 1]
    assert all("ChildFailedError" in printed for _, printed in found)
    with_plugin, without = (_without_varying_words(printed) for _, printed in found)
    assert with_plugin == without


def _without_varying_words(printed):
    """Lines without times, process ids and temporary names."""
    varying = ("time ", "exitcode ", "error_file", "[E", "E1", "W1")
    return [line for line in printed.splitlines() if not line.strip().startswith(varying)]


def test_backend_of_this_name(installed, tmp_path):
    """The plug-in adds no rendezvous backend."""
    with pytest.raises(ValueError, match="not a rendezvous backend"):
        from torch.distributed.elastic.rendezvous import RendezvousParameters

        parameters = RendezvousParameters("gptoss", "localhost:0", "id", 1, 1)
        torchrun_exit.load_plugin()(parameters)
