# Copyright (c) 2026, the megatron-core gptoss authors.

"""Which checkpoints are complete, and which one a run resumes from.

A save first marks its iteration directory as incomplete. When every file is on disk, it lists the
files with their sizes in manifest.json, and then writes the iteration to the tracker
latest_checkpointed_iteration.txt. A load verifies the checkpoint that the tracker names, and falls
back to the newest complete one before it. Rank 0 decides and broadcasts the decision.

A directory without manifest.json was written by upstream. It is complete if its metadata is readable
and every file in the metadata exists and is large enough.

Verification checks file sizes and hashes small files, so it takes moments for thousands of large
shards. Shards are hashed when they are read (megatron/core/dist_checkpointing/block_hashes.py).
"""

import errno
import hashlib
import json
import os
import re
import zipfile
from functools import wraps
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple, Union

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron.core.dist_checkpointing import block_hashes, restricted_pickle
from megatron.core.dist_checkpointing.block_hashes import DamagedShard
from megatron.core.dist_checkpointing.checkpoint_names import (
    MANIFEST,
    RELEASE,
    TRACKER,
    iteration_name,
)
from megatron.core.msc_utils import MultiStorageClientFeature

# 2: shards have hashes. Older manifests have no version.
VERSION = 2
# Files that a save writes, in any format.
_CHECKPOINT_FILE = re.compile(
    r"__\w+\.distcp(\.xxh3)?|\.metadata|metadata\.json|"
    r"(common|model_optim_rng|distrib_optim)\.pt"
)
# Hashing this much takes about 10 ms. Metadata is smaller, even for large models.
LARGEST_HASHED_FILE = 16 * 2**20

_reported: Set[str] = set()
# Damaged shards that a load found, by the real path of the checkpoint directory.
_damaged: Dict[str, str] = {}


class CheckpointLoadError(RuntimeError):
    """There are checkpoints, but this run can load none of them."""


class Choice(NamedTuple):
    """The checkpoint to load, as upstream's read_metadata() returns it, with warnings."""

    iteration: int  # -1: there is no checkpoint.
    release: bool
    messages: List[str]


# What the tracker file names: an iteration, RELEASE, '' if it is damaged, None if there is no file.
Tracker = Union[int, str, None]


def begin_save(directory: str) -> None:
    """Mark a checkpoint directory as incomplete, before any rank writes to it. Collective.

    The directory may hold an earlier checkpoint of the same iteration. Its files are deleted: a
    writer would wait for the reader of a pipe, and change the target of a link and a backup that
    has hard links to them.

    Raises:
        IsADirectoryError: a directory has the name of a file to write.
    """
    if MultiStorageClientFeature.is_enabled():
        return  # Objects appear complete or not at all, and cannot be renamed.
    if _rank() == 0:
        os.makedirs(directory, exist_ok=True)
        earlier = _checkpoint_files(directory)
        manifest = {"version": VERSION, "state": "writing"}
        _write_atomically(os.path.join(directory, MANIFEST), json.dumps(manifest))
        for path in earlier:
            os.unlink(path)
        _damaged.pop(os.path.realpath(directory), None)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _checkpoint_files(directory: str) -> List[str]:
    found = []
    for parent, directories, files in os.walk(directory):
        for name in filter(_CHECKPOINT_FILE.fullmatch, directories):
            path = os.path.join(parent, name)
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        found += [os.path.join(parent, name) for name in filter(_CHECKPOINT_FILE.fullmatch, files)]
    return found


def finish_save(directory: str) -> None:
    """Write the manifest of a complete checkpoint. For rank 0, when all ranks have written."""
    if MultiStorageClientFeature.is_enabled():
        return
    files = {}
    for name in _files(directory):
        path = os.path.join(directory, name)
        files[name] = {"size": os.path.getsize(path)}
        if files[name]["size"] <= LARGEST_HASHED_FILE and not name.endswith(".distcp"):
            # The writers of shards call fsync; this rank wrote the metadata without it.
            _sync(path)
            files[name]["sha256"] = _sha256(path)
    manifest = {"version": VERSION, "state": "complete", "files": files}
    _write_atomically(os.path.join(directory, MANIFEST), json.dumps(manifest, indent=1))


