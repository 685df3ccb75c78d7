# Copyright (c) 2026, the megatron-core gptoss authors.

"""An incomplete or damaged checkpoint is reported and not loaded; the newest complete one is."""

import contextlib
import io
import json
import os
import shutil
import signal
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron.core.dist_checkpointing.block_hashes import CheckedFileSystemReader, HashingFileSystem
from megatron.gpt_oss.training import failure_messages
from megatron.training import checkpoint_integrity
from megatron.training.checkpoint_integrity import find_problem
from tests.harness import tiny_pretrain, watched_pretrain
from tests.harness.ranks import RankFailure

TRACKER = "latest_checkpointed_iteration.txt"
STEPS = 4


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """(dataset prefix, directory with checkpoints of steps 1 to 4, what each step logged)."""
    directory = tmp_path_factory.mktemp("saved")
    data = tiny_pretrain.write_random_dataset(str(directory / "data"))
    record, _ = train(ranks, data, directory / "checkpoints", STEPS)
    return data, directory / "checkpoints", record["steps"]


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the checkpoint directory, to be damaged."""
    shutil.copytree(saved[1], tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def train(ranks, data, folder, train_iters, flags="", function=None):
    """Train on one rank, loading and saving in `folder`: (what it logged, what it printed)."""
    flags = (
        f"--save {folder} --load {folder} --save-interval 1 --train-iters {train_iters} "
        f"--lr-decay-iters {STEPS} {tiny_pretrain.SMALL} {flags}"
    )
    return ranks.run(
        function or printing_run, flags.split(), data, world_size=1, init_process_group=False
    )[0]


def printing_run(flags, data):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        record = watched_pretrain.run(flags, data)
    return record, output.getvalue()


def refused_run(flags, data):
    with pytest.raises(checkpoint_integrity.CheckpointLoadError) as failure:
        watched_pretrain.run(flags, data)
    return str(failure.value)


def run_killed_in_save(flags, data):
    """SIGKILL this process when the shard of step 2 is written but not yet synced."""
    fsync = os.fsync

    def fsync_or_die(handle):
        path = os.readlink(f"/proc/self/fd/{handle}")
        if "iter_0000002" in path and path.endswith(".distcp"):
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(handle)

    os.fsync = fsync_or_die
    watched_pretrain.run(flags, data)


def shard(folder: Path, iteration: int) -> Path:
    return folder / f"iter_{iteration:07d}" / "__0_0.distcp"


def cut(path: Path, size: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(size)


def contents(folder: Path):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unseal(folder: Path, *iterations: int) -> None:
    """Remove the manifests, as if upstream had written the checkpoints."""
    for iteration in iterations:
        (folder / f"iter_{iteration:07d}" / "manifest.json").unlink()


def test_manifest_and_tracker(saved):
    """A save ends with a manifest of every file, and the tracker names the last one."""
    _, folder, _ = saved
    assert (folder / TRACKER).read_text() == str(STEPS)
    last = folder / f"iter_{STEPS:07d}"
    manifest = json.loads((last / "manifest.json").read_text())
    assert manifest["state"] == "complete"
    sizes = {name: entry["size"] for name, entry in manifest["files"].items()}
    assert sizes == {
        path.name: path.stat().st_size for path in last.iterdir() if path.name != "manifest.json"
    }
    assert set(sizes) == {".metadata", "metadata.json", "__0_0.distcp", "__0_0.distcp.xxh3"}
    # Whatever is no shard has a hash here; a shard's are in its own file.
    assert [name for name in sizes if "sha256" not in manifest["files"][name]] == ["__0_0.distcp"]
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize("sealed", [True, False], ids=["manifest", "upstream"])
def test_truncated_shard_is_named_and_passed_over(ranks, saved, folder, sealed):
    """Step 4's shard is short: step 4 is trained again from step 3's checkpoint, bit for bit."""
    data, _, steps = saved
    if not sealed:
        unseal(folder, 3, 4)
    expected = shard(folder, 4).stat().st_size
    cut(shard(folder, 4), expected - 1000)

    record, output = train(ranks, data, folder, STEPS)
    assert [step["iteration"] for step in record["steps"]] == [4]
    assert record["steps"][0]["losses"] == steps[3]["losses"]
    assert record["steps"][0]["grad_norm"] == steps[3]["grad_norm"]
    problem = f"__0_0.distcp has {expected - 1000} bytes, expected {expected}"
    assert output.count(problem) == 1
    assert f"{folder}/iter_0000004 is not a complete checkpoint" in output
    assert f"{folder}/iter_0000003 is the newest complete checkpoint" in output
    # The broken one was written again.
    assert checkpoint_integrity.find_problem(str(folder / "iter_0000004")) is None


def test_flipped_bit_is_passed_over(ranks, saved, folder):
    """One bit in the newest shard: found while it is read, and step 4 trained again from step 3's."""
    data, _, steps = saved
    with open(shard(folder, 4), "r+b") as file:
        file.seek(place := shard(folder, 4).stat().st_size // 2)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 4]))

    record, output = train(ranks, data, folder, STEPS)
    assert [step["iteration"] for step in record["steps"]] == [4]
    assert record["steps"][0]["losses"] == steps[3]["losses"]
    assert record["steps"][0]["grad_norm"] == steps[3]["grad_norm"]
    assert output.count("of __0_0.distcp differ from what was saved") == 1
    assert f"{folder}/iter_0000003 is the newest complete checkpoint" in output
    # The broken one was written again.
    again, _ = train(ranks, data, folder, STEPS)
    assert not again["steps"] and checkpoint_integrity.choose(str(folder)).iteration == STEPS


def resume_where_one_rank_reads_damage(folders):
    """Each rank reads a file of its own, without collectives, as Megatron does, then meets all."""
    rank = torch.distributed.get_rank()

    @checkpoint_integrity.pass_over_damaged
    def load():
        parts = {folder: [str(folder / str(r)) for r in range(2)] for folder in folders}
        folder = next(f for f in folders if not any(map(find_problem, parts[f])))
        state = {"weight": torch.zeros(300)}
        reader = CheckedFileSystemReader(folder / str(rank))
        dcp.load(state, storage_reader=reader, no_dist=True)
        torch.distributed.barrier()
        return folder.name, state["weight"].sum().item()

    return load()


@pytest.mark.parametrize("damaged", [0, 1])
def test_damage_that_one_rank_reads(ranks, tmp_path, damaged):
    """All ranks restart the load: the others do not wait in the barrier at its end."""
    folders = [tmp_path / "newest", tmp_path / "before"]
    for folder in folders:
        for rank in range(2):
            writer = dcp.FileSystemWriter(folder / str(rank), thread_count=1)
            writer.fs = HashingFileSystem()
            dcp.save({"weight": torch.ones(300)}, storage_writer=writer, no_dist=True)
    (path,) = (folders[0] / str(damaged)).glob("*.distcp")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    found = ranks.run(resume_where_one_rank_reads_damage, folders, world_size=2, timeout=40)
    assert found == [("before", 300.0)] * 2


def test_flipped_bit_of_the_step_that_is_wanted(ranks, saved, folder):
    data, _, _ = saved
    (shard(folder, 2)).write_bytes(shard(folder, 2).read_bytes()[:-9] + b"x" * 9)
    message = ranks.run(
        refused_run,
        f"--save {folder} --load {folder} --ckpt-step 2 --save-interval 1 --train-iters {STEPS} "
        f"{tiny_pretrain.SMALL}".split(),
        data,
        world_size=1,
        init_process_group=False,
    )[0]
    assert message.startswith("--ckpt-step 2: ") and "differ from what was saved" in message
    assert "Complete checkpoints in" in message and message.endswith("4, 3, 1.")


def test_manifest_of_a_newer_version(folder):
    path = folder / f"iter_{STEPS:07d}" / "manifest.json"
    path.write_text(path.read_text().replace('"version": 2', '"version": 3'))
    problem = checkpoint_integrity.find_problem(str(path.parent))
    assert "manifest.json has the unsupported version 3" in problem


def test_hashes_of_an_earlier_save_go(folder):
    """A writer that makes none (nvrx's) leaves none that do not fit."""
    path = folder / f"iter_{STEPS:07d}"
    checkpoint_integrity.begin_save(str(path))
    assert not list(path.glob("*.xxh3"))


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("../other")])
def test_a_save_replaces_pipes_and_links(folder, make):
    """A writer would wait for the reader of a pipe, and write to what a link leads to."""
    names = ["__0_0.distcp", "__0_0.distcp.xxh3", ".metadata", "metadata.json"]
    path = folder / f"iter_{STEPS:07d}"
    for name in names:
        (path / name).unlink()
        make(path / name)
    make(path / "other.pipe")
    checkpoint_integrity.begin_save(str(path))
    assert sorted(os.listdir(path)) == ["manifest.json", "other.pipe"]
    checkpoint_integrity.finish_save(str(path))  # reads no pipe
    assert json.loads((path / "manifest.json").read_text())["files"] == {}


