# Copyright (c) 2026, the megatron-core gptoss authors.

"""Which checkpoints are whole, and which one a run goes on from.

A save first marks its iteration folder as unfinished, and when every file is durable writes the
list of them, with their sizes, into the folder's manifest.json; only then does the tracker
latest_checkpointed_iteration.txt name the iteration. A load verifies what the tracker names, and
falls back to the newest whole checkpoint before it. Rank 0 looks, every rank gets its decision.

A folder without manifest.json was written by upstream. It counts as whole when its own metadata is
readable and every file that the metadata refers to is there, and large enough.

Sizes cost one stat a file, so that a checkpoint of thousands of large shards is verified in
moments. Of small files the contents are hashed; those of shards by whoever reads them (see
megatron/core/dist_checkpointing/block_hashes.py).
"""

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
from megatron.core.msc_utils import MultiStorageClientFeature

MANIFEST = 'manifest.json'
# 2: shards have hashes. Manifests of before have no version.
VERSION = 2
TRACKER = 'latest_checkpointed_iteration.txt'
# Hashing this much takes about 10 ms. Metadata is smaller, also that of large models' shards.
LARGEST_HASHED_FILE = 16 * 2**20

_reported = set()
# What a load found out about the shards of a folder.
_damaged: Dict[str, str] = {}


class CheckpointError(RuntimeError):
    """There is a checkpoint, but none that can be used."""


class Choice(NamedTuple):
    """What to load, as upstream's read_metadata() returns it, and what to tell the user."""

    iteration: int  # -1: there is no checkpoint.
    release: bool
    messages: List[str]


# ---------------------------------------------------------------------------------------------
# Saving
# ---------------------------------------------------------------------------------------------


def begin_save(folder: str) -> None:
    """Mark a checkpoint folder as unfinished, before any rank writes into it.

    Collective. The folder may hold an earlier checkpoint of the same iteration, whose files the
    save replaces one by one with others of the same size.
    """
    if MultiStorageClientFeature.is_enabled():
        return  # Objects appear whole or not at all, and cannot be renamed.
    if _rank() == 0:
        os.makedirs(folder, exist_ok=True)
        manifest = {'version': VERSION, 'state': 'writing'}
        _write_atomically(os.path.join(folder, MANIFEST), json.dumps(manifest))
        for name in _files(folder):  # they are of the earlier checkpoint's shards
            if name.endswith(block_hashes.SUFFIX):
                os.unlink(os.path.join(folder, name))
        _damaged.pop(os.path.realpath(folder), None)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def finish_save(folder: str) -> None:
    """List the files of a finished checkpoint. For rank 0, once every rank has written its own."""
    if MultiStorageClientFeature.is_enabled():
        return
    files = {}
    for name in _files(folder):
        path = os.path.join(folder, name)
        files[name] = {'size': os.path.getsize(path)}
        if files[name]['size'] <= LARGEST_HASHED_FILE and not name.endswith('.distcp'):
            # Shards are durable: their writers call fsync. The metadata was written by this rank.
            _sync(path)
            files[name]['sha256'] = _sha256(path)
    manifest = {'version': VERSION, 'state': 'complete', 'files': files}
    _write_atomically(os.path.join(folder, MANIFEST), json.dumps(manifest, indent=1))


def write_tracker(path: str, text: str) -> None:
    """Let the tracker name another iteration; a reader finds the old name or the new one."""
    if MultiStorageClientFeature.is_enabled():
        with MultiStorageClientFeature.import_package().open(path, 'w') as file:
            file.write(text)
    else:
        _write_atomically(path, text)


# ---------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------


def resolve(load_dir: str, ckpt_step: Optional[int] = None) -> Tuple[int, bool]:
    """The checkpoint of `load_dir` to load: the newest whole one, but none after the tracker's.

    A tracker that names a folder which is not there says nothing about newer ones.
    Collective where torch.distributed is initialised.

    Args:
        load_dir: the folder of iter_XXXXXXX folders.
        ckpt_step: the iteration that the user asks for (--ckpt-step); no other will do then.
    Returns:
        (iteration, release); iteration is -1 where there is no checkpoint to go on from.
    Raises:
        CheckpointError: on every rank, if there are checkpoints but none is whole, or not the one
            that was asked for.
    """
    outcome: List[Union[Choice, CheckpointError, None]] = [None]
    if _rank() == 0:
        try:
            outcome[0] = choose(load_dir, ckpt_step)
        except CheckpointError as error:
            outcome[0] = error
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], CheckpointError):
        raise outcome[0]
    iteration, release, messages = outcome[0]
    for message in messages:
        if _rank() == 0 and message not in _reported:  # A load resolves more than once.
            _reported.add(message)
            print(f'WARNING: {message}', flush=True)
    return iteration, release