def write_tracker(path: str, text: str) -> None:
    """Replace the content of the tracker file; a reader finds the old one or the new one."""
    if MultiStorageClientFeature.is_enabled():
        with MultiStorageClientFeature.import_package().open(path, "w") as file:
            file.write(text)
    else:
        _write_atomically(path, text)


def resolve(load_dir: str, ckpt_step: Optional[int] = None) -> Tuple[int, bool]:
    """The checkpoint to load: the newest complete one that is not newer than the tracker's.

    If the tracker names a directory that does not exist, newer checkpoints count as well.
    Collective if torch.distributed is initialized.

    Args:
        load_dir: directory with iter_XXXXXXX directories.
        ckpt_step: the only iteration to accept (--ckpt-step).
    Returns:
        (iteration, release); iteration is -1 if there is no checkpoint to resume from.
    Raises:
        CheckpointLoadError: on every rank, if there are checkpoints but none is complete, or not the
            requested one.
    """
    outcome: List[Union[Choice, CheckpointLoadError, None]] = [None]
    if _rank() == 0:
        try:
            outcome[0] = choose(load_dir, ckpt_step)
        except CheckpointLoadError as error:
            outcome[0] = error
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], CheckpointLoadError):
        raise outcome[0]
    iteration, release, messages = outcome[0]
    for message in messages:
        if _rank() == 0 and message not in _reported:  # A load resolves more than once.
            _reported.add(message)
            print(f"WARNING: {message}", flush=True)
    return iteration, release


def choose(load_dir: str, ckpt_step: Optional[int] = None) -> Choice:
    """The decision of resolve(), without communication and output."""
    if MultiStorageClientFeature.is_enabled():
        return _choose_without_verifying(load_dir, ckpt_step)
    if ckpt_step:
        return _choose_step(load_dir, ckpt_step)
    tracker, messages = _read_tracker(load_dir)
    if tracker == RELEASE:
        return _choose_release(load_dir)
    return _choose_newest(load_dir, tracker, messages)


def _choose_step(load_dir: str, ckpt_step: int) -> Choice:
    problem = find_problem(iteration_dir(load_dir, ckpt_step))
    if problem:
        complete = [
            str(iteration)
            for iteration in _iterations(load_dir)
            if iteration != ckpt_step and not find_problem(iteration_dir(load_dir, iteration))
        ]
        raise CheckpointLoadError(
            f"--ckpt-step {ckpt_step}: {problem} Complete checkpoints in {load_dir}: "
            f"{', '.join(complete) or 'none'}."
        )
    return Choice(ckpt_step, False, [])


def _choose_release(load_dir: str) -> Choice:
    problem = find_problem(os.path.join(load_dir, RELEASE))
    if problem:
        raise CheckpointLoadError(f'{os.path.join(load_dir, TRACKER)} names "{RELEASE}": {problem}')
    return Choice(0, True, [])


def _choose_newest(load_dir: str, tracker: Tracker, messages: List[str]) -> Choice:
    """The newest complete checkpoint up to the one that the tracker names."""
    candidates = _iterations(load_dir)
    if isinstance(tracker, int) and tracker not in candidates:
        if any(iteration > tracker for iteration in candidates):
            # The number was truncated or the directory deleted: not a return to an earlier step.
            messages.append(
                f"{os.path.join(load_dir, TRACKER)} names {tracker}, which has no directory."
            )
            tracker = ""
    if isinstance(tracker, int):
        newer = [iteration for iteration in candidates if iteration > tracker]
        messages += [_describe_newer(load_dir, iteration, tracker) for iteration in newer]
        candidates = [tracker] + [iteration for iteration in candidates if iteration < tracker]
    for iteration in candidates:
        directory = iteration_dir(load_dir, iteration)
        problem = find_problem(directory)
        if not problem and tracker is None and not has_manifest(directory):
            problem = (
                f"{directory} has no {MANIFEST} and no {TRACKER} names it. To use it, write "
                f"{iteration} to {os.path.join(load_dir, TRACKER)}."
            )
        if not problem:
            if messages or iteration != tracker:
                messages.append(f"{directory} is the newest complete checkpoint: resuming from it.")
            return Choice(iteration, False, messages)
        messages.append(problem)
    return _choose_none(load_dir, tracker, candidates, messages)


