# Copyright (c) 2026, the megatron-core gptoss authors.

"""Write a Hugging Face gpt-oss folder as a Megatron checkpoint (torch_dist), piece by piece.

Needs no process group and no model: one process reads a piece, brings it into Megatron's layout and
writes it through PyTorch's own checkpoint writer. The result is a `release` checkpoint, Megatron's
form of weights without optimizer and iteration: --load takes it, at any parallel layout.
"""

import argparse
import importlib
import io
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Iterator

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
    check_tokenizer,
    companion_files,
    copy_companions,
)
from megatron.gpt_oss.checkpoint.hf.check import check_tensors
from megatron.gpt_oss.checkpoint.hf.config import (
    CONFIG_NAME,
    preset_from_hf_config,
    read_hf_config,
)
from megatron.gpt_oss.checkpoint.hf.reader import INDEX_NAME, HFReader
from megatron.gpt_oss.checkpoint.mapping import (
    as_contiguous,
    hf_names,
    hf_to_megatron,
    locate,
)
from megatron.gpt_oss.checkpoint.read_ahead import read_ahead
from megatron.gpt_oss.checkpoint.resumable_output import (
    TO_MEGATRON,
    Unfinished,
    fingerprint,
    unfinished,
)
from megatron.gpt_oss.checkpoint.torch_dist.layout import (
    CheckpointFile,
    Layout,
    Part,
    checkpoint_files,
)
from megatron.gpt_oss.checkpoint.torch_dist.reader import COMPANIONS_NAME
from megatron.gpt_oss.presets import preset_flags
from megatron.gpt_oss.progress import Progress

_COMMON_STATE = "common_state/shard_0_1"
_COMMON_PREFIX = "__0_common_"


def convert_to_megatron(
    hf: str | Path, out: str | Path, layout: Layout = Layout(), progress: bool = False
) -> Path:
    """Write a Hugging Face folder as a Megatron checkpoint.

    Args:
        hf: BF16 or MXFP4 checkpoint.
        out: the folder to write, for --load; must not exist, or be empty.
        layout: of the ranks whose files are written. Any layout loads any.
        progress: show a line on stderr.
    Returns:
        The folder.
    Raises:
        UsageError: the source is not whole or of another model, the layout does not fit, `out` is
            not empty, or the disk has no room.
    """
    return Job(Path(hf), layout).run(Path(out), progress)


