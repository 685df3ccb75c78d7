# Copyright (c) 2026, the megatron-core gptoss authors.

"""--async-save with PyTorch only: written in the background, equal to a synchronous save."""

import argparse
import contextlib
import gc
import io
import json
import threading
import time
import weakref
from pathlib import Path

import numpy
import pytest
import torch

from megatron.core.dist_checkpointing.strategies.async_thread import ThreadAsyncCaller, WriteAborted
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.training import checkpoint_integrity, step_callbacks
from tests.harness import tiny_pretrain, watched_pretrain
from tests.harness.checkpoint_entries import read_checkpoint
from tests.harness.held_writer import SECONDS, Gate, HeldWriter

TRACKER = "latest_checkpointed_iteration.txt"
ASYNC = "--async-save --async-strategy mcore"
SCHEDULE = f" --lr-decay-iters 4 {tiny_pretrain.SMALL}"
EXPERTS = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
LAYOUTS = {
    "one": (1, ""),
    "distributed": (2, f"{EXPERTS} --expert-model-parallel-size 2"),
}


def train(ranks, data, folder, flags, function=None, world_size=1, *args):
    flags = f"--save {folder} --load {folder} --train-iters 4 {SCHEDULE} {flags}".split()
    return ranks.run(
        function or watched_pretrain.run,
        flags,
        data,
        *args,
        world_size=world_size,
        init_process_group=False,
    )


def rank():
    return torch.distributed.get_rank()


def run_held(flags, data, held_rank):
    """The write of step 2 on `held_rank` (None: all) lasts until step 3 is logged.

    Returns what this rank trained, its writes, and what it saw of checkpoint 2 at step 3.
    """
    gate, seen = Gate(), {}
    folder = Path(flags[1])

    def before(iteration):
        if iteration == 2 and held_rank in (None, rank()):
            gate.wait()

    def look(iteration):
        manifest = json.loads((folder / "iter_0000002" / "manifest.json").read_text())
        seen["state"], seen["tracker"] = manifest["state"], (folder / TRACKER).exists()
        seen["gc"] = gc.isenabled()

    def before_forward(step, model):
        deadline = time.monotonic() + SECONDS
        while step == 3 and held_rank not in (None, rank()) and not held.writes:
            assert time.monotonic() < deadline, "a write that nothing holds does not end"
            time.sleep(0.01)
        if step == 4 and not seen:  # step 3 has updated the weights, and the ranks asked each other
            look(step)
            seen["time"] = time.monotonic()
            gate.open()

    with HeldWriter(before).installed() as held:
        record = watched_pretrain.run(flags, data, before_forward=before_forward)
    return record["steps"], held.writes, seen


# Arguments of the runs, saved with the state, that differ on purpose.
OTHERWISE = (
    "save",
    "load",
    "async_save",
    "ckpt_assume_constant_structure",
    "ckpt_fully_parallel_save",
)