def test_a_save_keeps_hard_links(folder):
    """As `cp -al` makes them for a backup."""
    path = shard(folder, STEPS)
    os.link(path, folder / "backup")
    before = path.read_bytes()
    checkpoint_integrity.begin_save(str(path.parent))
    assert not path.exists() and (folder / "backup").read_bytes() == before


def test_a_directory_has_the_name_of_a_shard(folder):
    path = shard(folder, STEPS)
    path.unlink()
    path.mkdir()
    before = contents(folder)
    with pytest.raises(IsADirectoryError) as failure:
        checkpoint_integrity.begin_save(str(path.parent))
    assert failure.value.filename == str(path) and contents(folder) == before
    error = failure_messages.as_run_error(failure.value, Namespace(save=str(folder)))
    assert f"one of its files ({path}). The last complete checkpoint is" in str(error)
    assert "Move the directory away, then rerun" in str(error)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("sealed", [True, False], ids=["manifest", "upstream"])
@pytest.mark.parametrize("name", [".metadata", "metadata.json", "__0_0.distcp"])
def test_a_pipe_or_directory_is_passed_over(folder, name, sealed, make):
    path = folder / f"iter_{STEPS:07d}" / name
    if not sealed:
        unseal(folder, STEPS)
    path.unlink()
    make(path)
    assert checkpoint_integrity.choose(str(folder)).iteration == STEPS - 1


