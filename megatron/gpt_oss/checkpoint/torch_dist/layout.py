# Copyright (c) 2026, the megatron-core gptoss authors.

"""The shards and files that a parallel layout saves, computed without a process group or a model.

Names, offsets and shapes are those of the model's own `sharded_state_dict` at that layout; a test
compares the two. A checkpoint of any layout loads at any other layout.
"""

import math
from dataclasses import dataclass
from typing import Iterator

from megatron.gpt_oss.checkpoint.mapping import FC1, FC2, QKV
from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.presets import Preset

_LAYERS = "decoder.layers."
# Vocabulary matrices are split into smaller shards, which bounds the memory of a conversion.
LARGEST_PART = 8 * 2**20  # elements


@dataclass(frozen=True)
class ParallelSizes:
    """Sizes of the parallel groups; `etp` is `tp` by default, as in Megatron."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int | None = None
    vpp: int = 1

    @property
    def expert_tp(self) -> int:
        """Tensor parallel size within an expert."""
        return self.tp if self.etp is None else self.etp

    @property
    def stage_ranks(self) -> int:
        """Number of ranks that hold each shard of a pipeline stage once."""
        return math.lcm(self.tp, self.expert_tp * self.ep)


@dataclass(frozen=True)
class Part:
    """One shard of a global tensor. Layer and expert are leading axes of offset and global shape."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]  # without the layer and expert axes

    @property
    def sizes(self) -> tuple[int, ...]:
        """Shape in the checkpoint: `shape` with a leading 1 for each of layer and expert."""
        return (1,) * (len(self.offset) - len(self.shape)) + self.shape


@dataclass(frozen=True)
class CheckpointFile:
    """Contents of one file.

    Attributes:
        prefix: of the file name.
        parts: shards of tensors.
        objects: keys of empty objects. Megatron's linear layers save one each and expect it when
            they load.
    """

    prefix: str
    parts: tuple[Part, ...]
    objects: tuple[str, ...]


def check_layout(layout: ParallelSizes, preset: Preset) -> None:
    """Reject a layout whose sizes do not divide the model's.

    Raises:
        UsageError: names the flag, its value and what it has to divide.
    """
    stages = layout.pp * layout.vpp
    for flag, value, what, total in (
        ("--tp", layout.tp, "query groups", preset.num_query_groups),
        ("--pp", layout.pp, "layers", preset.num_layers),
        ("--pp times --vpp", stages, "layers", preset.num_layers),
        ("--ep", layout.ep, "experts", preset.num_experts),
        ("--etp", layout.expert_tp, "rows of an expert", preset.moe_ffn_hidden_size),
    ):
        if value < 1 or total % value:
            raise UsageError(f"{flag} {value} does not divide the model's {total} {what}.")
    if layout.vpp > 1 and layout.pp == 1:
        raise UsageError(f"--vpp {layout.vpp} needs pipeline stages. Give --pp 2 or more.")


def checkpoint_files(preset: Preset, layout: ParallelSizes) -> Iterator[CheckpointFile]:
    """The files of a checkpoint: one for each rank and layer, one for each rank's other tensors."""
    check_layout(layout, preset)
    per_chunk = preset.num_layers // (layout.pp * layout.vpp)
    for stage in range(layout.pp):
        layers = [
            (chunk * layout.pp + stage) * per_chunk + i
            for chunk in range(layout.vpp)
            for i in range(per_chunk)
        ]
        for rank in range(layout.stage_ranks):
            name = stage * layout.stage_ranks + rank
            parts = tuple(_global_parts(preset, layout, stage, rank))
            if parts:
                yield CheckpointFile(f"__{name}_0_", parts, ())
            for number, layer in enumerate(layers):
                parts = tuple(_layer_parts(preset, layout, layer, rank))
                if parts:
                    objects = tuple(_layer_objects(preset, layout, layer, rank))
                    yield CheckpointFile(f"__{name}_{number + 1}_", parts, objects)


def _global_parts(preset: Preset, layout: ParallelSizes, stage: int, rank: int) -> Iterator[Part]:
    if rank >= layout.tp:
        return
    shape = (preset.vocab_size, preset.hidden_size)
    if stage == 0:
        yield from _split("embedding.word_embeddings.weight", (), (), shape, 0, rank, layout.tp)
    if stage == layout.pp - 1:
        if rank == 0:
            yield _unsplit("decoder.final_layernorm.weight", (), (), shape[1:])
        yield from _split("output_layer.weight", (), (), shape, 0, rank, layout.tp)


