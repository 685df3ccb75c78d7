# Copyright (c) 2026, the megatron-core gptoss authors.

"""Read the pickles of a checkpoint without running code from them.

PyTorch's `FileSystemReader` unpickles `.metadata`, and `DefaultLoadPlanner` the objects of a
checkpoint, with every class and function that the file names: a checkpoint from an untrusted source
can run code. This module allows only the classes of metadata, loads objects with weights_only=True,
and validates the result.

`restrict_readers` applies this to PyTorch's classes, from which all readers of Megatron derive;
importing `megatron.core.dist_checkpointing` calls it.
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

METADATA_NAME = ".metadata"
_HINT = "The file is damaged, or Megatron did not write it; use another checkpoint."

_OWN_CLASSES = "megatron.core.dist_checkpointing.strategies.torch"
_METADATA_CLASSES = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    # Megatron stores the save plan of each rank, to reuse it for the next save.
    "torch.distributed.checkpoint.planner": (
        "SavePlan",
        "WriteItem",
        "WriteItemType",
        "TensorWriteData",
        "BytesIOWriteData",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    # Megatron-Core up to 0.15 saved these instead; later releases keep the names to read them.
    _OWN_CLASSES: ("MCoreMetadata", "MCoreSavePlan"),
    # Before PyTorch 2.3.
    "torch.distributed._shard.sharded_tensor.metadata": ("TensorProperties", "MEM_FORMAT_ENCODING"),
    "collections": ("OrderedDict",),
    # The path of the checkpoint when it was written.
    "pathlib": ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"),
    "pathlib._local": ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"),
}
_METADATA_NAMES = frozenset(
    (module, name) for module, names in _METADATA_CLASSES.items() for name in names
)


class RestrictedPickleError(pickle.UnpicklingError, ValueError):
    """A pickle is damaged, or names a class that is not allowed; the message is one sentence."""


def find_metadata_class(module: str, name: str) -> Any:
    """The class or dtype for a name in `.metadata`.

    Raises:
        RestrictedPickleError: metadata does not need this name.
    """
    if (module, name) in _METADATA_NAMES:
        return pickle.Unpickler(io.BytesIO()).find_class(module, name)
    if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
        return getattr(torch, name)
    raise RestrictedPickleError(f"it asks for {module}.{name}"[:120] + ", which is not allowed")


def load_restricted(
    data: bytes,
    find_class: Callable[[str, str], Any] = find_metadata_class,
    persistent_load: Optional[Callable[[Any], Any]] = None,
) -> Any:
    """Unpickle an object; only what `find_class` allows is imported or called.

    Args:
        data: the pickle, of protocol 2 or newer.
        find_class: as `pickle.Unpickler.find_class`, for every class and function; raises
            RestrictedPickleError for what is not allowed.
        persistent_load: as `pickle.Unpickler.persistent_load`; None rejects persistent ids.
    Raises:
        RestrictedPickleError: the pickle is damaged, or names something that is not allowed.
    """
    _check_opcodes(data, persistent_load is not None)
    unpickler = _Unpickler(data, find_class, persistent_load)
    try:
        return unpickler.load()
    except RestrictedPickleError:
        raise
    except Exception as error:  # a damaged pickle can raise any exception
        raise RestrictedPickleError(f"it cannot be unpickled ({_short(error)})") from error
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
        """Restore class attributes that the opcode BUILD set.

        Raises:
            RestrictedPickleError: the pickle set one.
        """
        for found, before in self._classes.items():
            now = dict(vars(found))
            changed = [k for k in {**before, **now} if before.get(k) is not now.get(k)]
            for name in changed:
                if name in before:
                    setattr(found, name, before[name])
                else:
                    delattr(found, name)
            if changed:
                raise RestrictedPickleError(f"it sets {found.__name__}.{changed[0]!s:.40}")

    def persistent_load(self, pid: Any) -> Any:
        """See `pickle.Unpickler`."""
        if self._persistent_load is None:
            raise RestrictedPickleError("it refers to objects outside itself")
        return self._persistent_load(pid)


# Opcodes of protocols 0 and 1 that newer protocols do not write, those of the extension registry
# and of out-of-band buffers.
_REFUSED_OPCODES = frozenset(
    "INT LONG STRING UNICODE FLOAT PUT GET INST OBJ DUP PERSID EXT1 EXT2 EXT4 NEXT_BUFFER "
    "READONLY_BUFFER BYTEARRAY8".split()
)
_LENGTH_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}


def _argument_sizes() -> list:
    """Argument size of each opcode in bytes; -n: n bytes hold the length; None: not allowed."""
    sizes: list = [None] * 256
    for opcode in pickletools.opcodes:
        if opcode.name in _REFUSED_OPCODES:
            continue
        size = 0 if opcode.arg is None else opcode.arg.n
        sizes[ord(opcode.code)] = -_LENGTH_BYTES[size] if size in _LENGTH_BYTES else size
    return sizes


_ARGUMENT_SIZES = _argument_sizes()
_GLOBAL, _BINPERSID, _PROTO, _STOP, _LONG_BINPUT = b"cQ\x80.r"


def _check_opcodes(data: bytes, persistent: bool) -> None:
    """Parse all opcodes of a pickle without creating objects.

    The unpickler does not check two numbers: an index of the memo, for which it allocates 16 times
    as many bytes at once, and the length of an argument.
    """
    if data[:1] != b"\x80" or not data.endswith(b"."):
        raise RestrictedPickleError("it does not begin and end as a pickle does")
    position, count, end = 0, 0, len(data)
    sizes = _ARGUMENT_SIZES
    while position < end:
        opcode = data[position]
        size = sizes[opcode]
        position += 1
        count += 1
        if size is None or (opcode == _BINPERSID and not persistent):
            raise RestrictedPickleError(f"it has the unknown opcode {opcode} at {position - 1}")
        if size > 0:
            if opcode == _LONG_BINPUT:
                if int.from_bytes(data[position : position + 4], "little") > count:
                    raise RestrictedPickleError(f"its memo is damaged at {position - 1}")
            position += size
        elif size < 0 and opcode != _GLOBAL:
            length = int.from_bytes(data[position : position - size], "little")
            position += length - size
        elif opcode == _GLOBAL:
            for _ in range(2):
                position = data.find(b"\n", position, position + 256) + 1
                if position == 0:
                    raise RestrictedPickleError("it has an unterminated name")
        elif opcode == _STOP:
            break
    if position != end:
        raise RestrictedPickleError("it is truncated, or has trailing bytes")


def metadata_of(data: bytes, path: str) -> Metadata:
    """The metadata of a torch_dist checkpoint, from the bytes of its `.metadata`.

    Args:
        data: content of the file.
        path: path of the file, for messages.
    Raises:
        RestrictedPickleError: names the file, the field and what is wrong with it.
    """
    try:
        metadata = load_restricted(data)
        _check_metadata(metadata)
    except RestrictedPickleError as error:
        raise RestrictedPickleError(f"{path}: {error}. {_HINT}") from error
    return metadata


def read_metadata(directory) -> Metadata:
    """Read the metadata of a checkpoint directory; see `metadata_of`."""
    path = os.path.join(directory, METADATA_NAME)
    with open(path, "rb") as stream:
        return metadata_of(stream.read(), path)


def _check_metadata(metadata: Any) -> None:
    """Reject metadata whose fields have wrong types or paths outside of the directory."""
    tensors = getattr(metadata, "state_dict_metadata", None)
    if not _is_metadata(metadata) or not isinstance(tensors, dict):
        raise RestrictedPickleError("it holds no checkpoint metadata")
    for key, entry in tensors.items():
        if not isinstance(key, str):
            raise RestrictedPickleError(f"state_dict_metadata has the key {_short(key)}")
        if isinstance(entry, TensorStorageMetadata):
            _check_tensor(key, vars(entry))
        elif not isinstance(entry, BytesStorageMetadata):
            raise RestrictedPickleError(f"{key!r:.80} is a {type(entry).__name__}")
    _check_shapes_before_flattening(getattr(metadata, "mcore_data", None))
    places = getattr(metadata, "storage_data", None)
    if places is None:
        return
    if not isinstance(places, dict):
        raise RestrictedPickleError("storage_data is not a dict")
    for index, place in places.items():
        fields = getattr(place, "__dict__", {})
        if not isinstance(index, MetadataIndex) or not isinstance(vars(index).get("fqn"), str):
            raise RestrictedPickleError(f"storage_data has the key {_short(index)}")
        if not all(_is_count(fields.get(name)) for name in ("offset", "length")):
            raise RestrictedPickleError(
                f"{index.fqn!r:.80} lies at offset {_short(fields.get('offset'))} and has length "
                f"{_short(fields.get('length'))}, which are not byte counts"
            )
        _check_relative(index.fqn, fields.get("relative_path"))
        chunk = tensors.get(index.fqn)
        if isinstance(chunk, TensorStorageMetadata) and vars(index).get("offset") is not None:
            if not _is_shape(index.offset, len(chunk.size)):
                raise RestrictedPickleError(f"{index.fqn!r:.80} has a damaged offset")


def _is_metadata(value: Any) -> bool:
    kind = type(value)
    return kind is Metadata or (kind.__module__, kind.__name__) == (_OWN_CLASSES, "MCoreMetadata")


def _check_shapes_before_flattening(data: Any) -> None:
    """Check the shapes that Megatron-Core up to 0.15 stored for tensors that it saved flattened."""
    if data is None:
        return
    if not isinstance(data, dict):
        raise RestrictedPickleError(f"mcore_data is {_short(data)}")
    for key, entry in data.items():
        if not isinstance(entry, dict) or not all(map(_is_shape, entry.values())):
            raise RestrictedPickleError(f"mcore_data has {_short(entry)} for {key!r:.80}")


def _check_relative(key: str, path: Any) -> None:
    parts = path.split("/") if isinstance(path, str) else [".."]
    if os.path.isabs(str(path)) or ".." in parts or "\0" in path or not path:
        raise RestrictedPickleError(
            f"{key!r:.80} has relative_path = {_short(path)}, which is not in the directory"
        )


def _check_tensor(key: str, fields: dict) -> None:
    size, chunks = fields.get("size"), fields.get("chunks")
    dtype = getattr(fields.get("properties"), "dtype", None)
    if not _is_shape(size):
        raise RestrictedPickleError(f"{key!r:.80} has size = {_short(size)}")
    if not isinstance(dtype, torch.dtype):
        raise RestrictedPickleError(f"{key!r:.80} has dtype = {_short(dtype)}")
    if not isinstance(fields["properties"], TensorProperties) or not isinstance(chunks, list):
        raise RestrictedPickleError(f"{key!r:.80} has no list of chunks")
    for chunk in chunks:
        held = vars(chunk) if isinstance(chunk, ChunkStorageMetadata) else {}
        offsets, sizes = held.get("offsets"), held.get("sizes")
        if not (_is_shape(offsets, len(size)) and _is_shape(sizes, len(size))) or any(
            start + count > whole for start, count, whole in zip(offsets, sizes, size)
        ):
            raise RestrictedPickleError(
                f"{key!r:.80} of size {_short(tuple(size))} has a chunk of sizes {_short(sizes)} "
                f"at {_short(offsets)}"
            )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_shape(value: Any, rank: Optional[int] = None) -> bool:
    if not isinstance(value, (torch.Size, tuple, list)) or rank not in (None, len(value)):
        return False
    return all(_is_count(count) for count in value) and math.prod(value) < 2**62


def load_saved(stream: BinaryIO, what: str, map_location: Any = None) -> Any:
    """Load output of torch.save that holds tensors, plain values and Megatron's safe classes.

    Args:
        stream: positioned at the start of the output.
        what: names the object in messages.
        map_location: see torch.load.
    Raises:
        RestrictedPickleError: it is damaged, or names another class or function.
    """
    _register_safe_globals()
    try:
        return torch.load(stream, map_location=map_location, weights_only=True)
    except Exception as error:  # zip, pickle and PyTorch's own
        text = str(error)
        found = _unsupported_global(text)
        reason = _short(text.rsplit("WeightsUnpickler error:", 1)[-1])
        if found:
            reason = f"it asks for {found}, which is not allowed"
        raise RestrictedPickleError(f"{what} cannot be read: {reason}. {_HINT}") from error


def _unsupported_global(text: str) -> str:
    """The class or function that PyTorch's error message names; '' if none."""
    found = re.search(r"(?:GLOBAL|class|function) ((?:\w+\.)+\w+)", text)
    return found[1][:120] if found else ""


