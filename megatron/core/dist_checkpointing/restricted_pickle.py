# Copyright (c) 2026, the megatron-core gptoss authors.

"""The pickles of a checkpoint, read without running what they name.

PyTorch's `FileSystemReader` unpickles `.metadata`, and `DefaultLoadPlanner` the objects of a
checkpoint, with every class and function that the file asks for: a checkpoint of somebody else
runs their code. Here only the classes of which metadata consists are known, objects are loaded
with weights_only=True, and what was read is checked before anything uses it.

`restrict_readers` makes PyTorch's classes, from which all of Megatron's readers derive, read this
way; importing `megatron.core.dist_checkpointing` calls it.
"""

import io
import math
import os
import pickle
import pickletools
import re
from typing import Any, BinaryIO, Callable, Optional

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

METADATA_NAME = '.metadata'
_ALTERED = 'The file is damaged, or Megatron did not write it; use another checkpoint.'

_OWN_CLASSES = 'megatron.core.dist_checkpointing.strategies.torch'
_METADATA_CLASSES = {
    'torch': ('Size',),
    'torch.serialization': ('_get_layout',),
    'torch.distributed.checkpoint.metadata': (
        'Metadata',
        'MetadataIndex',
        'TensorStorageMetadata',
        'BytesStorageMetadata',
        'ChunkStorageMetadata',
        'TensorProperties',
        'StorageMeta',
        '_MEM_FORMAT_ENCODING',
    ),
    # Megatron keeps each rank's plan of the save, to use it again for the next one.
    'torch.distributed.checkpoint.planner': (
        'SavePlan',
        'WriteItem',
        'WriteItemType',
        'TensorWriteData',
        'BytesIOWriteData',
    ),
    'torch.distributed.checkpoint.filesystem': ('_StorageInfo', '_StoragePrefix'),
    # What Megatron-Core up to 0.15 saved in their place; later releases keep the names to read it.
    _OWN_CLASSES: ('MCoreMetadata', 'MCoreSavePlan'),
    # Before PyTorch 2.3.
    'torch.distributed._shard.sharded_tensor.metadata': ('TensorProperties', 'MEM_FORMAT_ENCODING'),
    'collections': ('OrderedDict',),
    # The path that it was written to.
    'pathlib': ('Path', 'PosixPath', 'PurePosixPath', 'WindowsPath', 'PureWindowsPath'),
    'pathlib._local': ('Path', 'PosixPath', 'PurePosixPath', 'WindowsPath', 'PureWindowsPath'),
}
_METADATA_NAMES = frozenset(
    (module, name) for module, names in _METADATA_CLASSES.items() for name in names
)


class RestrictedPickleError(pickle.UnpicklingError, ValueError):
    """A pickle that is damaged, or asks for what it has no need of; one sentence."""


def find_metadata_class(module: str, name: str) -> Any:
    """What a name in `.metadata` stands for.

    Raises:
        RestrictedPickleError: for every name that no metadata has.
    """
    if (module, name) in _METADATA_NAMES:
        return pickle.Unpickler(io.BytesIO()).find_class(module, name)
    if module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype):
        return getattr(torch, name)
    raise RestrictedPickleError(f'it asks for {module}.{name}'[:120] + ', which is not allowed')


def load_restricted(
    data: bytes,
    find_class: Callable[[str, str], Any] = find_metadata_class,
    persistent_load: Optional[Callable[[Any], Any]] = None,
) -> Any:
    """The object of a pickle that names nothing but what `find_class` knows.

    Args:
        data: the pickle, of protocol 2 or newer.
        find_class: as `pickle.Unpickler.find_class`, for every class and function; raises
            RestrictedPickleError for what is not allowed.
        persistent_load: as `pickle.Unpickler.persistent_load`; without it there are no such ids.
    Raises:
        RestrictedPickleError: anything else than such a pickle.
    """
    _check_opcodes(data, persistent_load is not None)
    unpickler = _Unpickler(data, find_class, persistent_load)
    try:
        return unpickler.load()
    except RestrictedPickleError:
        raise
    except Exception as error:  # whatever a damaged pickle runs into
        raise RestrictedPickleError(f'it cannot be unpickled ({_short(error)})') from error
    finally:
        unpickler.check_classes()


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, find_class, persistent_load):
        super().__init__(io.BytesIO(data))
        self._find_class, self._persistent_load = find_class, persistent_load
        self._classes: dict = {}

    def find_class(self, module: str, name: str) -> Any:
        """See `pickle.Unpickler`."""
        found = self._find_class(module, name)
        if isinstance(found, type) and found not in self._classes:
            self._classes[found] = dict(vars(found))
        return found

    def check_classes(self) -> None:
        """Undo what the pickle did to the classes themselves: the opcode BUILD can set attributes."""
        for found, before in self._classes.items():
            now = dict(vars(found))
            changed = [k for k in {**before, **now} if before.get(k) is not now.get(k)]
            for name in changed:
                if name in before:
                    setattr(found, name, before[name])
                else:
                    delattr(found, name)
            if changed:
                raise RestrictedPickleError(f'it sets {found.__name__}.{changed[0]!s:.40}')

    def persistent_load(self, pid: Any) -> Any:
        """See `pickle.Unpickler`."""
        if self._persistent_load is None:
            raise RestrictedPickleError('it refers to objects outside itself')
        return self._persistent_load(pid)