def same(one, other):
    """Whether two entries of a checkpoint are equal, tensors byte for byte."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
            one.contiguous().flatten().view(torch.uint8),
            other.contiguous().flatten().view(torch.uint8),
        )
    if isinstance(one, io.BytesIO):
        return same(*(torch.load(data, weights_only=False) for data in (one, other)))
    if isinstance(one, dict):
        names = [name for name in one if name not in OTHERWISE]
        return one.keys() == other.keys() and all(same(one[n], other[n]) for n in names)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, argparse.Namespace):
        return same(vars(one), vars(other))
    return bool(numpy.all(one == other))


@pytest.fixture(scope="module")
def pairs(ranks, data, tmp_path_factory):
    """(directory of a synchronous run, of an asynchronous run, what that did)."""
    made = {}

    def get(layout):
        if layout not in made:
            world_size, flags = LAYOUTS[layout]
            root = tmp_path_factory.mktemp(layout)
            flags += " --save-interval 2"
            train(ranks, data, root / "sync", flags, None, world_size)
            held = train(
                ranks, data, root / "async", f"{flags} {ASYNC}", run_held, world_size, None
            )
            made[layout] = root / "sync", root / "async", held
        return made[layout]

    return get


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_equals_a_synchronous_one(pairs, layout):
    """Step 3 updated everything while checkpoint 2 was being written: it holds step 2."""
    sync, async_, held = pairs(layout)
    for _, writes, seen in held:
        (iteration, _, end, thread), *_ = writes
        assert iteration == 2 and end > seen["time"] and thread == "checkpoint-writer"
        assert seen["gc"]  # upstream's writer turns it off, here for the whole training
    for step in (2, 4):
        expected, got = (
            read_checkpoint(str(folder / f"iter_{step:07d}")) for folder in (sync, async_)
        )
        assert expected.keys() == got.keys()
        assert len([value for value in got.values() if isinstance(value, torch.Tensor)]) > 20
        assert [name for name in expected if not same(expected[name], got[name])] == []
    two, four = (read_checkpoint(str(async_ / f"iter_{step:07d}")) for step in (2, 4))
    assert len([name for name in two if not same(two[name], four[name])]) > 20


CONSTANT = {
    "fully-reshardable": "--dist-ckpt-optim-fully-reshardable",
    "fully-reshardable-one-writer": "--dist-ckpt-optim-fully-reshardable "
    "--no-ckpt-fully-parallel-save",
    "dp-reshardable": "",
    "dp-reshardable-one-writer": "--no-ckpt-fully-parallel-save",
}


@pytest.fixture(scope="module")
def synchronous(ranks, data, tmp_path_factory):
    """Directory of a synchronous run of the format, written by all ranks, whoever writes later."""
    made = {}

    def get(flags):
        if flags not in made:
            made[flags] = tmp_path_factory.mktemp("sync")
            train(ranks, data, made[flags], flags, None, 2)
        return made[flags]

    return get


@pytest.mark.parametrize("name", CONSTANT)
def test_constant_structure(ranks, data, tmp_path, synchronous, name):
    """Plans are taken from earlier saves (from the third on without a look), tensors are not."""
    flags = (
        f"--use-distributed-optimizer --overlap-grad-reduce --ddp-num-buckets 3 {CONSTANT[name]}"
    )
    flags += " --save-interval 1"
    sync = synchronous(flags.replace("--no-ckpt-fully-parallel-save", ""))
    flags += f" --ckpt-assume-constant-structure {ASYNC}"
    train(ranks, data, tmp_path / "async", flags, None, 2)
    before = {}
    for step in (1, 2, 3, 4):
        expected, got = (
            read_checkpoint(str(folder / f"iter_{step:07d}"))
            for folder in (sync, tmp_path / "async")
        )
        assert expected.keys() == got.keys()
        assert [name for name in expected if not same(expected[name], got[name])] == []
        changed = [name for name in got if not same(before.get(name), got[name])]
        assert sum(isinstance(got[name], torch.Tensor) for name in changed) > 3
        before = got


@pytest.mark.parametrize("held_rank", [0, 1])
def test_tracker_waits_for_every_rank(ranks, data, tmp_path, held_rank):
    """One rank still writes: the directory is marked as unfinished, and no tracker names it."""
    world_size, flags = LAYOUTS["distributed"]
    results = train(
        ranks, data, tmp_path, f"{flags} --save-interval 2 {ASYNC}", run_held, world_size, held_rank
    )
    for other, (_, writes, seen) in enumerate(results):
        assert (writes[0][2] > seen["time"]) == (other == held_rank)
        assert seen["state"] == "writing" and not seen["tracker"]
    assert checkpoint_integrity.choose(str(tmp_path)) == (4, False, [])


def test_resume_at_another_layout(ranks, data, pairs):
    """Saved by two ranks with expert parallelism; resumed by one, and by two without it."""
    _, folder, held = pairs("distributed")
    step_3 = held[0][0][2]["losses"]["lm loss"]
    for world_size, flags in ((1, ""), (2, EXPERTS)):
        flags += f" --load {folder} --ckpt-step 2 --train-iters 3 --no-load-optim --no-load-rng"
        steps = ranks.run(
            watched_pretrain.run,
            (flags + SCHEDULE).split(),
            data,
            world_size=world_size,
            init_process_group=False,
        )[0]["steps"]
        assert [step["iteration"] for step in steps] == [3]
        assert steps[0]["losses"]["lm loss"] == pytest.approx(step_3, rel=1e-5)


def run_slow(flags, data, seconds):
    """The write of step 1 takes so long; what was printed, and in which order things came."""
    order, registered, output = [], [], io.StringIO()

    def note(name, key):
        def on(event):
            tracker = Path(flags[1]) / TRACKER
            named = tracker.read_text() if tracker.exists() else None
            order.append((name, event.iteration, getattr(event, key), named))

        return on

    def before_forward(step, model):
        if not registered:  # here, because run() forgets what was registered before it
            registered.append(step)
            step_callbacks.subscribe(step_callbacks.CheckpointWaits, note("waits", "waits_for"))
            step_callbacks.subscribe(
                step_callbacks.CheckpointSaved, note("saved", "background_seconds")
            )

    def before(iteration):
        if iteration == 1:
            time.sleep(seconds)

    with HeldWriter(before).installed() as held, contextlib.redirect_stdout(output):
        watched_pretrain.run(flags, data, before_forward=before_forward)
    return order, held.writes, held.most_at_once, output.getvalue()


def test_second_save_waits(ranks, data, tmp_path):
    """Checkpoint 2 is due while 1 is being written: one line says so, and 1 is complete first."""
    flags = f"--save-interval 1 {ASYNC}"
    order, writes, most_at_once, output = train(ranks, data, tmp_path, flags, run_slow, 1, 2.0)[0]
    assert most_at_once == 1
    assert [iteration for iteration, *_ in writes] == [1, 2, 3, 4]
    events = [(name, step) for name, step, *_ in order]
    waits = [event for event in events if event[0] == "waits"]
    assert waits[0] == ("waits", 2) and order[0][:3] == ("waits", 2, 1)
    assert [event for event in events if event[0] == "saved"] == [
        ("saved", step) for step in (1, 2, 3, 4)
    ]
    line = "the checkpoint of iteration 2 waits: that of iteration 1 is still being written"
    assert output.count(line) == 1 and output.count("still being written") == len(waits)
    saved = [values for name, *values in order if name == "saved"]
    # The callback comes after the tracker, with the seconds of that write.
    assert [named for _, _, named in saved] == ["1", "2", "3", "4"]
    assert saved[0][1] >= 2.0 > saved[1][1]


def test_end_of_training_waits(ranks, data, tmp_path):
    """The last checkpoint is complete when pretrain() returns."""
    flags = f"--train-iters 1 --save-interval 1 {ASYNC}"
    order, writes, _, _ = train(ranks, data, tmp_path, flags, run_slow, 1, 2.0)[0]
    assert [values[:2] for values in order] == [("saved", 1)]
    assert checkpoint_integrity.choose(str(tmp_path)) == (1, False, [])


def test_nvrx_without_its_worker_is_dropped_as_before(ranks, data, tmp_path):
    """Upstream's rule for the other strategy is unchanged."""
    flags = "--train-iters 1 --save-interval 1 --async-save"
    _, writes, _, _ = train(ranks, data, tmp_path, flags, run_slow, 1, 0.0)[0]
    assert [thread for *_, thread in writes] == ["MainThread"]


