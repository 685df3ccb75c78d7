# Copyright (c) 2026, the megatron-core gptoss authors.

"""Convert a Hugging Face gpt-oss directory to a Megatron checkpoint (torch_dist), shard by shard.

One process without process group and model reads a shard, converts it to Megatron's layout and
writes it with PyTorch's checkpoint writer. The result is a `release` checkpoint, which has weights
but no optimizer state and no iteration. --load accepts it at any parallel layout.
"""

import argparse
import importlib
import io
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Callable, Iterator

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from megatron.core.dist_checkpointing.block_hashes import SUFFIX, HashingFileSystem
from megatron.core.dist_checkpointing.checkpoint_names import MANIFEST, RELEASE, TRACKER
from megatron.gpt_oss.checkpoint.hf.auxiliary_files import (
    auxiliary_files,
    check_tokenizer,
    copy_auxiliary_files,
)
from megatron.gpt_oss.checkpoint.hf.check import open_hf
from megatron.gpt_oss.checkpoint.hf.config import CONFIG_NAME
from megatron.gpt_oss.checkpoint.hf.reader import INDEX_NAME
from megatron.gpt_oss.checkpoint.mapping import as_contiguous, hf_to_megatron, locate
from megatron.gpt_oss.checkpoint.read_ahead import read_ahead
from megatron.gpt_oss.checkpoint.resumable_output import (
    TO_MEGATRON,
    ResumableOutput,
    fingerprint,
    open_output,
)
from megatron.gpt_oss.checkpoint.torch_dist.layout import (
    CheckpointFile,
    ParallelSizes,
    Part,
    checkpoint_files,
)
from megatron.gpt_oss.checkpoint.torch_dist.reader import AUXILIARY_NAME
from megatron.gpt_oss.presets import preset_flags
from megatron.gpt_oss.progress import advance, progress_bar

_COMMON_STATE = "common_state/shard_0_1"
_COMMON_PREFIX = "__0_common_"


def convert_to_megatron(
    hf: str | Path, out: str | Path, layout: ParallelSizes = ParallelSizes(), progress: bool = False
) -> Path:
    """Convert a Hugging Face directory to a Megatron checkpoint.

    Args:
        hf: BF16 or MXFP4 model.
        out: output directory, for --load; must be empty or not exist.
        layout: of the shards and files. Any other layout can load them.
        progress: show a bar on stderr.
    Returns:
        The output directory.
    Raises:
        UsageError: the source is incomplete or of another model, the layout does not fit the model,
            `out` is not empty, or the disk has not enough space.
    """
    return Job(Path(hf), layout).run(Path(out), progress)


