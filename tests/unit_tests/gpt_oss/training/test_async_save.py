# Copyright (c) 2026, the megatron-core gptoss authors.

"""pretrain_gpt_oss.py --async-save: output, and failures during the background write."""

import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from megatron.gpt_oss.arguments.validate_run import check_async_save
from megatron.gpt_oss.errors import RunError, UsageError
from megatron.gpt_oss.training.metrics.jsonl import read_metrics
from megatron.training import checkpoint_integrity, step_callbacks
from tests.harness import runs
from tests.harness.held_writer import Gate, HeldWriter
from tests.harness.parser import flags
from tests.harness.ranks import RankFailure

FLAGS = "--async-save --save-interval 1 --eval-interval 1000 --eval-iters 0 --global-batch-size 2"
EXPERTS = "--expert-model-parallel-size 2 --use-distributed-optimizer"


def run(ranks, inputs, run_dir, flags, hurt=None, world_size=1):
    """(what each rank printed, or the message that ended it, what `hurt` saw)."""
    argv = runs.command(inputs, run_dir, f"{FLAGS} {flags}")
    folder = str(run_dir / "checkpoints")
    return ranks.run(
        run_in_rank, argv, folder, hurt, world_size=world_size, init_process_group=False
    )


def run_in_rank(argv, folder, hurt):
    """`hurt(folder, seen)` registers callbacks, and returns what is called before each write."""
    seen, before = {}, []

    def prepare():
        before.append(hurt(Path(folder), seen) if hurt is not None else None)

    def before_write(iteration):
        if before[0] is not None:
            before[0](iteration)

    began = time.monotonic()
    with HeldWriter(before_write).installed() as held:
        try:
            printed = runs.main_in_rank(argv, prepare)
        except RunError as error:
            printed = f"error: {error}"
    seen["seconds"] = time.monotonic() - began
    seen["threads"] = {thread for *_, thread in held.writes}
    return printed, seen


def after_step(step, action):
    def on_step(event):
        if event.iteration == step:
            action()

    step_callbacks.subscribe(step_callbacks.TrainingLogged, on_step)


def whole(run_dir):
    return checkpoint_integrity.choose(str(run_dir / "checkpoints")).iteration


def goes_on(ranks, inputs, run_dir, flags="--train-iters 3", world_size=1):
    """Run the same command without a fault; returns its steps, and checks that all are complete."""
    printed = run(ranks, inputs, run_dir, flags, world_size=world_size)[-1][0]
    records = read_metrics(run_dir / "metrics.jsonl")
    assert sorted(runs.steps(records)) == [1, 2, 3] and whole(run_dir) == 3
    return printed


def slow_write_of_2(folder, seen):
    def before(iteration):
        if iteration == 2:
            time.sleep(1.5)

    return before


def test_lines_and_metrics(ranks, inputs, tmp_path):
    """Two ranks, experts on both, nothing but --async-save: saved in the background, in order."""
    run_dir = tmp_path / "run"
    flags = f"--train-iters 3 {EXPERTS}"
    (_, first), (printed, second) = run(ranks, inputs, run_dir, flags, slow_write_of_2, 2)
    assert first["threads"] == second["threads"] == {"checkpoint-writer"}
    lines = printed.splitlines()
    saved = [
        re.fullmatch(
            rf"saved {run_dir}/checkpoints/iter_(\d+) \(blocked for (\S+) s, "
            r"background write (\S+) s\)",
            line,
        )
        for line in lines
        if line.startswith("saved")
    ]
    assert [int(match[1]) for match in saved] == [1, 2, 3]
    waits = (
        "saving the checkpoint of step 3 waits: the checkpoint of step 2 is still being written."
    )
    assert [line for line in lines if "waits" in line and "step 3" in line] == [
        f"{waits} A larger --save-interval avoids that."
    ]
    # Step 3 was trained, and its save asked for, before checkpoint 2 was complete.
    step_3 = next(line for line in lines if line.startswith("step 3/3"))
    assert lines.index(step_3) < lines.index(saved[1][0])
    seconds = runs.only(read_metrics(run_dir / "metrics.jsonl"), "checkpoint")
    assert sorted(seconds) == [1, 2, 3]
    assert seconds[2]["background_seconds"] >= 1.5 and seconds[1]["background_seconds"] > 0
    assert 0 < seconds[2]["blocking_seconds"] < seconds[3]["blocking_seconds"]
    for match in saved:
        record = seconds[int(match[1])]
        assert float(match[3]) == pytest.approx(record["background_seconds"], abs=0.06)
        assert float(match[2]) == pytest.approx(record["blocking_seconds"], abs=0.06)
    assert whole(run_dir) == 3
    # And another layout resumes from it.
    flags = "--train-iters 4 --context-parallel-size 2 --no-load-optim"
    run(ranks, inputs, run_dir, flags, world_size=2)
    assert sorted(runs.steps(read_metrics(run_dir / "metrics.jsonl"))) == [1, 2, 3, 4]
    assert whole(run_dir) == 4