def choose(load_dir: str, ckpt_step: Optional[int] = None) -> Choice:
    """What resolve() decides, on this rank alone."""
    if MultiStorageClientFeature.is_enabled():
        return _choose_without_verifying(load_dir, ckpt_step)
    if ckpt_step:
        problem = find_problem(_folder(load_dir, ckpt_step))
        if problem:
            raise CheckpointError(
                f'--ckpt-step {ckpt_step}: {problem} {_whole_ones(load_dir, ckpt_step)}'
            )
        return Choice(ckpt_step, False, [])

    tracker, messages = _read_tracker(load_dir)
    if tracker == 'release':
        problem = find_problem(os.path.join(load_dir, 'release'))
        if problem:
            raise CheckpointError(f'{os.path.join(load_dir, TRACKER)} names "release": {problem}')
        return Choice(0, True, [])

    found = _iterations(load_dir)
    if isinstance(tracker, int) and tracker not in found and any(i > tracker for i in found):
        # Nobody goes back to what is not there: a number that lost its end, or a deleted folder.
        messages.append(
            f'{os.path.join(load_dir, TRACKER)} names {tracker}, which has no directory.'
        )
        tracker = ''
    if isinstance(tracker, int):
        for iteration in [iteration for iteration in found if iteration > tracker]:
            messages.append(_describe_newer(load_dir, iteration, tracker))
        found = [tracker] + [iteration for iteration in found if iteration < tracker]
    for iteration in found:
        folder = _folder(load_dir, iteration)
        problem = find_problem(folder)
        if not problem and tracker is None and not has_manifest(folder):
            problem = (
                f'{folder} has no {MANIFEST} and no {TRACKER} names it. To use it, write '
                f'{iteration} to {os.path.join(load_dir, TRACKER)}.'
            )
        if not problem:
            if messages or iteration != tracker:
                messages.append(f'{folder} is the newest complete checkpoint: resuming from it.')
            return Choice(iteration, False, messages)
        messages.append(problem)

    if tracker is None and all(_is_unfinished(_folder(load_dir, i)) for i in found):
        # Nothing was ever completed here, so that nothing is lost.
        if found:
            messages.append(f'{load_dir} never held a complete checkpoint: starting from step 0.')
        return Choice(-1, False, messages)
    messages.append(
        f'No complete checkpoint in {load_dir}, and training from step 0 would overwrite what is '
        'there. Restore the files named above, give --load another directory, or move this one '
        'away to restart training.'
    )
    raise CheckpointError('\n'.join(messages))


def pass_over_damaged(load: Callable) -> Callable:
    """A load that finds a damaged shard begins again, with the newest complete one before it.

    Every rank learns of a damage that one rank reads, so that all begin again.
    """

    @wraps(load)
    def load_whole(*args, **kwargs):
        while True:
            try:
                with block_hashes.reading_together():
                    return load(*args, **kwargs)
            except CheckpointException as error:
                found = [cause for cause in causes(error) if isinstance(cause, DamagedShard)]
                if not found:
                    raise
                for damage in found:
                    _damaged[os.path.realpath(damage.folder)] = str(damage)

    return load_whole


def causes(error: Optional[BaseException]) -> Iterator[BaseException]:
    """An error, what caused it, and what other ranks of a save or a load reported."""
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


def find_problem(folder: str) -> Optional[str]:
    """One sentence on why a checkpoint folder is not whole, or None if it is."""
    if not os.path.isdir(folder):
        return f'{folder} does not exist.'
    if damage := _damaged.get(os.path.realpath(folder)):
        return f'{folder} is not a complete checkpoint: {damage}'
    try:
        if has_manifest(folder):
            wrong = _compare_with_manifest(folder)
        else:
            wrong = _check_without_manifest(folder)
    except OSError as error:
        wrong = [f'it cannot be read ({error})']
    if not wrong:
        return None
    more = f', and {len(wrong) - 4} more' if len(wrong) > 4 else ''
    return f'{folder} is not a complete checkpoint: {"; ".join(wrong[:4])}{more}.'


def has_manifest(folder: str) -> bool:
    """Whether a save of ours began in this checkpoint folder."""
    return os.path.isfile(os.path.join(folder, MANIFEST))


def holds_checkpoint(load_dir: str) -> bool:
    """Whether there is something to go on from though no tracker may say so."""
    if MultiStorageClientFeature.is_enabled() or not os.path.isdir(load_dir):
        return False
    folders = [_folder(load_dir, iteration) for iteration in _iterations(load_dir)]
    return any(has_manifest(folder) and not _is_unfinished(folder) for folder in folders)