def _choose_none(
    load_dir: str, tracker: Tracker, candidates: List[int], messages: List[str]
) -> Choice:
    """Start from step 0 if no save ever completed, so that nothing is lost; refuse otherwise."""
    directories = [iteration_dir(load_dir, iteration) for iteration in candidates]
    if tracker is None and all(map(_is_incomplete_save, directories)):
        if candidates:
            messages.append(f"{load_dir} never held a complete checkpoint: starting from step 0.")
        return Choice(-1, False, messages)
    messages.append(
        f"No complete checkpoint in {load_dir}, and training from step 0 would overwrite what is "
        "there. Restore the files named above, give --load another directory, or move this one "
        "away to restart training."
    )
    raise CheckpointLoadError("\n".join(messages))


def pass_over_damaged(load: Callable) -> Callable:
    """Decorator: a load that reads a damaged shard restarts with an earlier complete checkpoint.

    All ranks restart, also if only one rank read the damaged shard.
    """

    @wraps(load)
    def load_complete(*args, **kwargs):
        while True:
            try:
                with block_hashes.collective_reads():
                    return load(*args, **kwargs)
            except CheckpointException as error:
                found = [cause for cause in causes(error) if isinstance(cause, DamagedShard)]
                if not found:
                    raise
                for damage in found:
                    _damaged[os.path.realpath(damage.directory)] = str(damage)

    return load_complete


def causes(error: Optional[BaseException]) -> Iterator[BaseException]:
    """An error, its causes, and the errors of other ranks in a save or a load."""
    seen: Set[int] = set()
    stack = [error]
    while stack:
        current = stack.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        if isinstance(current, CheckpointException):
            stack += [failure[0] for failure in current.failures.values()]
        stack += [current.__cause__, current.__context__]


def find_problem(directory: str) -> Optional[str]:
    """One sentence on why a checkpoint directory is incomplete, or None if it is complete."""
    if not os.path.isdir(directory):
        return f"{directory} does not exist."
    if damage := _damaged.get(os.path.realpath(directory)):
        return f"{directory} is not a complete checkpoint: {damage}"
    try:
        if has_manifest(directory):
            wrong = _compare_with_manifest(directory)
        else:
            wrong = _check_without_manifest(directory)
    except OSError as error:
        wrong = [f"it cannot be read ({error})"]
    if not wrong:
        return None
    more = f", and {len(wrong) - 4} more" if len(wrong) > 4 else ""
    return f"{directory} is not a complete checkpoint: {'; '.join(wrong[:4])}{more}."


def has_manifest(directory: str) -> bool:
    """Whether `begin_save` was called for this checkpoint directory."""
    return os.path.isfile(os.path.join(directory, MANIFEST))


def holds_checkpoint(load_dir: str) -> bool:
    """Whether a save completed in `load_dir`, even if there is no tracker file."""
    if MultiStorageClientFeature.is_enabled() or not os.path.isdir(load_dir):
        return False
    directories = [iteration_dir(load_dir, iteration) for iteration in _iterations(load_dir)]
    return any(has_manifest(path) and not _is_incomplete_save(path) for path in directories)


def iteration_dir(load_dir: str, iteration: int) -> str:
    """The directory of one iteration's checkpoint."""
    return os.path.join(load_dir, iteration_name(iteration))