@pytest.fixture
def alone():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def request(write, tensors):
    """An AsyncRequest as the file system's writer makes it: (rank, buckets, queue)."""
    buckets = [("path", "key", ([], [(index, tensor) for index, tensor in enumerate(tensors)]))]
    return AsyncRequest(
        write,
        [0, buckets, None],
        [],
        preload_fn=lambda: FileSystemWriterAsync.preload_tensors(buckets, True),
    )


def test_snapshot(alone):
    """The snapshot holds the tensors at the call, in one copy without other references."""
    gate, written = Gate(), []

    def write(rank, buckets, queue):
        gate.wait()
        written.extend(tensor.clone() for _, tensor in buckets[0][2][1])

    weight, gathered = torch.arange(6.0), torch.arange(4.0)
    storage = weakref.ref(gathered.untyped_storage())
    made = request(write, [weight, gathered, weight[2:4]])
    del gathered
    caller = ThreadAsyncCaller()
    caller.schedule_async_call(made)
    weight.add_(100)  # the optimizer's next step
    assert storage() is None
    assert not caller.is_current_async_call_done()
    gate.open()
    assert caller.is_current_async_call_done(blocking=True)
    expected = [torch.arange(6.0), torch.arange(4.0), torch.tensor([2.0, 3.0])]
    assert all(map(torch.equal, written, expected)) and len(written) == 3
    assert caller._buckets == []


def test_what_a_write_raises_reaches_the_training(alone):
    def write(rank, buckets, queue):
        raise OSError(28, "No space left on device", "shard")

    calls = AsyncCallsQueue()
    calls.schedule_async_request(request(write, [torch.ones(2)]))
    with pytest.raises(OSError, match="No space left on device: 'shard'"):
        calls.maybe_finalize_async_calls(blocking=True)


def test_abort_ends_the_write_after_a_tensor(alone):
    """A run that ends with an error does not wait for a write that is not finalised."""
    gate, at, written, finalised = Gate(), threading.Event(), [], []

    def write(rank, buckets, queue):
        for index, _ in buckets[0][2][1]:
            written.append(index)
            at.set()
            gate.wait()

    calls = AsyncCallsQueue()
    made = request(write, [torch.ones(2)] * 1000)
    made.add_finalize_fn(lambda: finalised.append(1))
    calls.schedule_async_request(made)
    caller = calls.async_calls[0].async_caller
    assert at.wait(20)
    threading.Thread(target=lambda: caller._aborted.wait(20) and gate.open()).start()
    calls.close(abort=True)
    assert len(written) == 1 and finalised == [] and calls.get_num_unfinalized_calls() == 0
    assert isinstance(caller._error, WriteAborted)


def test_a_rank_without_anything_to_write(alone):
    calls, finalised = AsyncCallsQueue(), []
    calls.schedule_async_request(AsyncRequest(None, (), [lambda: finalised.append(1)]))
    assert calls.maybe_finalize_async_calls() == [0] and finalised == [1]
