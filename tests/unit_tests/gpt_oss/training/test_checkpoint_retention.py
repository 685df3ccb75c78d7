# Copyright (c) 2026, the megatron-core gptoss authors.

"""--keep-checkpoints: which directories are deleted; the last complete checkpoint never is."""

import json

import pytest

from megatron.gpt_oss.training.checkpoint_retention import CheckpointKeeper


def save(folder, iteration, state="complete", tracker=True):
    path = folder / f"iter_{iteration:07d}"
    path.mkdir()
    (path / "shard").write_text("x" * 10)
    manifest = {"state": state, "files": {"shard": {"size": 10}}}
    (path / "manifest.json").write_text(json.dumps(manifest))
    if tracker:
        (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def clean(folder, keep):
    keeper = CheckpointKeeper(keep)
    gone = keeper.clean(folder)
    keeper.wait()
    assert not list(folder.glob(".deleted-*"))
    return sorted(gone)


def test_the_newest_stay(tmp_path):
    for iteration in (5, 10, 9_999_999, 10_000_000):
        save(tmp_path, iteration)
    assert clean(tmp_path, 2) == ["iter_0000005", "iter_0000010"]
    assert names(tmp_path) == ["iter_10000000", "iter_9999999"]
    assert clean(tmp_path, 2) == [] and clean(tmp_path, 5) == []


def test_a_file_of_somebody_else_is_kept(tmp_path):
    for iteration in (1, 2, 3):
        save(tmp_path, iteration)
    (tmp_path / "iter_0000001" / "hf").mkdir()
    (tmp_path / "iter_0000001" / "hf" / "notes.txt").write_text("mine")
    assert clean(tmp_path, 1) == ["iter_0000002"]
    assert (tmp_path / "iter_0000001" / "hf" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("hurt", ["truncated", "unfinished", "lost"])
def test_a_broken_newest_one_does_not_count(tmp_path, hurt):
    save(tmp_path, 1)
    save(tmp_path, 2)
    newest = save(tmp_path, 3, "writing" if hurt == "unfinished" else "complete")
    if hurt == "truncated":
        (newest / "shard").write_text("")
    if hurt == "lost":
        (newest / "shard").unlink()
    assert clean(tmp_path, 1) == ["iter_0000001"]
    assert names(tmp_path) == ["iter_0000002", "iter_0000003"]


def test_what_is_never_deleted(tmp_path):
    """Kept: what the tracker names, links, directories of others; all without a complete one."""
    save(tmp_path, 1)
    (tmp_path / "iter_0000002").mkdir()  # without a manifest
    (tmp_path / "iter_best").mkdir()
    other = save(tmp_path, 4)
    other.rename(tmp_path / "elsewhere")
    (tmp_path / "iter_0000004").symlink_to(tmp_path / "elsewhere")
    save(tmp_path, 5, "writing")
    save(tmp_path, 6)
    save(tmp_path, 7, tracker=False)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    assert clean(tmp_path, 1) == ["iter_0000005", "iter_0000006"]
    assert (tmp_path / "iter_0000001").is_dir() and (tmp_path / "iter_0000004").is_symlink()
    broken = tmp_path / "broken"
    broken.mkdir()
    for iteration in (1, 2, 3):
        save(broken, iteration, "writing")
    assert clean(broken, 1) == []


def test_rest_of_a_killed_deletion(tmp_path):
    save(tmp_path, 1).rename(tmp_path / ".deleted-iter_0000001")
    save(tmp_path, 2)
    assert clean(tmp_path, 1) == []
    assert names(tmp_path) == ["iter_0000002"]