def saving(words):
    return flags(f"--async-save {words}")


def test_refused_flags():
    """Flags that Megatron would silently ignore, or that would make it hang."""
    with pytest.raises(UsageError, match="does not run on a CPU. Drop the flag"):
        check_async_save(saving("--use-persistent-ckpt-worker"), is_cuda=False)
    with pytest.raises(UsageError, match="Drop --async-strategy"):
        check_async_save(saving("--async-strategy=nvrx"), is_cuda=True)
    nvrx = "--async-strategy=nvrx --use-persistent-ckpt-worker"
    with pytest.raises(UsageError, match="Drop --ckpt-assume-constant-structure"):
        check_async_save(saving(f"{nvrx} --ckpt-assume-constant-structure"), is_cuda=True)
    with pytest.raises(UsageError, match="no nvidia-resiliency-ext that Megatron can use"):
        check_async_save(saving(nvrx), is_cuda=True)
    check_async_save(saving("--ckpt-assume-constant-structure"), is_cuda=False)
    check_async_save(saving("--use-persistent-ckpt-worker"), is_cuda=True)
    check_async_save(saving(""), is_cuda=False)
    check_async_save(flags("--use-persistent-ckpt-worker"), is_cuda=False)


def slow(folder, seen):
    def before(iteration):
        time.sleep(1.0)
        seen["written"] = iteration

    return before


def signalled(number):
    def hurt(folder, seen):
        after_step(2, lambda: os.kill(os.getpid(), number))
        return slow(folder, seen)

    return hurt


def signalled_by_term(folder, seen):
    return signalled(signal.SIGTERM)(folder, seen)


def signalled_by_usr1(folder, seen):
    return signalled(signal.SIGUSR1)(folder, seen)


@pytest.mark.parametrize(
    "flags, hurt",
    [
        ("--train-iters 2 --save-interval 5", slow),
        ("--train-iters 1000 --exit-interval 2", slow),
        ("--train-iters 1000 --save-interval 500", signalled_by_term),
        ("--train-iters 1000 --save-interval 500", signalled_by_usr1),
    ],
    ids="end exit-interval SIGTERM SIGUSR1".split(),
)
def test_end_of_a_run_waits(ranks, inputs, tmp_path, flags, hurt):
    """main_in_rank() raises for any exit code but 0."""
    printed, seen = run(ranks, inputs, tmp_path / "run", flags, hurt)[0]
    assert seen["written"] == 2 and seen["threads"] == {"checkpoint-writer"}
    assert f"saved {tmp_path}/run/checkpoints/iter_0000002 " in printed
    assert checkpoint_integrity.choose(str(tmp_path / "run/checkpoints")) == (2, False, [])


def full_disk(name):
    """That shard of the checkpoint of step 2 goes to a device that is always full."""

    def hurt(folder, seen):
        def before(iteration):
            path = folder / "iter_0000002" / name
            if iteration == 2 and not path.is_symlink():
                path.symlink_to("/dev/full")

        return before

    return hurt


def full_disk_of_rank_1(folder, seen):
    return full_disk("__1_0.distcp")(folder, seen) if os.environ["RANK"] == "1" else None


def test_full_disk_of_one_rank(ranks, inputs, tmp_path):
    """One message names the cause and the last complete checkpoint; no rank hangs."""
    flags = f"--train-iters 3 {EXPERTS}"
    results = run(ranks, inputs, tmp_path / "run", flags, full_disk_of_rank_1, 2)
    for message, seen in results:
        assert message.startswith("error: A checkpoint could not be written"), message
        assert f"The last complete checkpoint is {tmp_path}/run/checkpoints/iter_0000001" in message
        assert "rerun the same command" in message
        assert seen["seconds"] < 60
    assert "no space left on the disk" in results[0][0]
    (tmp_path / "run/checkpoints/iter_0000002/__1_0.distcp").unlink()
    goes_on(ranks, inputs, tmp_path / "run", flags, 2)


def full_disk_of_second_file(folder, seen):
    return full_disk("__0_1.distcp")(folder, seen)


