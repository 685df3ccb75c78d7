# Copyright (c) 2026, the megatron-core gptoss authors.

"""Errors before a run starts: environment of the ranks, checkpoint to load, output directory."""

import errno
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from megatron.gpt_oss import errors
from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.import_warnings import silence_import_notices
from megatron.gpt_oss.training import failure_messages, launcher_variables, run_dir, run_start

ROOT = Path(__file__).parents[4]


@pytest.mark.parametrize(
    "environ, words",
    [
        ({"RANK": "abc"}, "RANK is 'abc'"),
        ({"RANK": ""}, "RANK is ''"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"LOCAL_RANK": "1.0"}, "LOCAL_RANK is '1.0'"),
        ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK is 5 of 2 ranks"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "MASTER_ADDR and MASTER_PORT not"),
        ({"RANK": "0", "MASTER_ADDR": "localhost"}, "RANK is set, MASTER_PORT not"),
    ],
)
def test_variables_of_torchrun(monkeypatch, environ, words):
    for name in launcher_variables.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    silence_import_notices()  # which comes first, and must not fail
    assert errors.environment_rank() == (5 if environ.get("RANK") == "5" else 0)
    with pytest.raises(UsageError) as error:
        launcher_variables.check_rank_variables()
        launcher_variables.set_launcher_variables()
    assert words in str(error.value) and "torchrun" in str(error.value)


def _args(**given) -> Namespace:
    none = dict.fromkeys(("load", "save", "pretrained_checkpoint", "ckpt_step"))
    return Namespace(**(none | {"exit_on_missing_checkpoint": False} | given))


@pytest.fixture
def folders(tmp_path):
    for name in ("empty", "hf", "saved"):
        (tmp_path / name).mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "saved" / "iter_0000002").mkdir()
    (tmp_path / "saved" / "latest_checkpointed_iteration.txt").write_text("2")
    (tmp_path / "again").symlink_to("empty")
    return tmp_path


@pytest.mark.parametrize(
    "given, words",
    [
        ({"load": "nope"}, "--load nope holds no checkpoint"),
        ({"load": "nope", "save": "empty"}, "--load nope holds no checkpoint"),
        ({"load": "hf", "save": "new"}, "give --load-hf hf"),
        ({"pretrained_checkpoint": "nope"}, "--pretrained-checkpoint nope holds no checkpoint"),
        ({"pretrained_checkpoint": "hf", "load": "new", "save": "new"}, "give --load-hf hf"),
        (
            {"load": "new", "save": "new", "exit_on_missing_checkpoint": True},
            "--load new holds no checkpoint",
        ),
        (
            {"load": "saved", "save": "saved", "ckpt_step": 7},
            "--ckpt-step 7: saved/iter_0000007 does not exist",
        ),
        (
            {"load": "new", "save": "new", "ckpt_step": 7},
            "--ckpt-step 7: new/iter_0000007 does not exist",
        ),
        (
            {"load": "new", "save": "new", "pretrained_checkpoint": "saved", "ckpt_step": 7},
            "--ckpt-step 7: saved/iter_0000007 does not exist",
        ),
    ],
)
def test_nothing_to_load(folders, monkeypatch, given, words):
    """Megatron trains random weights then, and with --exit-on-missing-checkpoint exits with 0."""
    monkeypatch.chdir(folders)
    with pytest.raises(UsageError) as error:
        run_start.check_load(_args(**given))
    assert words in str(error.value)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"load": "new", "save": "new"},
        {"load": "empty", "save": "again"},
        {"load": "saved", "save": "new"},
        {"load": "saved", "save": "new", "ckpt_step": 2},
        {"load": "saved", "pretrained_checkpoint": "nope"},
        {"load": "new", "save": "new", "pretrained_checkpoint": "saved"},
    ],
)
def test_something_to_load(folders, monkeypatch, given):
    monkeypatch.chdir(folders)
    run_start.check_load(_args(**given))


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: path.write_text("x"), "exists and is not a directory"),
        (os.mkfifo, "exists and is not a directory"),
        (lambda path: path.symlink_to("/nope/x"), "exists and is a link that leads nowhere"),
        (lambda path: path.symlink_to(path.name), "exists and is a link that leads nowhere"),
    ],
    ids=["file", "pipe", "dangling", "loop"],
)
def test_run_dir_is_something_else(tmp_path, make, words):
    make(tmp_path / "run")
    with pytest.raises(UsageError) as error:
        run_dir._create(Path(tmp_path / "run"), "--run-dir")
    assert f"--run-dir {tmp_path}/run {words}. Give another path." == str(error.value)


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "run.lock.json"])
def test_a_device_has_the_name_of_a_file(tmp_path, monkeypatch, name):
    monkeypatch.setenv("RANK", "0")
    (tmp_path / name).symlink_to("/dev/null")
    with pytest.raises(UsageError, match=f"^{tmp_path}/{name} is a device; .* Move it away"):
        with run_dir.locked(Namespace(run_dir=str(tmp_path), save=None)):
            pass