class Job:
    """A conversion that has been checked and can begin.

    Args:
        hf: the source.
        layout: whose files are written.
    Raises:
        UsageError: the source is not whole or of another model, or the layout does not fit.
    """

    def __init__(self, hf: Path, layout: Layout = Layout()):
        self.hf, self.layout = hf, layout
        self.preset = preset_from_hf_config(read_hf_config(hf))
        self.reader = HFReader(hf)
        check_tensors(self.reader, self.preset)
        check_tokenizer(hf)
        for name in filter(self.reader.is_mxfp4, hf_names(self.preset)):
            self.reader.check_scales(name)
        stored = {e.dtype for entries in self.reader.files().values() for e in entries.values()}
        # fp32 files stay fp32: whatever else is there, MXFP4 too, fits into it.
        self.dtype = torch.float32 if "F32" in stored else torch.bfloat16
        self.files = list(checkpoint_files(self.preset, layout))

    def run(self, out: Path, progress: bool = False) -> Path:
        """Write the checkpoint, see `convert_to_megatron`."""
        with unfinished(
            out,
            self.task(),
            self.bytes_total(),
            names=self.names(),
            made_by=TO_MEGATRON,
            inputs=[self.hf],
        ) as work:
            if work.complete:
                return out
            (work.folder / RELEASE).mkdir(exist_ok=True)
            megatron = _import_megatron()
            with _without_checksums(), Progress(self.bytes_total(), "GB", 1e-9, progress) as bar:
                results = self.write_files(work, bar)
            work.wait()
            dist_checkpointing, checkpoint_integrity = megatron.result()
            self.write_metadata(work.folder / RELEASE, results)
            config = dist_checkpointing.CheckpointingConfig("torch_dist", 1)
            dist_checkpointing.save_config(config, str(work.folder / RELEASE))
            companions = work.folder / COMPANIONS_NAME
            copy_companions(self.hf, companions)
            for name in (CONFIG_NAME, INDEX_NAME):
                if (self.hf / name).is_file():
                    shutil.copyfile(self.hf / name, companions / name)
            checkpoint_integrity.finish_save(str(work.folder / RELEASE))
            checkpoint_integrity.write_tracker(str(work.folder / TRACKER), RELEASE)
        return out

    def names(self) -> set[str]:
        """The files that are written, from the output directory."""
        release = [".metadata", "metadata.json", MANIFEST]
        companions = {path.name for path in companion_files(self.hf)} | {CONFIG_NAME, INDEX_NAME}
        shards = [*map(_name, self.files), f"{RELEASE}/{_COMMON_PREFIX}0.distcp"]
        return {
            *shards,
            *(shard + SUFFIX for shard in shards),
            *(f"{RELEASE}/{name}" for name in release),
            *(f"{COMPANIONS_NAME}/{name}" for name in companions),
            TRACKER,
        }

    def bytes_total(self) -> int:
        """Bytes of all tensors, as they are written."""
        return sum(self._bytes(part) for file in self.files for part in file.parts)

    def task(self) -> dict:
        """What makes the result what it is."""
        source = [self.hf / name for name in (*self.reader.files(), CONFIG_NAME)]
        return {
            "direction": "to Megatron",
            "source": fingerprint(source),
            "layout": asdict(self.layout),
        }

    def write_files(self, work: Unfinished, bar: Progress) -> list[WriteResult]:
        """Write the files that are not there yet; where everything lies in all of them."""
        total = sum(len(file.parts) for file in self.files)
        bar.begin_at(
            sum(self._bytes(p) for f in self.files if _name(f) in work.done for p in f.parts)
        )
        # `work` brings the files to disk while the next one is read.
        writer = dcp.FileSystemWriter(
            work.folder / RELEASE,
            thread_count=1,
            per_thread_copy_ahead=0,
            overwrite=True,
            sync_files=False,
        )
        writer.fs = HashingFileSystem()
        parts = [part for file in self.files if _name(file) not in work.done for part in file.parts]
        tensors = read_ahead(self.read, parts)
        count, results = 0, []
        for file in self.files:
            if _name(file) in work.done:
                results += [_from_json(place) for place in work.done[_name(file)]["places"]]
            else:
                planner = _LazyPlanner(
                    self, file, tensors, work, bar, f"{{}} of {total} pieces", count
                )
                plan = SavePlan(planner.items(), storage_data=_StoragePrefix(file.prefix))
                written = writer.write_data(plan, planner).wait()
                work.finish(_name(file), {"places": [_to_json(result) for result in written]})
                results += written
            count += len(file.parts)
        return results

    def write_metadata(self, folder: Path, results: list[WriteResult]) -> None:
        """Write what is known of the whole: where each piece lies, and the arguments."""
        writer = dcp.FileSystemWriter(folder, thread_count=1, overwrite=True)
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
        """One piece in Megatron's layout, from the source."""
        where = locate(part.key, part.offset, part.shape)
        value = hf_to_megatron(where, self.preset, self.reader.read)
        return as_contiguous(value, self.dtype).view(part.sizes)

    def _bytes(self, part: Part) -> int:
        return torch.Size(part.shape).numel() * self.dtype.itemsize

    def _common_state(self) -> dict:
        """What Megatron keeps beside the tensors; the model's arguments, as a run has them."""
        args = argparse.Namespace(
            **preset_flags(self.preset),
            add_position_embedding=True,
            tokenizer_vocab_size=self.preset.vocab_size,  # no row of it is padding
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
    """Gives the writer one piece after the other, when it asks.

    Args:
        job: the conversion.
        file: what to give.
        tensors: the pieces, in the order of the file.
        work: told of every piece, so that the one before comes to disk.
        bar: told of every piece, with `note` and the number of pieces, `count` at the beginning.
    """

    def __init__(
        self,
        job: Job,
        file: CheckpointFile,
        tensors: Iterator[torch.Tensor],
        work: Unfinished,
        bar: Progress,
        note: str,
        count: int,
    ):
        super().__init__()
        self._job, self._file, self._tensors, self._work = job, file, tensors, work
        self._bar, self._note, self._count = bar, note, count
        self._parts = {MetadataIndex(p.key, torch.Size(p.offset)): p for p in file.parts}
        self._order = iter(self._parts)

    def items(self) -> list[WriteItem]:
        """What is to be written."""
        items = []
        for index, part in self._parts.items():
            size = torch.Size(part.global_shape)
            data = TensorWriteData(_chunk(part), TensorProperties(self._job.dtype), size)
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        for key in self._file.objects:
            items.append(WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO))
        return items

    def resolve_data(self, write_item: WriteItem):
        """See `SavePlanner`."""
        if write_item.type == WriteItemType.BYTE_IO:
            return _saved([None])
        tensor = next(self._tensors)
        assert write_item.index == next(self._order), "the writer asks in another order"
        self._count += 1
        self._work.written(_name(self._file), tensor.nbytes)
        self._bar.advance(tensor.nbytes, self._note.format(self._count))
        return tensor


class _BytesPlanner(dcp.DefaultSavePlanner):
    """Gives the writer objects that are bytes already."""

    def __init__(self, objects: dict[str, io.BytesIO]):
        super().__init__()
        self._objects = objects

    def resolve_data(self, write_item: WriteItem) -> io.BytesIO:
        """See `SavePlanner`."""
        return self._objects[write_item.index.fqn]


@contextmanager
def _without_checksums() -> Iterator[None]:
    """torch.load does not look at the CRC32 of a record, and computing it takes three quarters of
    the time of torch.save (0.55 GB/s with, 2.4 GB/s without)."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _import_megatron() -> Future:
    """Megatron's modules that end a checkpoint: two seconds of imports, while pieces are read."""

    def load() -> tuple:
        names = ("core.dist_checkpointing.core", "training.checkpoint_integrity")
        return tuple(importlib.import_module(f"megatron.{name}") for name in names)

    threads = ThreadPoolExecutor(1, thread_name_prefix="import")
    future = threads.submit(load)
    threads.shutdown(wait=False)
    return future


def _name(file: CheckpointFile) -> str:
    """As the writer names the only file of a plan, from the output folder."""
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