class Job:
    """A conversion whose source and layout are checked. See `convert_to_megatron`.

    Raises:
        UsageError: the source is incomplete or of another model, or the layout does not fit it.
    """

    def __init__(self, hf: Path, layout: ParallelSizes = ParallelSizes()):
        self.hf, self.layout = hf, layout
        self.reader, self.preset = open_hf(hf)
        self.reader.check_scales()
        check_tokenizer(hf)
        # fp32 holds the values of every other dtype, MXFP4 included.
        self.dtype = torch.float32 if "F32" in self.reader.dtypes() else torch.bfloat16
        self.files = list(checkpoint_files(self.preset, layout))

    def run(self, out: Path, progress: bool = False) -> Path:
        """Write the checkpoint, see `convert_to_megatron`."""
        with open_output(
            out,
            self.task(),
            self.bytes_total(),
            names=self.names(),
            made_by=TO_MEGATRON,
            inputs=[self.hf],
        ) as work:
            if work.complete:
                return out
            (work.directory / RELEASE).mkdir(exist_ok=True)
            megatron = _import_megatron()
            with _without_checksums():
                results = self.write_files(work, progress)
            work.wait()
            dist_checkpointing, checkpoint_integrity = megatron.result()
            self.write_metadata(work.directory / RELEASE, results)
            config = dist_checkpointing.CheckpointingConfig("torch_dist", 1)
            dist_checkpointing.save_config(config, str(work.directory / RELEASE))
            self.copy_auxiliary_files(work.directory / AUXILIARY_NAME)
            checkpoint_integrity.finish_save(str(work.directory / RELEASE))
            checkpoint_integrity.write_tracker(str(work.directory / TRACKER), RELEASE)
        return out

    def copy_auxiliary_files(self, target: Path) -> None:
        """Copy the tokenizer, templates, config.json and the index of the source."""
        copy_auxiliary_files(self.hf, target)
        for name in (CONFIG_NAME, INDEX_NAME):
            if (self.hf / name).is_file():
                shutil.copyfile(self.hf / name, target / name)

    def names(self) -> set[str]:
        """Paths of the output files, relative to the output directory."""
        release = [".metadata", "metadata.json", MANIFEST]
        auxiliary = {path.name for path in auxiliary_files(self.hf)} | {CONFIG_NAME, INDEX_NAME}
        shards = [*map(_name, self.files), f"{RELEASE}/{_COMMON_PREFIX}0.distcp"]
        return {
            *shards,
            *(shard + SUFFIX for shard in shards),
            *(f"{RELEASE}/{name}" for name in release),
            *(f"{AUXILIARY_NAME}/{name}" for name in auxiliary),
            TRACKER,
        }

    def bytes_total(self) -> int:
        """Bytes of all output tensors."""
        return sum(self._bytes(part) for file in self.files for part in file.parts)

    def task(self) -> dict:
        """All that determines the output; a run with another value cannot resume this one."""
        source = [self.hf / name for name in (*self.reader.files(), CONFIG_NAME)]
        return {
            "direction": "to Megatron",
            "source": fingerprint(source),
            "layout": asdict(self.layout),
        }

    def write_files(self, work: ResumableOutput, progress: bool) -> list[WriteResult]:
        """Write the files that are missing; return the place of every tensor in all files."""
        remaining = [file for file in self.files if _name(file) not in work.done]
        parts = [part for file in remaining for part in file.parts]
        done = self.bytes_total() - sum(map(self._bytes, parts))
        # `work` syncs the files to disk while the next one is read.
        writer = dcp.FileSystemWriter(
            work.directory / RELEASE,
            thread_count=1,
            per_thread_copy_ahead=0,
            overwrite=True,
            sync_files=False,
        )
        writer.fs = HashingFileSystem()
        tensors = read_ahead(self.read, parts)
        results = [
            _from_json(place)
            for file in self.files
            if file not in remaining
            for place in work.done[_name(file)]["places"]
        ]
        with progress_bar(self.bytes_total(), enabled=progress, initial=done) as bar:
            for file in remaining:

                def written(count: int, name: str = _name(file)) -> None:
                    work.written(name, count)
                    advance(bar, count, name)

                planner = _LazyPlanner(file, self.dtype, tensors, written)
                plan = SavePlan(planner.items(), storage_data=_StoragePrefix(file.prefix))
                places = writer.write_data(plan, planner).wait()
                work.finish(_name(file), {"places": [_to_json(place) for place in places]})
                results += places
        return results

    def write_metadata(self, directory: Path, results: list[WriteResult]) -> None:
        """Write .metadata (places of all shards) and the common state (arguments)."""
        writer = dcp.FileSystemWriter(directory, thread_count=1, overwrite=True)
        writer.fs = HashingFileSystem()
        common = WriteItem(MetadataIndex(_COMMON_STATE), WriteItemType.BYTE_IO)
        plan = SavePlan([common], storage_data=_StoragePrefix(_COMMON_PREFIX))
        planner = _BytesPlanner({_COMMON_STATE: _saved([self._common_state()])})
        results = results + writer.write_data(plan, planner).wait()
        tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        for part in (part for file in self.files for part in file.parts):
            size = torch.Size(part.global_shape)
            tensor = TensorStorageMetadata(TensorProperties(self.dtype), size, [])
            tensors.setdefault(part.key, tensor).chunks.append(_chunk(part))
        for key in (key for file in self.files for key in file.objects):
            tensors[key] = BytesStorageMetadata()
        tensors[_COMMON_STATE] = BytesStorageMetadata()
        writer.finish(Metadata(tensors), [results])

    def read(self, part: Part) -> torch.Tensor:
        """Read one shard and convert it to Megatron's layout."""
        where = locate(part.key, part.offset, part.shape)
        value = hf_to_megatron(where, self.preset, self.reader.read)
        return as_contiguous(value, self.dtype).view(part.sizes)

    def _bytes(self, part: Part) -> int:
        return torch.Size(part.shape).numel() * self.dtype.itemsize

    def _common_state(self) -> dict:
        """The common state of a checkpoint, with the model's arguments as a run saves them."""
        args = argparse.Namespace(
            **preset_flags(self.preset),
            add_position_embedding=True,
            tokenizer_vocab_size=self.preset.vocab_size,  # no padding
            tensor_model_parallel_size=self.layout.tp,
            pipeline_model_parallel_size=self.layout.pp,
            expert_model_parallel_size=self.layout.ep,
            expert_tensor_parallel_size=self.layout.expert_tp,
            context_parallel_size=1,
            no_save_optim=True,
            no_save_rng=True,
            consumed_train_samples=0,
            consumed_valid_samples=0,
        )
        return {
            "args": args,
            "checkpoint_version": 3.0,
            "iteration": 0,
            "content_metadata": {
                "singleton_local_shards": False,
                "chained_optim_avoid_prefix": True,
            },
        }