def _compare_with_manifest(directory: str) -> List[str]:
    try:
        manifest = _read_json(os.path.join(directory, MANIFEST))
        if manifest.get("version", 1) not in range(1, VERSION + 1):
            return [f"{MANIFEST} has the unsupported version {manifest['version']}"]
        if manifest["state"] == "writing":
            return ["the save did not finish"]
        expected = manifest["files"].items()
        for name, properties in expected:
            _check_entry(name, properties)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST} is damaged ({error!r:.200})"]
    wrong = []
    for name, properties in expected:
        path = os.path.join(directory, name)
        complaint = _check_size(path, name, properties["size"], exact=True)
        if complaint is None and "sha256" in properties and _sha256(path) != properties["sha256"]:
            complaint = f"{name} has different contents than when it was saved (SHA-256)"
        if complaint:
            wrong.append(complaint)
    if not wrong and ".metadata" in manifest["files"]:
        wrong += _check_metadata(directory)
    return wrong


def _check_metadata(directory: str) -> List[str]:
    """Problems of the metadata files, whose sizes and hashes agree with the manifest."""
    try:
        restricted_pickle.read_metadata(directory)
    except restricted_pickle.RestrictedPickleError as error:
        return [f".metadata is damaged ({error})"]
    path = os.path.join(directory, "metadata.json")
    try:
        if os.path.isfile(path) and not isinstance(_read_json(path), dict):
            return ["metadata.json is damaged (not a JSON object)"]
    except ValueError as error:
        return [f"metadata.json is damaged ({error})"]
    return []


def _check_without_manifest(directory: str) -> List[str]:
    names = _files(directory)
    if (
        "metadata.json" in names
        or ".metadata" in names
        or any(name.endswith(".distcp") for name in names)
    ):
        return _check_distributed(directory, names)
    if any(name.startswith("mp_rank_") for name in names):
        return _check_torch_files(directory, [name for name in names if name.endswith(".pt")])
    return ["it holds neither metadata.json nor .metadata nor an mp_rank_ directory"]


def _check_distributed(directory: str, names: List[str]) -> List[str]:
    """Formats torch_dist, torch_dcp and fsdp_dtensor."""
    wrong = []
    if "metadata.json" in names:
        try:
            if (
                _read_json(os.path.join(directory, "metadata.json"))["sharded_backend"]
                != "torch_dist"
            ):
                return []  # An older format with unknown files.
        except (ValueError, KeyError, TypeError) as error:
            wrong.append(f"metadata.json is damaged ({error!r:.200})")
    if ".metadata" not in names:
        return wrong + [".metadata is missing"]
    try:
        metadata = restricted_pickle.read_metadata(directory)
    except restricted_pickle.RestrictedPickleError as error:
        size = os.path.getsize(os.path.join(directory, ".metadata"))
        return wrong + [f".metadata is damaged ({size} bytes; {error})"]
    # Objects other than tensors are shards since 0.19; before, they were in common.pt.
    has_common_state = any(key.startswith("common_state") for key in metadata.state_dict_metadata)
    if "metadata.json" in names:
        if not has_common_state and "common.pt" not in names:
            wrong.append("common.pt is missing")
    elif has_common_state or "common.pt" in names or hasattr(metadata, "mcore_data"):
        wrong.append("metadata.json is missing")
    if "common.pt" in names:
        wrong += _check_torch_files(directory, ["common.pt"])

    needed: Dict[str, int] = {}
    for place in (metadata.storage_data or {}).values():
        end = place.offset + place.length
        needed[place.relative_path] = max(end, needed.get(place.relative_path, 0))
    for name, size in sorted(needed.items()):
        complaint = _check_size(os.path.join(directory, name), name, size, exact=False)
        if complaint:
            wrong.append(complaint)
    return wrong


def _check_torch_files(directory: str, names: List[str]) -> List[str]:
    """Files of torch.save: zip archives, whose directory is at the end of the file."""
    wrong = []
    for name in names:
        path = os.path.join(directory, name)
        with open(path, "rb") as file:
            start = file.read(2)
        if not start or (start == b"PK" and not zipfile.is_zipfile(path)):
            wrong.append(f"{name} is truncated ({os.path.getsize(path)} bytes)")
    return wrong