# Opcodes of protocols 0 and 1 that newer ones do not write, of the registry of extensions, and of
# buffers outside the pickle.
_REFUSED_OPCODES = frozenset(
    'INT LONG STRING UNICODE FLOAT PUT GET INST OBJ DUP PERSID EXT1 EXT2 EXT4 NEXT_BUFFER '
    'READONLY_BUFFER BYTEARRAY8'.split()
)
_LENGTH_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}


def _argument_sizes() -> list:
    """For each opcode: bytes of its argument; -n where n bytes tell its length; None: refused."""
    sizes: list = [None] * 256
    for opcode in pickletools.opcodes:
        if opcode.name in _REFUSED_OPCODES:
            continue
        size = 0 if opcode.arg is None else opcode.arg.n
        sizes[ord(opcode.code)] = -_LENGTH_BYTES[size] if size in _LENGTH_BYTES else size
    return sizes


_ARGUMENT_SIZES = _argument_sizes()
_GLOBAL, _BINPERSID, _PROTO, _STOP, _LONG_BINPUT = b'cQ\x80.r'


def _check_opcodes(data: bytes, persistent: bool) -> None:
    """Walk through a pickle as the unpickler would, without making any object.

    The unpickler trusts two numbers: a place in its memo, for which it takes 16 times as many bytes
    of memory at once, and the length of what follows.
    """
    if data[:1] != b'\x80' or not data.endswith(b'.'):
        raise RestrictedPickleError('it does not begin and end as a pickle does')
    position, count, end = 0, 0, len(data)
    sizes = _ARGUMENT_SIZES
    while position < end:
        opcode = data[position]
        size = sizes[opcode]
        position += 1
        count += 1
        if size is None or (opcode == _BINPERSID and not persistent):
            raise RestrictedPickleError(f'it has the unknown opcode {opcode} at {position - 1}')
        if size > 0:
            if opcode == _LONG_BINPUT:
                if int.from_bytes(data[position : position + 4], 'little') > count:
                    raise RestrictedPickleError(f'its memo is damaged at {position - 1}')
            position += size
        elif size < 0 and opcode != _GLOBAL:
            length = int.from_bytes(data[position : position - size], 'little')
            position += length - size
        elif opcode == _GLOBAL:
            for _ in range(2):
                position = data.find(b'\n', position, position + 256) + 1
                if position == 0:
                    raise RestrictedPickleError('it has an unterminated name')
        elif opcode == _STOP:
            break
    if position != end:
        raise RestrictedPickleError('it is truncated, or has trailing bytes')


# ---------------------------------------------------------------------------------------------
# Metadata
# ---------------------------------------------------------------------------------------------


def metadata_of(data: bytes, path: str) -> Metadata:
    """The metadata of a torch_dist checkpoint, from the bytes of its `.metadata`.

    Args:
        data: content of the file.
        path: of the file, for messages.
    Raises:
        RestrictedPickleError: names the file, the field and what is wrong with it.
    """
    try:
        metadata = load_restricted(data)
        _check_metadata(metadata)
    except RestrictedPickleError as error:
        raise RestrictedPickleError(f'{path}: {error}. {_ALTERED}') from error
    return metadata


def read_metadata(directory) -> Metadata:
    """The metadata of a checkpoint directory, see `metadata_of`."""
    path = os.path.join(directory, METADATA_NAME)
    with open(path, 'rb') as stream:
        return metadata_of(stream.read(), path)