class _LazyPlanner(dcp.DefaultSavePlanner):
    """Reads each tensor when the writer asks for it.

    Args:
        file: the file to write.
        dtype: of its tensors.
        tensors: the tensors, in the order of the file.
        written: called with the size of each tensor in bytes.
    """

    def __init__(
        self,
        file: CheckpointFile,
        dtype: torch.dtype,
        tensors: Iterator[torch.Tensor],
        written: Callable[[int], None],
    ):
        super().__init__()
        self._file, self._dtype, self._tensors, self._written = file, dtype, tensors, written
        self._parts = {MetadataIndex(p.key, torch.Size(p.offset)): p for p in file.parts}
        self._order = iter(self._parts)

    def items(self) -> list[WriteItem]:
        """The items of the save plan."""
        items = []
        for index, part in self._parts.items():
            size = torch.Size(part.global_shape)
            data = TensorWriteData(_chunk(part), TensorProperties(self._dtype), size)
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        for key in self._file.objects:
            items.append(WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO))
        return items

    def resolve_data(self, write_item: WriteItem):
        """See `SavePlanner`."""
        if write_item.type == WriteItemType.BYTE_IO:
            return _saved([None])
        tensor = next(self._tensors)
        assert write_item.index == next(self._order), "the writer uses another order"
        self._written(tensor.nbytes)
        return tensor


class _BytesPlanner(dcp.DefaultSavePlanner):
    """Writes objects that are serialized already."""

    def __init__(self, objects: dict[str, io.BytesIO]):
        super().__init__()
        self._objects = objects

    def resolve_data(self, write_item: WriteItem) -> io.BytesIO:
        """See `SavePlanner`."""
        return self._objects[write_item.index.fqn]


@contextmanager
def _without_checksums() -> Iterator[None]:
    """Save without CRC32, which torch.load does not check: 2.4 GB/s instead of 0.55 GB/s."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _import_megatron() -> Future:
    """Import the modules that finish a checkpoint, which takes two seconds, in the background."""

    def load() -> tuple:
        names = ("core.dist_checkpointing.core", "training.checkpoint_integrity")
        return tuple(importlib.import_module(f"megatron.{name}") for name in names)

    threads = ThreadPoolExecutor(1, thread_name_prefix="import")
    future = threads.submit(load)
    threads.shutdown(wait=False)
    return future


def _name(file: CheckpointFile) -> str:
    """Path of a file, relative to the output directory; the writer appends 0.distcp."""
    return f"{RELEASE}/{file.prefix}0.distcp"


def _chunk(part: Part) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(part.offset), torch.Size(part.sizes))


def _saved(value) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream


def _to_json(result: WriteResult) -> list:
    offset = result.index.offset
    place = result.storage_data
    return [
        result.index.fqn,
        None if offset is None else list(offset),
        place.relative_path,
        place.offset,
        place.length,
    ]


def _from_json(place: list) -> WriteResult:
    fqn, offset, path, start, length = place
    index = MetadataIndex(fqn, None if offset is None else torch.Size(offset))
    return WriteResult(index, length, _StorageInfo(path, start, length))