def _check_size(path: str, name: str, expected: int, exact: bool) -> Optional[str]:
    try:
        size = os.path.getsize(path)
    except FileNotFoundError:
        return f"{name} is missing (expected {expected} bytes)"
    if not os.path.isfile(path):
        return f"{name} is not a file"
    if size < expected or (exact and size != expected):
        return f"{name} has {size} bytes, expected {expected}" + ("" if exact else " or more")
    return None


def _is_incomplete_save(directory: str) -> bool:
    """Whether `begin_save` was called for this directory, and `finish_save` was not."""
    if not has_manifest(directory):
        return False
    try:
        return _read_json(os.path.join(directory, MANIFEST))["state"] == "writing"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _iterations(load_dir: str) -> List[int]:
    """Iterations that have a directory, newest first."""
    if not os.path.isdir(load_dir):
        return []
    matches = (re.fullmatch(r"iter_(\d{7,})", name) for name in os.listdir(load_dir))
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def _read_tracker(load_dir: str) -> Tuple[Tracker, List[str]]:
    """What the tracker names, and warnings."""
    path = os.path.join(load_dir, TRACKER)
    if not os.path.exists(path):
        return None, []
    if not os.path.isfile(path):
        return "", [f'{path} is not a file; expected the number of an iteration, or "release".']
    with open(path, errors="replace") as file:
        text = file.read().strip()
    if text == RELEASE:
        return text, []
    if re.fullmatch(r"[0-9]{1,18}", text):
        return int(text), []
    content = f"holds {text[:40]!r}" if text else "is empty"
    return "", [f'{path} {content}; expected the number of an iteration, or "release".']


def _describe_newer(load_dir: str, iteration: int, tracker: int) -> str:
    directory = iteration_dir(load_dir, iteration)
    problem = find_problem(directory)
    if problem:
        return problem
    return (
        f"{directory} is complete, but {os.path.join(load_dir, TRACKER)} names {tracker}, which is "
        f"used. Write {iteration} to it to resume from there."
    )


def _choose_without_verifying(load_dir: str, ckpt_step: Optional[int]) -> Choice:
    if ckpt_step:
        return Choice(ckpt_step, False, [])
    path = os.path.join(load_dir, TRACKER)
    msc = MultiStorageClientFeature.import_package()
    if not msc.os.path.isfile(path):
        return Choice(-1, False, [])
    with msc.open(path, "r") as file:
        text = file.read().strip()
    if text == RELEASE:
        return Choice(0, True, [])
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise CheckpointLoadError(
            f'{path} holds {text[:40]!r}; expected an iteration, or "release".'
        )
    return Choice(int(text), False, [])


def _files(directory: str) -> List[str]:
    """Relative paths of all files in a directory tree, without the manifest, pipes and devices."""
    names = []
    for parent, _, files in os.walk(directory):
        paths = (os.path.join(parent, name) for name in files)
        names += [os.path.relpath(path, directory) for path in paths if os.path.isfile(path)]
    return sorted(name for name in names if name not in (MANIFEST, MANIFEST + ".tmp"))


def _read_json(path: str) -> dict:
    """Read a JSON file; ValueError, without the text, if it is invalid."""
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file)
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 at byte {error.start}") from None
        except RecursionError:
            raise ValueError("nested too deeply") from None


def _check_entry(name: str, properties: dict) -> None:
    """Raise ValueError for a file outside the directory, or without a valid size."""
    if os.path.isabs(name) or ".." in name.split("/") or "\0" in name:
        raise ValueError(f"{name!r:.80} is not in the directory")
    size = properties["size"]
    if type(size) is not int or not 0 <= size < 2**63:
        raise ValueError(f"{name!r:.80} has size = {size!r:.40}")


def _write_atomically(path: str, text: str) -> None:
    """Replace a file; a reader finds the old or the new content, also after a power failure."""
    with open(path + ".tmp", "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)
    _sync(os.path.dirname(path))


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass  # Some network file systems refuse fsync for directories.
    finally:
        os.close(handle)


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