def _check_metadata(metadata: Any) -> None:
    """Refuse metadata whose fields are not of their kind, or point out of the directory."""
    tensors = getattr(metadata, 'state_dict_metadata', None)
    if not _is_metadata(metadata) or not isinstance(tensors, dict):
        raise RestrictedPickleError('it holds no checkpoint metadata')
    for key, entry in tensors.items():
        if not isinstance(key, str):
            raise RestrictedPickleError(f'state_dict_metadata has the key {_short(key)}')
        if isinstance(entry, TensorStorageMetadata):
            _check_tensor(key, vars(entry))
        elif not isinstance(entry, BytesStorageMetadata):
            raise RestrictedPickleError(f'{key!r:.80} is a {type(entry).__name__}')
    _check_shapes_before_flattening(getattr(metadata, 'mcore_data', None))
    places = getattr(metadata, 'storage_data', None)
    if places is None:
        return
    if not isinstance(places, dict):
        raise RestrictedPickleError('storage_data is not a dict')
    for index, place in places.items():
        fields = getattr(place, '__dict__', {})
        if not isinstance(index, MetadataIndex) or not isinstance(vars(index).get('fqn'), str):
            raise RestrictedPickleError(f'storage_data has the key {_short(index)}')
        if not all(_is_count(fields.get(name)) for name in ('offset', 'length')):
            raise RestrictedPickleError(
                f'{index.fqn!r:.80} lies at offset {_short(fields.get("offset"))} and has length '
                f'{_short(fields.get("length"))}, which are not byte counts'
            )
        _check_relative(index.fqn, fields.get('relative_path'))
        chunk = tensors.get(index.fqn)
        if isinstance(chunk, TensorStorageMetadata) and vars(index).get('offset') is not None:
            if not _is_shape(index.offset, len(chunk.size)):
                raise RestrictedPickleError(f'{index.fqn!r:.80} has a damaged offset')


def _is_metadata(value: Any) -> bool:
    kind = type(value)
    return kind is Metadata or (kind.__module__, kind.__name__) == (_OWN_CLASSES, 'MCoreMetadata')


def _check_shapes_before_flattening(data: Any) -> None:
    """What Megatron-Core up to 0.15 kept of each tensor: its shape, where it was saved flat."""
    if data is None:
        return
    if not isinstance(data, dict):
        raise RestrictedPickleError(f'mcore_data is {_short(data)}')
    for key, entry in data.items():
        if not isinstance(entry, dict) or not all(map(_is_shape, entry.values())):
            raise RestrictedPickleError(f'mcore_data has {_short(entry)} for {key!r:.80}')


def _check_relative(key: str, path: Any) -> None:
    parts = path.split('/') if isinstance(path, str) else ['..']
    if os.path.isabs(str(path)) or '..' in parts or '\0' in path or not path:
        raise RestrictedPickleError(
            f'{key!r:.80} has relative_path = {_short(path)}, which is not in the directory'
        )


def _check_tensor(key: str, fields: dict) -> None:
    size, chunks = fields.get('size'), fields.get('chunks')
    dtype = getattr(fields.get('properties'), 'dtype', None)
    if not _is_shape(size):
        raise RestrictedPickleError(f'{key!r:.80} has size = {_short(size)}')
    if not isinstance(dtype, torch.dtype):
        raise RestrictedPickleError(f'{key!r:.80} has dtype = {_short(dtype)}')
    if not isinstance(fields['properties'], TensorProperties) or not isinstance(chunks, list):
        raise RestrictedPickleError(f'{key!r:.80} has no list of chunks')
    for chunk in chunks:
        held = vars(chunk) if isinstance(chunk, ChunkStorageMetadata) else {}
        offsets, sizes = held.get('offsets'), held.get('sizes')
        if not (_is_shape(offsets, len(size)) and _is_shape(sizes, len(size))) or any(
            start + count > whole for start, count, whole in zip(offsets, sizes, size)
        ):
            raise RestrictedPickleError(
                f'{key!r:.80} of size {_short(tuple(size))} has a chunk of sizes {_short(sizes)} at '
                f'{_short(offsets)}'
            )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_shape(value: Any, rank: Optional[int] = None) -> bool:
    if not isinstance(value, (torch.Size, tuple, list)) or rank not in (None, len(value)):
        return False
    return all(_is_count(count) for count in value) and math.prod(value) < 2**62


