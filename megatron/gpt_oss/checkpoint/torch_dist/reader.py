# Copyright (c) 2026, the megatron-core gptoss authors.

"""Parts of the model's tensors in a Megatron torch_dist checkpoint, without any process group."""

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
from megatron.gpt_oss.checkpoint.torch_dist.byte_ranges import is_one_run, read_run, run_offset
from megatron.gpt_oss.checkpoint.torch_dist.torch_zip import find_tensor
from megatron.gpt_oss.errors import CheckpointError
from megatron.gpt_oss.json_file import brief

# Folder of a converted checkpoint with what its Hugging Face source had beside the weights.
COMPANIONS_NAME = "hf"
# Where Megatron keeps what is no tensor: a file of its own, or an entry of the checkpoint.
COMMON_NAME = "common.pt"
_COMMON_KEY = "common_state/shard_0_1"


def find_iteration(folder: str | Path) -> Path:
    """The folder of one iteration: the one given, or the latest under a --save folder.

    Raises:
        CheckpointError: there is no torch_dist checkpoint.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"No directory {folder}. Give a --save directory or one of its iter_*."
        )
    tracker = folder / TRACKER
    if tracker.is_file():
        folder = folder / _named_by(tracker)
    if not (folder / ".metadata").is_file():
        raise CheckpointError(
            f"{folder} is not a complete torch_dist checkpoint: it has no .metadata. Give a "
            "--save directory (--ckpt-format torch_dist) or one of its iter_*."
        )
    from megatron.training.checkpoint_integrity import find_problem

    if problem := find_problem(str(folder)):
        raise CheckpointError(f"{problem} Give another iteration, or a complete copy.")
    return folder


def _named_by(tracker: Path) -> str:
    """The folder that latest_checkpointed_iteration.txt names."""
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
    """A `mapping.MegatronSource` over a checkpoint on disk; several threads may read.

    Args:
        folder: of one iteration, see `find_iteration`.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        try:
            self._storage = CheckedFileSystemReader(self.folder)
            self._metadata = self._storage.read_metadata()
        except RestrictedPickleError as error:
            raise CheckpointError(str(error)) from error
        except OSError as error:
            raise CheckpointError(f"{self.folder}/.metadata: {error.strerror}.") from error
        # Once: dcp.load would read the metadata again for every tensor.
        self._storage.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._files = _Files()
        self._check_files()
        self._arguments: dict | None = None
        self._pieces: dict[str, dict[int, list[ChunkStorageMetadata]]] = {}
        # Tensors of the optimizer carry a prefix of their own and are never asked for.
        self._tensors = {
            key: value
            for key, value in self._metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }
        self._num_layers = len(
            {m[1] for key in self._tensors if (m := re.match(r"decoder\.layers\.(\d+)\.", key))}
        )

    def _check_files(self) -> None:
        """Refuse a folder whose files are missing or end before what the metadata places there."""
        needed: dict[str, int] = {}
        for place in (self._metadata.storage_data or {}).values():
            end = place.offset + place.length
            needed[place.relative_path] = max(end, needed.get(place.relative_path, 0))
        for name, size in sorted(needed.items()):
            try:
                held = os.path.getsize(self.folder / name)
            except OSError as error:
                raise CheckpointError(f"{self.folder / name}: {error.strerror}.") from error
            if held < size:
                raise CheckpointError(
                    f"{self.folder / name} has {held} bytes, expected {size} from .metadata. The "
                    "checkpoint is damaged or truncated; use an older iteration."
                )

    def shape(self, key: str) -> tuple[int, ...]:
        """Global shape of a tensor, without the layers' axis for 'decoder.layers.' keys."""
        stacked = "decoder.layers." + key
        if stacked in self._tensors:
            return tuple(self._tensors[stacked].size)[1:]
        single = f"decoder.layers.0.{key}"
        return tuple(self._tensors[self._known(single if single in self._tensors else key)].size)

    def num_layers(self) -> int:
        """Number of decoder layers."""
        if self._num_layers:  # the layer is part of the key
            return self._num_layers
        return self._tensors[self._known("decoder.layers.self_attention.linear_qkv.weight")].size[0]

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shapes of all tensors, those of the optimizer included."""
        return {key: tuple(tensor.size) for key, tensor in self._tensors.items()}

    def dtypes(self) -> set[torch.dtype]:
        """Dtypes of the model's tensors."""
        return {
            tensor.properties.dtype
            for key, tensor in self._tensors.items()
            if key.startswith(("decoder.", "embedding.", "output_layer."))
        }

    def arguments(self) -> dict:
        """The arguments of the run that wrote the checkpoint; empty where it holds none."""
        if self._arguments is None:
            state = self._common_state()
            args = state.get("args") if isinstance(state, dict) else None
            self._arguments = dict(vars(args)) if isinstance(args, Namespace) else {}
        return self._arguments

    def _common_state(self) -> dict:
        """What Megatron keeps next to the tensors, read without running code of the file."""
        try:
            path = self.folder / COMMON_NAME
            if path.is_file():  # before Megatron-Core 0.17
                with open(path, "rb") as stream:
                    return load_saved(stream, str(path), "cpu")
            if _COMMON_KEY not in self._metadata.state_dict_metadata:
                return {}
            found = {_COMMON_KEY: io.BytesIO()}
            dcp.load(found, storage_reader=type(self._storage)(self.folder), no_dist=True)
            value = found[_COMMON_KEY]
            while isinstance(value, io.BytesIO):
                value.seek(0)
                value = load_saved(value, f"'{_COMMON_KEY}' in {self.folder}", "cpu")
            return value[0] if isinstance(value, list) and value else {}
        except RestrictedPickleError as error:
            raise CheckpointError(str(error)) from error
        except (CheckpointException, Exception) as error:  # the former is none of the latter
            failures = getattr(error, "failures", {})
            cause = next((failure for failure, _ in failures.values()), error)
            if isinstance(cause, RestrictedPickleError):
                raise CheckpointError(str(cause)) from error
            raise CheckpointError(
                f"{self.folder}: its run arguments cannot be read "
                f"({_first_line(cause)}). The checkpoint is damaged or truncated; use an older "
                "iteration."
            ) from error

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of a tensor without layers."""
        return self._tensors[self._known(key)].properties.dtype

    def whole(self, key: str, rows: slice = slice(None)) -> torch.Tensor:
        """A global tensor without layers, or a range of its rows."""
        size = list(self._tensors[self._known(key)].size)
        start, stop, _ = rows.indices(size[0])
        size[0] = stop - start
        return self._read(key, (start, *(0,) * (len(size) - 1)), tuple(size))

    def layer(self, keys: tuple[str, ...], layer: int, expert: int | None = None) -> torch.Tensor:
        """One layer of a tensor (of one expert), under the first of the keys that exists."""
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
        raise CheckpointError(self._missing(f"decoder.layers.{keys[0]}"))

    def _read(self, key: str, start: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        tensor = self._nearby(key, start[0])
        planner = _PartPlanner(self.folder, key, start, size, tensor)
        try:
            if self._read_runs(key, tensor, start, planner.part):
                return planner.part
            self._storage.read_data(planner.create_local_plan(), planner).wait()
        except CheckpointError:
            raise
        except Exception as error:  # torch.load, zipfile and what a damaged file makes of a tensor
            raise CheckpointError(
                f"{self.folder}: tensor '{key}' cannot be read ({_first_line(error)}). The "
                "checkpoint is damaged or truncated; use an older iteration."
            ) from error
        return planner.part

    def _read_runs(
        self, key: str, tensor: TensorStorageMetadata, start: tuple[int, ...], out: torch.Tensor
    ) -> bool:
        """Fill `out` where every piece of it is one run, in the file as in `out`; else False."""
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
            if not (is_one_run(here, out.shape) and is_one_run(there, chunk.sizes)):
                return False
            place = self._storage.storage_data.get(MetadataIndex(key, chunk.offsets))
            if place is None or place.transform_descriptors:
                return False
            path = self.folder / place.relative_path
            fd = self._files.open(path)
            first = find_tensor(fd, place.offset, place.length, out.dtype, tuple(chunk.sizes))
            if first is None:
                return False
            part = out[tuple(slice(*bounds) for bounds in here)]
            first += run_offset(there, chunk.sizes) * out.itemsize
            self._storage.hashes.check(place.relative_path, first, part.nbytes)
            read_run(fd, path, first, part)
            filled += part.numel()
        return filled == out.numel()

    def _nearby(self, key: str, layer: int) -> TensorStorageMetadata:
        """The tensor's metadata with those pieces alone that hold this layer.

        The experts of 120b are 9216 pieces, and finding one's own among all takes as many
        comparisons, 9216 times.
        """
        tensor = self._tensors[key]
        if not re.match(r"decoder\.layers\.\D", key):
            return tensor
        if key not in self._pieces:
            table: dict[int, list[ChunkStorageMetadata]] = {}
            for chunk in tensor.chunks:
                for held in range(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]):
                    table.setdefault(held, []).append(chunk)
            self._pieces[key] = table  # at once, as another thread may look
        return dataclasses.replace(tensor, chunks=self._pieces[key].get(layer, []))

    def _known(self, key: str) -> str:
        if key not in self._tensors:
            raise CheckpointError(self._missing(key))
        return key

    def _missing(self, key: str) -> str:
        return (
            f"{self.folder} has no tensor '{key}' among {len(self._tensors)}. Is it a checkpoint "
            "of a gpt-oss model?"
        )


class _Files:
    """Descriptors of the files that are being read, open until the reader goes."""

    def __init__(self):
        self._fds: dict[Path, int] = {}
        self._lock = threading.Lock()

    def open(self, path: Path) -> int:
        """The descriptor of a file; -1, of which nothing can be read, if there is none."""
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
    """Reads a box out of one tensor, whatever the pieces in which it was saved."""

    def __init__(
        self, folder: Path, key: str, start: tuple, size: tuple, metadata: TensorStorageMetadata
    ):
        super().__init__()
        box = ChunkStorageMetadata(torch.Size(start), torch.Size(size))
        self._items = create_read_items_for_chunk_list(key, metadata, [box])
        covered, wanted = sum(item.lengths.numel() for item in self._items), math.prod(size)
        if covered != wanted:  # before memory is taken for it
            raise CheckpointError(
                f"{folder}: tensor '{key}' holds {covered} of {wanted} expected elements. The "
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