# ---------------------------------------------------------------------------------------------
# One folder
# ---------------------------------------------------------------------------------------------


def _compare_with_manifest(folder: str) -> List[str]:
    try:
        manifest = _read_json(os.path.join(folder, MANIFEST))
        if manifest.get('version', 1) not in range(1, VERSION + 1):
            return [f'{MANIFEST} has the unsupported version {manifest["version"]}']
        if manifest['state'] == 'writing':
            return ['the save did not finish']
        expected = manifest['files'].items()
        for name, properties in expected:
            _check_entry(name, properties)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f'{MANIFEST} is damaged ({error!r:.200})']
    wrong = []
    for name, properties in expected:
        path = os.path.join(folder, name)
        complaint = _check_size(path, name, properties['size'], exact=True)
        if complaint is None and 'sha256' in properties and _sha256(path) != properties['sha256']:
            complaint = f'{name} has different contents than when it was saved (SHA-256)'
        if complaint:
            wrong.append(complaint)
    if not wrong and '.metadata' in manifest['files']:
        wrong += _check_metadata(folder)
    return wrong


def _check_metadata(folder: str) -> List[str]:
    """What the manifest does not say: whether the metadata is what a save writes."""
    try:
        restricted_pickle.read_metadata(folder)
    except restricted_pickle.RestrictedPickleError as error:
        return [f'.metadata is damaged ({error})']
    path = os.path.join(folder, 'metadata.json')
    try:
        if os.path.isfile(path) and not isinstance(_read_json(path), dict):
            return ['metadata.json is damaged (not a JSON object)']
    except ValueError as error:
        return [f'metadata.json is damaged ({error})']
    return []


def _check_without_manifest(folder: str) -> List[str]:
    names = _files(folder)
    if (
        'metadata.json' in names
        or '.metadata' in names
        or any(name.endswith('.distcp') for name in names)
    ):
        return _check_distributed(folder, names)
    if any(name.startswith('mp_rank_') for name in names):
        return _check_torch_files(folder, [name for name in names if name.endswith('.pt')])
    return ['it holds neither metadata.json nor .metadata nor an mp_rank_ directory']


def _check_distributed(folder: str, names: List[str]) -> List[str]:
    """Formats torch_dist, torch_dcp and fsdp_dtensor."""
    wrong = []
    if 'metadata.json' in names:
        try:
            if _read_json(os.path.join(folder, 'metadata.json'))['sharded_backend'] != 'torch_dist':
                return []  # An older format, of whose files nothing is known.
        except (ValueError, KeyError, TypeError) as error:
            wrong.append(f'metadata.json is damaged ({error!r:.200})')
    if '.metadata' not in names:
        return wrong + ['.metadata is missing']
    try:
        metadata = restricted_pickle.read_metadata(folder)
    except restricted_pickle.RestrictedPickleError as error:
        size = os.path.getsize(os.path.join(folder, '.metadata'))
        return wrong + [f'.metadata is damaged ({size} bytes; {error})']
    # Since 0.19 the objects that are no tensors are shards, too; before, they had a file.
    has_common_state = any(key.startswith('common_state') for key in metadata.state_dict_metadata)
    if 'metadata.json' in names:
        if not has_common_state and 'common.pt' not in names:
            wrong.append('common.pt is missing')
    elif has_common_state or 'common.pt' in names or hasattr(metadata, 'mcore_data'):
        wrong.append('metadata.json is missing')
    if 'common.pt' in names:
        wrong += _check_torch_files(folder, ['common.pt'])

    needed: Dict[str, int] = {}
    for place in (metadata.storage_data or {}).values():
        end = place.offset + place.length
        needed[place.relative_path] = max(end, needed.get(place.relative_path, 0))
    for name, size in sorted(needed.items()):
        complaint = _check_size(os.path.join(folder, name), name, size, exact=False)
        if complaint:
            wrong.append(complaint)
    return wrong


def _check_torch_files(folder: str, names: List[str]) -> List[str]:
    """Files of torch.save: a zip archive, whose table of contents is at its end."""
    wrong = []
    for name in names:
        path = os.path.join(folder, name)
        with open(path, 'rb') as file:
            start = file.read(2)
        if not start or (start == b'PK' and not zipfile.is_zipfile(path)):
            wrong.append(f'{name} is truncated ({os.path.getsize(path)} bytes)')
    return wrong


