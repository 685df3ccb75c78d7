# Copyright (c) 2026, the megatron-core gptoss authors.

"""Runs that are ended from outside: one message, checkpoints stay, the same command resumes."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from megatron.gpt_oss.errors import RunError
from megatron.training import checkpoint_integrity, step_callbacks
from tests.harness import commands, runs
from tests.harness.ranks import free_port

ROOT = Path(__file__).resolve().parents[4]


class Processes:
    """pretrain_gpt_oss.py as two processes of their own; what they print goes to files."""

    def __init__(self, inputs, run_dir, flags, world_size=2):
        self.run_dir, self.printed = run_dir, run_dir.parent / f"{run_dir.name}-printed"
        self.printed.mkdir(exist_ok=True)
        port, self.processes = str(free_port()), []
        for rank in range(world_size):
            environ = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                **commands.rank_variables(rank, world_size, port),
            }
            with open(self.printed / f"{rank}.out", "w") as out:
                with open(self.printed / f"{rank}.err", "w") as err:
                    command = [sys.executable, str(ROOT / "pretrain_gpt_oss.py")]
                    command += runs.command(inputs, run_dir, flags)
                    self.processes.append(
                        commands.Popen(command, env=environ, stdout=out, stderr=err)
                    )

    def wait_for_step(self, step):
        """Wait until a step is logged."""
        metrics = self.run_dir / "metrics.jsonl"
        self.wait_until(lambda: metrics.is_file() and f'"step": {step},' in metrics.read_text())

    def wait_until(self, seen):
        deadline = time.monotonic() + 180
        while not seen():
            assert all(process.poll() is None for process in self.processes), self.errors(0)
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def wait(self):
        """Wait for the processes; returns their exit codes."""
        try:
            return [process.wait(timeout=120) for process in self.processes]
        finally:
            for process in self.processes:
                process.close()

    def errors(self, rank):
        return (self.printed / f"{rank}.err").read_text()


@pytest.mark.parametrize(
    "number, mode",
    [
        pytest.param(signal.SIGTERM, "", marks=pytest.mark.slow),
        (signal.SIGUSR1, ""),
        pytest.param(signal.SIGTERM, "--async-save --save-interval 1", marks=pytest.mark.slow),
    ],
    ids=["SIGTERM", "SIGUSR1", "SIGTERM-async"],
)
def test_signal_saves_and_exits_0(inputs, ranks, tmp_path, number, mode):
    """One rank receives it; both save the step that they are in, and end with status 0."""
    flags = f"--train-iters 100000 --context-parallel-size 2 {mode}"
    running = Processes(inputs, tmp_path / "run", flags)
    running.wait_for_step(2)
    running.processes[1].send_signal(number)
    assert running.wait() == [0, 0], running.errors(0) + running.errors(1)
    last = max(runs.steps(runs.read_metrics(tmp_path / "run" / "metrics.jsonl")))
    choice = checkpoint_integrity.choose(str(tmp_path / "run" / "checkpoints"))
    assert choice == (last, False, [])
    if number == signal.SIGUSR1:
        records = runs.start(ranks, inputs, tmp_path / "run", f"{flags} --exit-interval 1", 2)
        assert max(runs.steps(records)) == last + 1


def test_signal_to_every_process(inputs, tmp_path):
    """Slurm signals all processes of a step, also what a rank has started: none may be needed."""
    running = Processes(inputs, tmp_path / "run", "--train-iters 100000 --save-interval 2", 1)
    running.wait_for_step(3)
    rank = psutil.Process(running.processes[0].pid)
    for process in [*rank.children(recursive=True), rank]:
        process.send_signal(signal.SIGTERM)
    assert running.wait() == [0], running.errors(0)
    last = max(runs.steps(runs.read_metrics(tmp_path / "run" / "metrics.jsonl")))
    assert checkpoint_integrity.choose(str(tmp_path / "run" / "checkpoints")) == (last, False, [])


@pytest.mark.parametrize(
    "mode", ["", pytest.param("--async-save", marks=pytest.mark.slow)], ids=["", "async"]
)
def test_kill_9_of_a_rank(inputs, ranks, tmp_path, mode):
    """The other rank says so in one line and ends; the run resumes from the last checkpoint."""
    flags = f"--train-iters 100000 --save-interval 2 --context-parallel-size 2 {mode}"
    running = Processes(inputs, tmp_path / "run", flags)
    running.wait_for_step(3)
    # Written in the background, the checkpoint of step 2 may come later.
    running.wait_until((tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt").is_file)
    running.processes[0].kill()
    started = time.monotonic()
    codes = running.wait()
    assert codes == [-signal.SIGKILL, 1]
    assert time.monotonic() - started < 90  # --distributed-timeout-minutes 1
    lines = [line for line in running.errors(1).splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in running.errors(1), running.errors(1)
    saved = checkpoint_integrity.choose(str(tmp_path / "run" / "checkpoints")).iteration
    assert saved >= 2
    assert "Rank 1 lost contact with another rank" in lines[0]
    assert (
        f"The last complete checkpoint is {tmp_path}/run/checkpoints/iter_{saved:07d}" in lines[0]
    )
    assert "Traceback" in (tmp_path / "run" / "megatron-rank1.log").read_text()
    records = runs.start(ranks, inputs, tmp_path / "run", f"{flags} --exit-interval 1", 2)
    assert max(runs.steps(records)) == saved + 1


@pytest.fixture
def torchrun(inputs, tmp_path):
    """Starts ranks under torchrun: (torchrun, a function that gives what is left of the run)."""
    run_dir = tmp_path / "run"
    started = []

    def start(flags, ranks=2):
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
        command += ["--nproc-per-node", str(ranks), "--master-port", str(free_port())]
        command += [str(ROOT / "pretrain_gpt_oss.py"), *runs.command(inputs, run_dir, flags)]
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        started.append(
            subprocess.Popen(
                command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
        return started[0]

    def left():
        words = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
        return [line for line in words if str(run_dir) in line]

    yield start, left
    for process in started:
        process.kill()


def _gone_within(seconds, left):
    deadline = time.monotonic() + seconds
    while left() and time.monotonic() < deadline:
        time.sleep(0.2)
    return not left()


def test_failed_run_leaves_no_process(torchrun):
    """A loss that overflows, with data workers: one message, and ranks and torchrun are gone."""
    start, left = torchrun
    process = start("--train-iters 20 --num-workers 1 --lr 1e30 --lr-warmup-iters 0")
    printed, _ = process.communicate(timeout=180)
    assert process.returncode != 0 and _gone_within(20, left)
    assert printed.count("error: Step 2: the loss or a gradient is not finite") == 1
    ours, _, _ = printed.partition("error: Step 2")
    assert len([line for line in ours.splitlines() if line.startswith(("gpt-oss", "step"))]) == 2
    assert "rank0]: Traceback" not in printed and "rank1]: Traceback" not in printed


def test_ranks_end_with_their_launcher(torchrun, tmp_path):
    """SIGKILL of torchrun ends a rank, which no lost peer would end."""
    start, left = torchrun
    process = start("--train-iters 100000 --num-workers 1", ranks=1)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 180
    while not (metrics.is_file() and '"step": 2,' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    assert len(left()) >= 3
    process.kill()
    assert _gone_within(20, left), left()


def ended_run(argv, hurt, folder):
    """The error that ended the run; `hurt(folder)` registers the fault."""
    try:
        runs.main_in_rank(argv, lambda: hurt(Path(folder)))
    except RunError as error:
        return str(error)
    return "the run was not ended"


def run_hurt(ranks, inputs, run_dir, flags, hurt, world_size=1):
    argv = runs.command(inputs, run_dir, flags)
    folder = str(run_dir / "checkpoints")
    return ranks.run(ended_run, argv, hurt, folder, world_size=world_size, init_process_group=False)


def after_step(step, action):
    def on_step(event):
        if event.iteration == step:
            action(event)

    step_callbacks.subscribe(step_callbacks.TrainingLogged, on_step)


def full_disk_at_step_2(folder):
    """The shard of the checkpoint of step 2 goes to a device that is always full."""

    def fill(event):
        begin_save = checkpoint_integrity.begin_save

        def begin_and_fill(directory):
            checkpoint_integrity.begin_save = begin_save
            begin_save(directory)
            (Path(directory) / "__0_0.distcp").symlink_to("/dev/full")

        checkpoint_integrity.begin_save = begin_and_fill

    after_step(2, fill)


def test_full_disk_in_a_checkpoint(inputs, ranks, tmp_path):
    flags = "--train-iters 3 --save-interval 1 --keep-checkpoints 1"
    message = run_hurt(ranks, inputs, tmp_path / "run", flags, full_disk_at_step_2)[0]
    assert "A checkpoint could not be written: no space left on the disk" in message
    assert f"The last complete checkpoint is {tmp_path}/run/checkpoints/iter_0000001" in message
    assert "rerun the same command" in message
    # There is room again.
    (tmp_path / "run/checkpoints/iter_0000002/__0_0.distcp").unlink()
    records = runs.start(ranks, inputs, tmp_path / "run", flags)
    assert sorted(runs.steps(records)) == [1, 2, 3]
    assert checkpoint_integrity.choose(str(tmp_path / "run/checkpoints")) == (3, False, [])


def lose_folder_of_step_2(folder):
    after_step(3, lambda event: shutil.rmtree(folder / "iter_0000002"))


def lose_all(folder):
    after_step(3, lambda event: shutil.rmtree(folder))


@pytest.mark.parametrize("hurt", [lose_folder_of_step_2, lose_all], ids=["newest", "all"])
def test_checkpoint_deleted_under_the_run(inputs, ranks, tmp_path, hurt):
    """The run continues and saves again; --keep-checkpoints counts what is there."""
    flags = "--train-iters 4 --save-interval 1 --keep-checkpoints 2"
    message = run_hurt(ranks, inputs, tmp_path / "run", flags, hurt)[0]
    assert message == "the run was not ended"
    folder = tmp_path / "run" / "checkpoints"
    left = ["iter_0000003", "iter_0000004"]
    assert sorted(path.name for path in folder.glob("iter_*")) == left
    assert checkpoint_integrity.choose(str(folder)) == (4, False, [])


def lose_folder_in_save(folder):
    """The directory vanishes between its beginning and the writing of its shard."""
    fsync = os.fsync

    def fsync_or_lose(handle):
        if "iter_0000002" in os.readlink(f"/proc/self/fd/{handle}"):
            os.fsync = fsync
            shutil.rmtree(folder / "iter_0000002")
        fsync(handle)

    after_step(1, lambda event: setattr(os, "fsync", fsync_or_lose))


def test_checkpoint_deleted_while_it_is_written(inputs, ranks, tmp_path):
    flags = "--train-iters 3 --save-interval 1"
    message = run_hurt(ranks, inputs, tmp_path / "run", flags, lose_folder_in_save)[0]
    assert "A checkpoint could not be written: a file or directory disappeared" in message
    assert f"The last complete checkpoint is {tmp_path}/run/checkpoints/iter_0000001" in message
    records = runs.start(ranks, inputs, tmp_path / "run", flags)
    assert sorted(runs.steps(records)) == [1, 2, 3]


def nan_batch_at_step_3(folder):
    """What the embedding makes of the tokens of step 3 on the last rank."""

    def hook_embedding(event):
        if event.iteration != 2 or torch.distributed.get_rank() != 1:
            return
        embedding = next(m for m in event.model[0].modules() if hasattr(m, "word_embeddings"))
        embedding.register_forward_hook(lambda module, tokens, output: output * float("nan"))

    step_callbacks.subscribe(step_callbacks.GradientsReady, hook_embedding)


def test_nan_batch(inputs, ranks, tmp_path):
    """Both ranks end with the same message, and only earlier steps were saved."""
    flags = "--train-iters 4 --save-interval 1"
    messages = run_hurt(ranks, inputs, tmp_path / "run", flags, nan_batch_at_step_3, world_size=2)
    assert messages[0] == messages[1]
    assert "Step 3: the loss or a gradient is not finite" in messages[0]
    assert "Rank 1: the output of embedding" in messages[0]
    assert "The weights were not updated and no checkpoint was written." in messages[0]
    assert checkpoint_integrity.choose(str(tmp_path / "run/checkpoints")) == (2, False, [])
    records = runs.start(ranks, inputs, tmp_path / "run", flags, world_size=2)
    assert sorted(runs.steps(records)) == [1, 2, 3, 4]