def test_full_disk_of_one_of_several_files(ranks, inputs, tmp_path):
    """A rank has several writer threads; the failure of one is reported, too."""
    flags = "--train-iters 3 --ckpt-assume-constant-structure --dist-ckpt-workers 2"
    message, _ = run(ranks, inputs, tmp_path / "run", flags, full_disk_of_second_file)[0]
    assert "A checkpoint could not be written: no space left on the disk" in message, message
    assert f"The last complete checkpoint is {tmp_path}/run/checkpoints/iter_0000001" in message
    assert whole(tmp_path / "run") == 1


def lose_folder(folder, seen):
    def before(iteration):
        if iteration == 2:
            shutil.rmtree(folder / "iter_0000002")

    return before


def test_folder_vanishes(ranks, inputs, tmp_path):
    message, _ = run(ranks, inputs, tmp_path / "run", "--train-iters 3", lose_folder)[0]
    assert "A checkpoint could not be written: a file or directory disappeared" in message
    assert f"The last complete checkpoint is {tmp_path}/run/checkpoints/iter_0000001" in message
    goes_on(ranks, inputs, tmp_path / "run")


def killed_while_writing(folder, seen):
    """Rank 1 is killed while both ranks write step 2; the write of rank 0 never ends."""

    def before(iteration):
        if iteration == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    return before


def test_kill_9_while_writing(ranks, inputs, tmp_path):
    """The next run resumes from the previous checkpoint, and rewrites the incomplete one."""
    flags = f"--train-iters 3 {EXPERTS}"
    with pytest.raises(RankFailure, match="died with exit code -9"):
        run(ranks, inputs, tmp_path / "run", flags, killed_while_writing, 2)
    folder = tmp_path / "run/checkpoints"
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "1"
    assert "the save did not finish" in checkpoint_integrity.find_problem(
        str(folder / "iter_0000002")
    )
    printed = goes_on(ranks, inputs, tmp_path / "run", flags, 2)
    assert "resumed" not in printed or "step 1" in printed
    assert checkpoint_integrity.find_problem(str(folder / "iter_0000002")) is None


def look_at_old_ones(folder, seen):
    def before(iteration):
        time.sleep(0.5)
        seen[iteration] = sorted(path.name for path in folder.glob("iter_*"))

    return before


def test_keep_checkpoints(ranks, inputs, tmp_path):
    """Checkpoint 2 is kept while 3 is written, and deleted when 3 is complete."""
    flags = "--train-iters 3 --keep-checkpoints 1"
    _, seen = run(ranks, inputs, tmp_path / "run", flags, look_at_old_ones)[0]
    assert seen[2] == ["iter_0000001", "iter_0000002"]
    assert seen[3] == ["iter_0000002", "iter_0000003"]
    names = [path.name for path in (tmp_path / "run/checkpoints").glob("iter_*")]
    assert names == ["iter_0000003"]


def nan_while_writing(folder, seen):
    """Step 2's embedding puts out NaN, while checkpoint 1 is being written."""
    gate = Gate()

    def hook_embedding(event):
        if event.iteration == 1:
            model = event.model[0]
            embedding = next(m for m in model.modules() if hasattr(m, "word_embeddings"))
            embedding.register_forward_hook(nan)

    def nan(module, tokens, output):
        gate.open()
        return output * float("nan")

    step_callbacks.subscribe(step_callbacks.GradientsReady, hook_embedding)

    def before(iteration):
        gate.wait()
        time.sleep(1.0)

    return before


def test_run_ended_on_every_rank_finishes_the_checkpoint(ranks, inputs, tmp_path):
    """A NaN ends the run: what was saved before it is not lost for being half written."""
    message, _ = run(ranks, inputs, tmp_path / "run", "--train-iters 3", nan_while_writing)[0]
    assert "Step 2: the loss or a gradient is not finite" in message
    assert checkpoint_integrity.choose(str(tmp_path / "run/checkpoints")) == (1, False, [])


class Interrupted(Exception):
    pass


def unknown_error_while_writing(folder, seen):
    def fail():
        raise Interrupted

    after_step(2, fail)

    def before(iteration):
        time.sleep(0.5)

    return before


def test_unknown_error_gives_the_checkpoint_up(ranks, inputs, tmp_path):
    """Other ranks may have exited: the checkpoint is not finalised, and its directory is marked."""
    with pytest.raises(RankFailure, match="Interrupted"):
        run(ranks, inputs, tmp_path / "run", "--train-iters 3", unknown_error_while_writing)
    folder = str(tmp_path / "run/checkpoints")
    assert checkpoint_integrity.choose(folder).iteration == -1
    assert "did not finish" in checkpoint_integrity.find_problem(f"{folder}/iter_0000001")