def _check_size(path: str, name: str, expected: int, exact: bool) -> Optional[str]:
    try:
        size = os.path.getsize(path)
    except FileNotFoundError:
        return f'{name} is missing (expected {expected} bytes)'
    if size < expected or (exact and size != expected):
        return f'{name} has {size} bytes, expected {expected}' + ('' if exact else ' or more')
    return None


def _is_unfinished(folder: str) -> bool:
    """Whether a save of ours began here and did not end."""
    try:
        return _read_json(os.path.join(folder, MANIFEST))['state'] == 'writing'
    except (OSError, ValueError, KeyError, TypeError):
        return False


# ---------------------------------------------------------------------------------------------
# The folder of folders
# ---------------------------------------------------------------------------------------------


def _folder(load_dir: str, iteration: int) -> str:
    return os.path.join(load_dir, f'iter_{iteration:07d}')


def _iterations(load_dir: str) -> List[int]:
    """Iterations that have a folder, newest first."""
    if not os.path.isdir(load_dir):
        return []
    matches = (re.fullmatch(r'iter_(\d{7,})', name) for name in os.listdir(load_dir))
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def _read_tracker(load_dir: str) -> Tuple[Union[int, str, None], List[str]]:
    """(what the tracker names, complaints): an iteration, 'release', None: no file, '': damaged."""
    path = os.path.join(load_dir, TRACKER)
    try:
        with open(path, errors='replace') as file:
            text = file.read().strip()
    except FileNotFoundError:
        return None, []
    if text == 'release':
        return text, []
    if re.fullmatch(r'[0-9]{1,18}', text):
        return int(text), []
    content = f'holds {text[:40]!r}' if text else 'is empty'
    return '', [f'{path} {content}; expected the number of an iteration, or "release".']


def _describe_newer(load_dir: str, iteration: int, tracker: int) -> str:
    folder = _folder(load_dir, iteration)
    problem = find_problem(folder)
    if problem:
        return problem
    return (
        f'{folder} is complete, but {os.path.join(load_dir, TRACKER)} names {tracker}, which is '
        f'used. Write {iteration} to it to resume from there.'
    )


def _whole_ones(load_dir: str, but: int) -> str:
    whole = [
        str(iteration)
        for iteration in _iterations(load_dir)
        if iteration != but and not find_problem(_folder(load_dir, iteration))
    ]
    return f'Complete checkpoints in {load_dir}: {", ".join(whole) or "none"}.'


def _choose_without_verifying(load_dir: str, ckpt_step: Optional[int]) -> Choice:
    if ckpt_step:
        return Choice(ckpt_step, False, [])
    path = os.path.join(load_dir, TRACKER)
    msc = MultiStorageClientFeature.import_package()
    if not msc.os.path.isfile(path):
        return Choice(-1, False, [])
    with msc.open(path, 'r') as file:
        text = file.read().strip()
    if text == 'release':
        return Choice(0, True, [])
    if not re.fullmatch(r'[0-9]{1,18}', text):
        raise CheckpointError(f'{path} holds {text[:40]!r}; expected an iteration, or "release".')
    return Choice(int(text), False, [])


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def _files(folder: str) -> List[str]:
    """Every file below a folder, by its path from there, the manifest left out."""
    names = []
    for parent, _, files in os.walk(folder):
        names += [os.path.relpath(os.path.join(parent, name), folder) for name in files]
    return sorted(name for name in names if name not in (MANIFEST, MANIFEST + '.tmp'))


def _read_json(path: str) -> dict:
    """A JSON file; ValueError, without the text, on what is none."""
    with open(path, encoding='utf-8') as file:
        try:
            return json.load(file)
        except UnicodeDecodeError as error:
            raise ValueError(f'not UTF-8 at byte {error.start}') from None
        except RecursionError:
            raise ValueError('nested too deeply') from None


def _check_entry(name: str, properties: dict) -> None:
    """Refuse a file of a manifest that is not in its folder, or of which no size is known."""
    if os.path.isabs(name) or '..' in name.split('/') or '\0' in name:
        raise ValueError(f'{name!r:.80} is not in the directory')
    size = properties['size']
    if type(size) is not int or not 0 <= size < 2**63:
        raise ValueError(f'{name!r:.80} has size = {size!r:.40}')


def _write_atomically(path: str, text: str) -> None:
    """A reader, also one after a power cut, finds the old contents or the new ones."""
    with open(path + '.tmp', 'w') as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + '.tmp', path)
    _sync(os.path.dirname(path))


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass  # Some network file systems refuse it for folders.
    finally:
        os.close(handle)


def _sha256(path: str) -> str:
    with open(path, 'rb') as file:
        return hashlib.sha256(file.read()).hexdigest()


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