_registered = False


def _register_safe_globals() -> None:
    """Called on first use, because megatron.core.safe_globals imports this module indirectly."""
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

    Megatron does not use the ones from a checkpoint. Those of TransformerEngine and Apex, which may
    not be installed, are replaced with PyTorch's.
    """
    adam, sgd = torch.optim.AdamW, torch.optim.SGD
    packages = ("transformer_engine.pytorch.optimizers", "apex.optimizers")
    return [torch.optim.Adam, adam, sgd] + [
        (replacement, f"{package}.fused_{name.lower()}.Fused{name}")
        for package in packages
        for name, replacement in (("Adam", adam), ("SGD", sgd))
    ]


def restrict_readers() -> None:
    """Patch FileSystemReader and DefaultLoadPlanner of this process to read with this module."""
    FileSystemReader.read_metadata = _read_metadata
    DefaultLoadPlanner.load_bytes = _load_bytes


def _read_metadata(self, *args, **kwargs) -> Metadata:
    """Replaces `FileSystemReader.read_metadata`: metadata of the directory, or of one rank."""
    rank = kwargs.get("rank")
    name = METADATA_NAME if rank is None else f"__{rank}{METADATA_NAME}"
    path = self.fs.concat_path(self.path, name)
    with self.fs.create_stream(path, "rb") as stream:
        metadata = metadata_of(stream.read(), str(path))
    if not isinstance(getattr(metadata, "storage_meta", None), StorageMeta):
        metadata.storage_meta = StorageMeta()
    metadata.storage_meta.load_id = self.load_id
    return metadata


def _load_bytes(self, read_item, value: io.BytesIO) -> None:
    """Replaces `DefaultLoadPlanner.load_bytes`: load an object into the state dict."""
    key = read_item.dest_index.fqn
    loaded = load_saved(value, f"'{key}' of the checkpoint")
    if self.flatten_state_dict:
        from torch.distributed.checkpoint._traverse import set_element

        set_element(self.original_state_dict, self.mappings[key], loaded)
    else:
        self.state_dict[key] = loaded


def _short(value: Any) -> str:
    if isinstance(value, BaseException):
        text = " ".join(str(value).split()) or type(value).__name__
    elif isinstance(value, str) and "\n" in value:
        text = " ".join(value.split())
    elif type(value) in (int, str, float, bool, type(None), tuple, torch.dtype):
        text = repr(value) if type(value) is not int or abs(value) < 2**128 else "a huge number"
    else:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 100 else text[:97] + "..."


restrict_readers()