@pytest.mark.parametrize("make, kind", [(os.mkfifo, "named pipe"), (os.mkdir, "directory")])
@pytest.mark.parametrize(
    "name",
    [
        "run.json",
        "run.lock",
        "run.lock.json",
        "metrics.jsonl",
        "megatron-rank0.log",
        "checkpoints/latest_checkpointed_iteration.txt",
    ],
)
def test_something_has_the_name_of_a_file(tmp_path, monkeypatch, name, make, kind):
    """A run would wait for the other end of a pipe."""
    monkeypatch.setenv("RANK", "0")
    (tmp_path / "checkpoints").mkdir()
    make(tmp_path / name)
    args = Namespace(run_dir=str(tmp_path), save=str(tmp_path / "checkpoints"))
    with pytest.raises(UsageError, match=f"^{tmp_path}/{name} is a {kind}.* Move it away"):
        with run_dir.locked(args), run_dir.megatron_output(tmp_path):
            pass


def test_a_full_disk_hides_no_error(tmp_path, monkeypatch):
    """Neither the traceback nor the close of the log raises another error."""
    monkeypatch.setenv("RANK", "0")
    (tmp_path / "megatron-rank0.log").symlink_to("/dev/full")
    with pytest.raises(errors.RunError):
        with run_dir.megatron_output(tmp_path):
            with pytest.raises(OSError) as error:
                print("a line")
            failure_messages.print_traceback(error.value)
            raise errors.RunError("disk full")


def test_a_full_disk_under_the_log(tmp_path, monkeypatch, capsys):
    """The message has the path of the log file; the standard output is not full."""
    monkeypatch.setenv("RANK", "0")
    log = tmp_path / "megatron-rank0.log"
    log.symlink_to("/dev/full")

    def main():
        with run_dir.megatron_output(tmp_path):
            print("a line")

    with pytest.raises(SystemExit):
        errors.run_main(main)
    assert capsys.readouterr().err.startswith(f"error: {log}: no space left on the disk")


@pytest.mark.parametrize(
    "name, of_checkpoint",
    [
        ("run.json", False),
        (".run.json.0a1b.new", False),
        ("cache/GPTDataset_indices/x.npy", False),
        ("iter_0000002/__0_0.distcp", True),
        ("iter_0000002", True),
        ("latest_checkpointed_iteration.txt", True),
        ("", True),
    ],
)
def test_full_disk_under_save(tmp_path, name, of_checkpoint):
    """Only the files of a checkpoint are called a checkpoint; --save may also hold run.json."""
    error = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / name))
    message = str(failure_messages.as_run_error(error, Namespace(save=str(tmp_path))))
    assert ("A checkpoint could not be written" in message) == of_checkpoint
    assert str(tmp_path / name) in message and "no space left on the disk" in message


def test_without_asserts():
    """python -O removes Megatron's checks, which are asserts."""
    done = subprocess.run(
        [sys.executable, "-O", str(ROOT / "pretrain_gpt_oss.py"), "--preset", "tiny"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: python -O")