@pytest.mark.parametrize("flags", ["", "--async-save --async-strategy mcore"], ids=["", "async"])
def test_sigkill_in_a_save(ranks, saved, tmp_path, flags):
    """Killed while the second checkpoint is written, a run resumes from the first."""
    data, _, steps = saved
    folder = tmp_path / "checkpoints"
    with pytest.raises(RankFailure, match="died with exit code -9"):
        train(ranks, data, folder, STEPS, flags, function=run_killed_in_save)
    assert (folder / TRACKER).read_text() == "1"
    assert shard(folder, 2).exists()
    record, output = train(ranks, data, folder, STEPS, flags)
    assert f"{folder}/iter_0000002 is not a complete checkpoint: the save did not finish" in output
    assert [step["losses"] for step in record["steps"]] == [step["losses"] for step in steps[1:]]
    assert checkpoint_integrity.choose(str(folder)) == (STEPS, False, [])


def test_sigkill_in_the_first_save_starts_anew(ranks, saved, folder):
    """No checkpoint was complete: the run starts from the beginning and reports it."""
    for iteration in (2, 3, 4):
        shutil.rmtree(folder / f"iter_{iteration:07d}")
    (folder / TRACKER).unlink()
    (folder / "iter_0000001" / "manifest.json").write_text('{"state": "writing"}')
    choice = checkpoint_integrity.choose(str(folder))
    assert choice.iteration == -1
    assert (
        "iter_0000001 is not a complete checkpoint: the save did not finish" in choice.messages[0]
    )
    assert "starting from step 0" in choice.messages[1]


def test_nothing_whole_ends_the_run_and_writes_nothing(ranks, saved, folder):
    """Every checkpoint is damaged: the run ends before training and changes no file."""
    data, _, _ = saved
    for iteration in range(1, STEPS + 1):
        cut(shard(folder, iteration), 10)
    before = contents(folder)
    messages = ranks.run(
        refused_run,
        f"--save {folder} --load {folder} --train-iters 6 --save-interval 1 "
        f"{tiny_pretrain.SMALL}".split(),
        data,
        world_size=2,
        init_process_group=False,
    )
    for message in messages:
        assert f"No complete checkpoint in {folder}" in message
        for iteration in range(1, STEPS + 1):
            assert f"{folder}/iter_{iteration:07d} is not a complete" in message
    assert contents(folder) == before


def lose_a_file(path):
    def hurt(folder):
        (folder / "iter_0000004" / path).unlink()

    return hurt


def lose_the_folder(folder):
    shutil.rmtree(folder / "iter_0000004")


def change_a_byte(folder):
    path = folder / "iter_0000004" / ".metadata"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def lose_a_file_of_upstream(path):
    def hurt(folder):
        unseal(folder, 4)
        lose_a_file(path)(folder)

    return hurt


def cut_upstream_metadata(folder):
    unseal(folder, 4)
    cut(folder / "iter_0000004" / ".metadata", 5000)