# ---------------------------------------------------------------------------------------------
# Objects
# ---------------------------------------------------------------------------------------------


def load_saved(stream: BinaryIO, what: str, map_location: Any = None) -> Any:
    """What torch.save wrote, made of tensors, plain values and Megatron's own safe classes.

    Args:
        stream: at its beginning.
        what: is read, for messages.
        map_location: see torch.load.
    Raises:
        RestrictedPickleError: it is damaged, or holds another class or function.
    """
    _register_safe_globals()
    try:
        return torch.load(stream, map_location=map_location, weights_only=True)
    except Exception as error:  # zip, pickle and PyTorch's own
        text = str(error)
        found = _unsupported_global(text)
        reason = _short(text.rsplit('WeightsUnpickler error:', 1)[-1])
        if found:
            reason = f'it asks for {found}, which is not allowed'
        raise RestrictedPickleError(f'{what} cannot be read: {reason}. {_ALTERED}') from error


def _unsupported_global(text: str) -> str:
    """The class or function in PyTorch's several lines on a pickle that it does not load."""
    found = re.search(r'(?:GLOBAL|class|function) ((?:\w+\.)+\w+)', text)
    return found[1][:120] if found else ''


_registered = False


def _register_safe_globals() -> None:
    """On first use: megatron.core.safe_globals imports what imports this module."""
    global _registered
    if _registered:
        return
    try:
        from megatron.core.safe_globals import SAFE_GLOBALS
    except ImportError:  # before Megatron-Core 0.16
        from argparse import Namespace
        from types import SimpleNamespace

        SAFE_GLOBALS = [Namespace, SimpleNamespace, io.BytesIO]
    torch.serialization.add_safe_globals([*SAFE_GLOBALS, *_optimizer_classes()])
    _registered = True


def _optimizer_classes() -> list:
    """The classes that HybridDeviceOptimizer (--optimizer-cpu-offload) keeps in its param_groups.

    Nothing uses those of a checkpoint. For the ones of TransformerEngine and Apex, which may be
    missing where it is read, PyTorch's stand in.
    """
    adam, sgd = torch.optim.AdamW, torch.optim.SGD
    packages = ('transformer_engine.pytorch.optimizers', 'apex.optimizers')
    return [torch.optim.Adam, adam, sgd] + [
        (stand_in, f'{package}.fused_{name.lower()}.Fused{name}')
        for package in packages
        for name, stand_in in (('Adam', adam), ('SGD', sgd))
    ]


# ---------------------------------------------------------------------------------------------
# PyTorch's readers
# ---------------------------------------------------------------------------------------------


def restrict_readers() -> None:
    """Let every FileSystemReader and DefaultLoadPlanner of this process read as above."""
    FileSystemReader.read_metadata = _read_metadata
    DefaultLoadPlanner.load_bytes = _load_bytes


def _read_metadata(self, *args, **kwargs) -> Metadata:
    """For `FileSystemReader`: the metadata of the directory, or of one rank."""
    rank = kwargs.get('rank')
    name = METADATA_NAME if rank is None else f'__{rank}{METADATA_NAME}'
    path = self.fs.concat_path(self.path, name)
    with self.fs.create_stream(path, 'rb') as stream:
        metadata = metadata_of(stream.read(), str(path))
    if not isinstance(getattr(metadata, 'storage_meta', None), StorageMeta):
        metadata.storage_meta = StorageMeta()
    metadata.storage_meta.load_id = self.load_id
    return metadata


def _load_bytes(self, read_item, value: io.BytesIO) -> None:
    """For `DefaultLoadPlanner`: put an object where the state dict has it."""
    key = read_item.dest_index.fqn
    loaded = load_saved(value, f"'{key}' of the checkpoint")
    if self.flatten_state_dict:
        from torch.distributed.checkpoint._traverse import set_element

        set_element(self.original_state_dict, self.mappings[key], loaded)
    else:
        self.state_dict[key] = loaded


def _short(value: Any) -> str:
    if isinstance(value, BaseException):
        text = ' '.join(str(value).split()) or type(value).__name__
    elif isinstance(value, str) and '\n' in value:
        text = ' '.join(value.split())
    elif type(value) in (int, str, float, bool, type(None), tuple, torch.dtype):
        text = repr(value) if type(value) is not int or abs(value) < 2**128 else 'a huge number'
    else:
        text = f'a {type(value).__name__}'
    return text if len(text) <= 100 else text[:97] + '...'


restrict_readers()
