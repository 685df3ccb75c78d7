# Copyright (c) 2026, the megatron-core gptoss authors.

"""Read parts of tensors from a Megatron torch_dist checkpoint without a process group."""

import dataclasses
import io
import math
import os
import re
import threading
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron.core.dist_checkpointing.block_hashes import CheckedFileSystemReader
from megatron.core.dist_checkpointing.checkpoint_names import RELEASE, TRACKER, iteration_name
from megatron.core.dist_checkpointing.restricted_pickle import (
    RestrictedPickleError,
    load_saved,
)
from megatron.gpt_oss.checkpoint.torch_dist.byte_ranges import (
    element_offset,
    is_contiguous,
    read_bytes,
)
from megatron.gpt_oss.checkpoint.torch_dist.torch_zip import find_tensor
from megatron.gpt_oss.errors import CheckpointError
from megatron.gpt_oss.json_file import brief

# Directory of a converted checkpoint with the other files of its Hugging Face source.
AUXILIARY_NAME = "hf"
# Megatron saves objects that are not tensors in this file, or in this entry of the checkpoint.
COMMON_NAME = "common.pt"
_COMMON_KEY = "common_state/shard_0_1"


def find_iteration(directory: str | Path) -> Path:
    """Find the directory of one iteration: `directory` itself, or the latest of a --save directory.

    Raises:
        CheckpointError: there is no torch_dist checkpoint, or it is incomplete.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(
            f"No directory {directory}. Give a --save directory or one of its iter_*."
        )
    tracker = directory / TRACKER
    if tracker.is_file():
        directory = directory / _named_by(tracker)
    if not (directory / ".metadata").is_file():
        raise CheckpointError(
            f"{directory} is not a complete torch_dist checkpoint: it has no .metadata. Give a "
            "--save directory (--ckpt-format torch_dist) or one of its iter_*."
        )
    from megatron.training.checkpoint_integrity import find_problem

    if problem := find_problem(str(directory)):
        raise CheckpointError(f"{problem} Give another iteration, or a complete copy.")
    return directory


def _named_by(tracker: Path) -> str:
    """The directory that latest_checkpointed_iteration.txt names."""
    try:
        with open(tracker, "rb") as stream:
            word = stream.read(100).strip()
    except OSError as error:
        raise CheckpointError(f"{tracker} cannot be read: {error.strerror}.") from error
    if word == RELEASE.encode():
        return RELEASE
    if not re.fullmatch(rb"[0-9]{1,18}", word):
        raise CheckpointError(
            f"{tracker} holds {brief(word)}; expected the number of an iteration, or 'release'. "
            "Write it there, or give one of the iter_* directories."
        )
    return iteration_name(int(word))


class TorchDistReader:
    """A `mapping.MegatronSource` that reads a checkpoint from disk. It is thread-safe.

    Args:
        directory: of one iteration, see `find_iteration`.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        try:
            self._storage = CheckedFileSystemReader(self.directory)
            self._metadata = self._storage.read_metadata()
        except RestrictedPickleError as error:
            raise CheckpointError(str(error)) from error
        except OSError as error:
            raise CheckpointError(f"{self.directory}/.metadata: {error.strerror}.") from error
        # dcp.load would read the metadata for every tensor.
        self._storage.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._files = _Files()
        self._check_files()
        self._arguments: dict | None = None
        self._chunks_by_layer: dict[str, dict[int, list[ChunkStorageMetadata]]] = {}
        # Optimizer tensors have their own key prefix and are never read.
        self._tensors = {
            key: value
            for key, value in self._metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }
        self._num_layers = len(
            {m[1] for key in self._tensors if (m := re.match(r"decoder\.layers\.(\d+)\.", key))}
        )

    def _check_files(self) -> None:
        """Reject missing files, and files shorter than the metadata says."""
        needed: dict[str, int] = {}
        for place in (self._metadata.storage_data or {}).values():
            end = place.offset + place.length
            needed[place.relative_path] = max(end, needed.get(place.relative_path, 0))
        for name, size in sorted(needed.items()):
            try:
                held = os.path.getsize(self.directory / name)
            except OSError as error:
                raise CheckpointError(f"{self.directory / name}: {error.strerror}.") from error
            if held < size:
                raise CheckpointError(
                    f"{self.directory / name} has {held} bytes, expected {size} from .metadata. "
                    "The checkpoint is damaged or truncated; use an older iteration."
                )

    def shape(self, key: str) -> tuple[int, ...]:
        """Global shape of a tensor, without the layer axis for 'decoder.layers.' keys."""
        stacked = "decoder.layers." + key
        if stacked in self._tensors:
            return tuple(self._tensors[stacked].size)[1:]
        single = f"decoder.layers.0.{key}"
        return tuple(self._tensors[self._require(single if single in self._tensors else key)].size)

    def num_layers(self) -> int:
        """Number of decoder layers."""
        if self._num_layers:  # one key per layer
            return self._num_layers
        return self._tensors[self._require("decoder.layers.self_attention.linear_qkv.weight")].size[
            0
        ]

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shapes of all tensors, including the optimizer's."""
        return {key: tuple(tensor.size) for key, tensor in self._tensors.items()}

    def dtypes(self) -> set[torch.dtype]:
        """Dtypes of the model's tensors."""
        return {
            tensor.properties.dtype
            for key, tensor in self._tensors.items()
            if key.startswith(("decoder.", "embedding.", "output_layer."))
        }

    def arguments(self) -> dict:
        """The arguments of the run that wrote the checkpoint; empty if it has none."""
        if self._arguments is None:
            state = self._common_state()
            args = state.get("args") if isinstance(state, dict) else None
            self._arguments = dict(vars(args)) if isinstance(args, Namespace) else {}
        return self._arguments

    def _common_state(self) -> dict:
        """The common state that Megatron saves with the tensors; no code of the file runs."""
        try:
            path = self.directory / COMMON_NAME
            if path.is_file():  # before Megatron-Core 0.17
                with open(path, "rb") as stream:
                    return load_saved(stream, str(path), "cpu")
            if _COMMON_KEY not in self._metadata.state_dict_metadata:
                return {}
            found = {_COMMON_KEY: io.BytesIO()}
            dcp.load(found, storage_reader=type(self._storage)(self.directory), no_dist=True)
            value = found[_COMMON_KEY]
            while isinstance(value, io.BytesIO):
                value.seek(0)
                value = load_saved(value, f"'{_COMMON_KEY}' in {self.directory}", "cpu")
            return value[0] if isinstance(value, list) and value else {}
        except RestrictedPickleError as error:
            raise CheckpointError(str(error)) from error
        except (CheckpointException, Exception) as error:  # CheckpointException is not an Exception
            failures = getattr(error, "failures", {})
            cause = next((failure for failure, _ in failures.values()), error)
            if isinstance(cause, RestrictedPickleError):
                raise CheckpointError(str(cause)) from error
            raise CheckpointError(
                f"{self.directory}: its run arguments cannot be read "
                f"({_first_line(cause)}). The checkpoint is damaged or truncated; use an older "
                "iteration."
            ) from error

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of a tensor outside the layers."""
        return self._tensors[self._require(key)].properties.dtype

    def global_tensor(self, key: str, rows: slice = slice(None)) -> torch.Tensor:
        """A tensor outside the layers, or a range of its rows."""
        size = list(self._tensors[self._require(key)].size)
        start, stop, _ = rows.indices(size[0])
        size[0] = stop - start
        return self._read(key, (start, *(0,) * (len(size) - 1)), tuple(size))

    def layer(self, keys: tuple[str, ...], layer: int, expert: int | None = None) -> torch.Tensor:
        """One layer (and expert) of a tensor, under the first of `keys` that exists."""
        for key in keys:
            stacked, single = f"decoder.layers.{key}", f"decoder.layers.{layer}.{key}"
            if stacked in self._tensors:
                leading, key = [layer], stacked
            elif single in self._tensors:
                leading, key = [], single
            else:
                continue
            leading += [expert] if expert is not None else []
            size = tuple(self._tensors[key].size)[len(leading) :]
            start = (*leading, *(0,) * len(size))
            return self._read(key, start, (1,) * len(leading) + size).reshape(size)
        raise CheckpointError(self._missing_message(f"decoder.layers.{keys[0]}"))

    def _read(self, key: str, start: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        tensor = self._metadata_of_layer(key, start[0])
        planner = _PartPlanner(self.directory, key, start, size, tensor)
        try:
            if self._read_contiguous(key, tensor, start, planner.part):
                return planner.part
            self._storage.read_data(planner.create_local_plan(), planner).wait()
        except CheckpointError:
            raise
        except Exception as error:  # torch.load and zipfile raise errors of many types
            raise CheckpointError(
                f"{self.directory}: tensor '{key}' cannot be read ({_first_line(error)}). The "
                "checkpoint is damaged or truncated; use an older iteration."
            ) from error
        return planner.part

    def _read_contiguous(
        self, key: str, tensor: TensorStorageMetadata, start: tuple[int, ...], out: torch.Tensor
    ) -> bool:
        """Read into `out` if each overlap is contiguous in file and `out`; else return False."""
        filled = 0
        for chunk in tensor.chunks:
            box = [
                (max(first, at), min(first + size, at + held))
                for first, size, at, held in zip(start, out.shape, chunk.offsets, chunk.sizes)
            ]
            if any(stop <= first for first, stop in box):
                continue
            here = [(first - at, stop - at) for (first, stop), at in zip(box, start)]
            there = [(first - at, stop - at) for (first, stop), at in zip(box, chunk.offsets)]
            if not (is_contiguous(here, out.shape) and is_contiguous(there, chunk.sizes)):
                return False
            place = self._storage.storage_data.get(MetadataIndex(key, chunk.offsets))
            if place is None or place.transform_descriptors:
                return False
            path = self.directory / place.relative_path
            fd = self._files.open(path)
            first = find_tensor(fd, place.offset, place.length, out.dtype, tuple(chunk.sizes))
            if first is None:
                return False
            part = out[tuple(slice(*bounds) for bounds in here)]
            first += element_offset(there, chunk.sizes) * out.itemsize
            self._storage.hashes.check(place.relative_path, first, part.nbytes)
            read_bytes(fd, path, first, part)
            filled += part.numel()
        return filled == out.numel()

    def _metadata_of_layer(self, key: str, layer: int) -> TensorStorageMetadata:
        """The metadata of a tensor with only the chunks of one layer.

        The experts of 120b have 9216 chunks per tensor; searching all of them for each would be
        quadratic.
        """
        tensor = self._tensors[key]
        if not re.match(r"decoder\.layers\.\D", key):
            return tensor
        if key not in self._chunks_by_layer:
            table: dict[int, list[ChunkStorageMetadata]] = {}
            for chunk in tensor.chunks:
                for held in range(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]):
                    table.setdefault(held, []).append(chunk)
            self._chunks_by_layer[key] = table  # one assignment, because other threads read it
        return dataclasses.replace(tensor, chunks=self._chunks_by_layer[key].get(layer, []))

    def _require(self, key: str) -> str:
        if key not in self._tensors:
            raise CheckpointError(self._missing_message(key))
        return key

    def _missing_message(self, key: str) -> str:
        return (
            f"{self.directory} has no tensor '{key}' among {len(self._tensors)}. Is it a "
            "checkpoint of a gpt-oss model?"
        )


class _Files:
    """Descriptors of the files that are read, open until the reader is deleted."""

    def __init__(self):
        self._fds: dict[Path, int] = {}
        self._lock = threading.Lock()

    def open(self, path: Path) -> int:
        """The descriptor of a file; -1 if it cannot be opened."""
        with self._lock:
            if path not in self._fds:
                try:
                    self._fds[path] = os.open(path, os.O_RDONLY)
                except OSError:
                    return -1
            return self._fds[path]

    def __del__(self):
        for fd in self._fds.values():
            os.close(fd)


class _PartPlanner(DefaultLoadPlanner):
    """Reads a box of one tensor from the chunks that overlap it."""

    def __init__(
        self, directory: Path, key: str, start: tuple, size: tuple, metadata: TensorStorageMetadata
    ):
        super().__init__()
        box = ChunkStorageMetadata(torch.Size(start), torch.Size(size))
        self._items = create_read_items_for_chunk_list(key, metadata, [box])
        covered, wanted = sum(item.lengths.numel() for item in self._items), math.prod(size)
        if covered != wanted:  # before memory is allocated
            raise CheckpointError(
                f"{directory}: tensor '{key}' holds {covered} of {wanted} expected elements. The "
                "checkpoint is damaged; use an older iteration."
            )
        self.part = torch.empty(size, dtype=metadata.properties.dtype)

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan(self._items)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.part

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        tensor = self.part
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths)):
            tensor = tensor.narrow(dim, start, length)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