def _layer_parts(preset: Preset, layout: ParallelSizes, layer: int, rank: int) -> Iterator[Part]:
    hidden, width, experts = preset.hidden_size, preset.moe_ffn_hidden_size, preset.num_experts
    query = preset.num_attention_heads * preset.head_dim
    qkv = query + 2 * preset.num_query_groups * preset.head_dim
    of, at = (preset.num_layers,), (layer,)
    attention = _LAYERS + "self_attention."
    if rank < layout.tp:
        tp = (rank, layout.tp)
        yield from _split(_LAYERS + QKV + "weight", of, at, (qkv, hidden), 0, *tp)
        yield from _split(_LAYERS + QKV + "bias", of, at, (qkv,), 0, *tp)
        sinks = attention + "core_attention.softmax_offset"
        yield from _split(sinks, of, at, (preset.num_attention_heads,), 0, *tp)
        yield from _split(attention + "linear_proj.weight", of, at, (hidden, query), 1, *tp)
    if rank == 0:
        yield _unsplit(attention + "linear_proj.bias", of, at, (hidden,))
        yield _unsplit(_LAYERS + QKV + "layer_norm_weight", of, at, (hidden,))
        yield _unsplit(_LAYERS + "pre_mlp_layernorm.weight", of, at, (hidden,))
        yield _unsplit(_LAYERS + "mlp.router.weight", of, at, (experts, hidden))
        yield _unsplit(_LAYERS + "mlp.router.bias", of, at, (experts,))
    of = (preset.num_layers, experts)
    for expert, piece in _own_experts(preset, layout, rank):
        at, etp = (layer, expert), layout.expert_tp
        # Gate and up are split separately: rank i holds part i of both.
        for half in (piece, piece + etp):
            yield from _split(
                _LAYERS + FC1 + "weight", of, at, (2 * width, hidden), 0, half, 2 * etp
            )
        for half in (piece, piece + etp):
            yield from _split(_LAYERS + FC1 + "bias", of, at, (2 * width,), 0, half, 2 * etp)
        yield from _split(_LAYERS + FC2 + "weight", of, at, (hidden, width), 1, piece, etp)
        if piece == 0:
            yield _unsplit(_LAYERS + FC2 + "bias", of, at, (hidden,))


def _layer_objects(preset: Preset, layout: ParallelSizes, layer: int, rank: int) -> Iterator[str]:
    if rank == 0:
        for name in ("linear_qkv", "linear_proj"):
            key = f"{_LAYERS}self_attention.{name}._extra_state"
            yield f"{key}/shard_{layer}_{preset.num_layers}"
    for expert, piece in _own_experts(preset, layout, rank):
        for key in (FC1, FC2) if piece == 0 else ():
            at, of = f"{layer}.{expert}", f"{preset.num_layers}.{preset.num_experts}"
            yield f"{_LAYERS}{key}_extra_state/shard_{at}_{of}"


def _own_experts(preset: Preset, layout: ParallelSizes, rank: int) -> Iterator[tuple[int, int]]:
    """(expert, tensor-parallel rank within it) of each expert that a rank of a stage holds."""
    group, piece = divmod(rank, layout.expert_tp)
    count = preset.num_experts // layout.ep
    if group < layout.ep:
        yield from ((expert, piece) for expert in range(group * count, (group + 1) * count))


def _split(
    key: str, of: tuple, at: tuple, shape: tuple[int, ...], dim: int, piece: int, pieces: int
) -> Iterator[Part]:
    """Shard number `piece` of `pieces` along `dim`; the last one may be smaller."""
    size = -(-shape[dim] // pieces)
    start, stop = min(piece * size, shape[dim]), min((piece + 1) * size, shape[dim])
    others = math.prod(shape) // shape[dim]
    most = max(LARGEST_PART // others, 1) if dim == 0 and not of else size
    for first in range(start, stop, most):
        offset = [0] * len(shape)
        offset[dim] = first
        shard_shape = (*shape[:dim], min(most, stop - first), *shape[dim + 1 :])
        yield Part(key, (*of, *shape), (*at, *offset), shard_shape)


def _unsplit(key: str, of: tuple, at: tuple, shape: tuple[int, ...]) -> Part:
    return Part(key, (*of, *shape), (*at, *(0,) * len(shape)), shape)