@pytest.mark.parametrize(
    "hurt, problem",
    [
        (lose_a_file("__0_0.distcp"), "__0_0.distcp is missing (expected"),
        (lose_a_file(".metadata"), ".metadata is missing (expected"),
        (lose_a_file("metadata.json"), "metadata.json is missing (expected"),
        (change_a_byte, ".metadata has different contents"),
        (lose_the_folder, "iter_0000004 does not exist"),
        (lambda folder: (folder / "iter_0000004" / "manifest.json").write_text("{"), "damaged"),
        (lose_a_file_of_upstream("__0_0.distcp"), "__0_0.distcp is missing (expected"),
        (lose_a_file_of_upstream(".metadata"), ".metadata is missing"),
        (lose_a_file_of_upstream("metadata.json"), "metadata.json is missing"),
        (cut_upstream_metadata, ".metadata is damaged (5000 bytes"),
    ],
    ids=(
        "shard metadata metadata.json byte directory manifest "
        "upstream-shard upstream-metadata upstream-metadata.json upstream-cut"
    ).split(),
)
def test_what_the_tracker_names_is_broken(folder, hurt, problem):
    """The problem is named, and the checkpoint before is chosen."""
    hurt(folder)
    choice = checkpoint_integrity.choose(str(folder))
    assert (choice.iteration, choice.release) == (3, False)
    assert problem in choice.messages[0] and "iter_0000004" in choice.messages[0]
    assert "iter_0000003 is the newest complete checkpoint" in choice.messages[1]


def test_whole_folders_of_upstream(folder):
    """Without manifests: what the tracker names is loaded, and nothing without a tracker."""
    unseal(folder, 1, 2, 3, 4)
    assert checkpoint_integrity.choose(str(folder)) == (4, False, [])
    (folder / TRACKER).unlink()
    with pytest.raises(checkpoint_integrity.CheckpointLoadError, match="write 4 to .*latest_check"):
        checkpoint_integrity.choose(str(folder))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_tracker_is_no_file(folder, make):
    (folder / TRACKER).unlink()
    make(folder / TRACKER)
    choice = checkpoint_integrity.choose(str(folder))
    assert choice.iteration == STEPS and "is not a file" in choice.messages[0]


@pytest.mark.parametrize("text", ["", "four", "0", None], ids="empty damaged cut missing".split())
def test_damaged_tracker(folder, text):
    """The newest sealed checkpoint is used, rather than random weights."""
    if text is None:
        (folder / TRACKER).unlink()
    else:
        (folder / TRACKER).write_text(text)
    choice = checkpoint_integrity.choose(str(folder))
    assert choice.iteration == 4
    assert "iter_0000004 is the newest complete checkpoint" in choice.messages[-1]
    if text is not None:
        assert f"{TRACKER} " in choice.messages[0]
    assert checkpoint_integrity.holds_checkpoint(str(folder))


def test_tracker_set_back_by_hand(folder):
    """A user who writes 2 into the tracker file gets 2, and a note about newer checkpoints."""
    (folder / TRACKER).write_text("2\n")
    choice = checkpoint_integrity.choose(str(folder))
    assert choice.iteration == 2
    assert "iter_0000004 is complete, but" in choice.messages[0]


def test_ckpt_step(folder):
    """The step that was asked for, or an error that lists the others."""
    assert checkpoint_integrity.choose(str(folder), 2) == (2, False, [])
    cut(shard(folder, 2), 10)
    with pytest.raises(checkpoint_integrity.CheckpointLoadError) as failure:
        checkpoint_integrity.choose(str(folder), 2)
    assert "--ckpt-step 2: " in str(failure.value) and "has 10 bytes" in str(failure.value)
    assert "Complete checkpoints in" in str(failure.value) and ": 4, 3, 1." in str(failure.value)


def test_release(folder):
    """A converted model loads only if complete; --ckpt-step has priority over it."""
    (folder / "iter_0000004").rename(folder / "release")
    (folder / TRACKER).write_text("release")
    assert checkpoint_integrity.choose(str(folder)) == (0, True, [])
    assert checkpoint_integrity.choose(str(folder), 3) == (3, False, [])
    cut(folder / "release" / "__0_0.distcp", 10)
    with pytest.raises(checkpoint_integrity.CheckpointLoadError, match="release is not a complete"):
        checkpoint_integrity.choose(str(folder))


def test_no_checkpoint_yet(tmp_path):
    """An empty or missing directory: the run starts from the beginning."""
    assert checkpoint_integrity.choose(str(tmp_path)) == (-1, False, [])
    assert checkpoint_integrity.choose(str(tmp_path / "missing")) == (-1, False, [])
    assert not checkpoint_integrity.holds_checkpoint(str(tmp_path / "missing"))
