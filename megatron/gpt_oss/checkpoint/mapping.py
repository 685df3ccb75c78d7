# Copyright (c) 2026, the megatron-core gptoss authors.

"""Names and layouts of Hugging Face and Megatron tensors, as pure functions.

The name of a Megatron tensor is its key in a sharded state dict, where all layers are one global
tensor with the layer as axis 0 (and the expert as axis 1):

    decoder.layers.self_attention.linear_qkv.weight       [layers, groups x (q.., k, v), h]
    decoder.layers.mlp.experts.experts.linear_fc1.weight  [layers, experts, gate then up, h]

Hugging Face (BF16 files) has separate q, k and v, interleaves gate and up (gate 0, up 0, gate 1,
...) and stores expert matrices as [experts, in, out], the transpose of Megatron's [out, in].
`down_proj` is square in the published sizes, so that only a forward shows a missing transpose.
"""

import re
from dataclasses import dataclass
from typing import Callable, Protocol

import torch

from megatron.gpt_oss.errors import CheckpointError
from megatron.gpt_oss.presets import Preset

GLOBAL_NAMES = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
# Tensors with the same layout. A norm has two keys: TransformerEngine's fused layers and upstream's
# local spec name it after the linear layer that follows it.
LAYER_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.core_attention.softmax_offset": "self_attn.sinks",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.linear_proj.bias": "self_attn.o_proj.bias",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.router.weight": "mlp.router.weight",
    "mlp.router.bias": "mlp.router.bias",
}
QKV = "self_attention.linear_qkv."
FC1 = "mlp.experts.experts.linear_fc1."
FC2 = "mlp.experts.experts.linear_fc2."

ReadFn = Callable[[str, tuple], torch.Tensor]


@dataclass(frozen=True)
class Location:
    """A shard of one layer's tensor: key without layer, layer, expert, slices within the tensor."""

    key: str
    layer: int | None
    expert: int | None
    index: tuple[slice, ...]


def locate(key: str, global_offset: tuple[int, ...], local_shape: tuple[int, ...]) -> Location:
    """Find layer and expert of a sharded tensor from its key and offsets.

    Args:
        key: of a ShardedTensor, with the layers stacked on axis 0 or with the layer in the key.
        global_offset: of the shard, with prepended axes.
        local_shape: of the shard, without prepended axes.
    """
    index = tuple(
        slice(start, start + size)
        for start, size in zip(global_offset[len(global_offset) - len(local_shape) :], local_shape)
    )
    prepended = list(global_offset[: len(global_offset) - len(local_shape)])
    match = re.fullmatch(r"decoder\.layers\.(?:(\d+)\.)?(.+)", key)
    if match is None:
        return Location(key, None, None, index)
    layer = int(match[1]) if match[1] is not None else prepended.pop(0)
    return Location(match[2], layer, prepended.pop(0) if prepended else None, index)


def hf_to_megatron(where: Location, preset: Preset, read: ReadFn) -> torch.Tensor:
    """Read a shard of a Megatron tensor from a Hugging Face model.

    Args:
        where: the shard, from `locate`.
        preset: the model's sizes.
        read: read(name, index) returns a part of a Hugging Face tensor; index is an int or a
            contiguous slice for each leading dimension.
    Returns:
        The shard; it may be a transposed view, which `copy_matrix` copies fast. Padding rows of the
        vocabulary are 0.
    Raises:
        CheckpointError: gpt-oss has no such tensor.
    """
    if where.layer is None:
        if where.key not in GLOBAL_NAMES:
            raise CheckpointError(_no_counterpart(where.key))
        return _read_vocab_padded(where, preset, read)
    prefix = f"model.layers.{where.layer}."
    if where.key in LAYER_NAMES:
        return read(prefix + LAYER_NAMES[where.key], where.index)
    if where.key in (QKV + "weight", QKV + "bias"):
        return _read_qkv(where, preset, prefix, read)
    experts = prefix + "mlp.experts."
    if where.expert is not None and where.key == FC1 + "weight":
        rows, columns = where.index
        return _read_fc1(
            rows,
            preset,
            lambda r: read(experts + "gate_up_proj", (where.expert, columns, r)).transpose(0, 1),
        )
    if where.expert is not None and where.key == FC1 + "bias":
        return _read_fc1(
            where.index[0], preset, lambda r: read(experts + "gate_up_proj_bias", (where.expert, r))
        )
    if where.expert is not None and where.key == FC2 + "weight":
        rows, columns = where.index
        return read(experts + "down_proj", (where.expert, columns, rows)).transpose(0, 1)
    if where.expert is not None and where.key == FC2 + "bias":
        return read(experts + "down_proj_bias", (where.expert, *where.index))
    raise CheckpointError(_no_counterpart(where.key))


def _read_vocab_padded(where: Location, preset: Preset, read: ReadFn) -> torch.Tensor:
    name = GLOBAL_NAMES[where.key]
    if name == "model.norm.weight":
        return read(name, where.index)
    rows, columns = where.index
    known = slice(min(rows.start, preset.vocab_size), min(rows.stop, preset.vocab_size))
    if known == rows:
        return read(name, where.index)
    padding = (rows.stop - rows.start) - (known.stop - known.start)
    if known.start == known.stop:
        part = read(name, (slice(0, 1), columns))[:0]
    else:
        part = read(name, (known, columns))
    return torch.cat((part, part.new_zeros(padding, part.shape[1])))


def _read_qkv(where: Location, preset: Preset, prefix: str, read: ReadFn) -> torch.Tensor:
    """Read rows of Megatron's qkv, which is ordered by query group, from q, k and v."""
    heads = preset.num_attention_heads // preset.num_query_groups
    # (projection, first row within a group, rows per group)
    parts = (
        ("q", 0, heads * preset.head_dim),
        ("k", heads * preset.head_dim, preset.head_dim),
        ("v", (heads + 1) * preset.head_dim, preset.head_dim),
    )
    group_rows = (heads + 2) * preset.head_dim
    rows, *columns = where.index
    ending = where.key.removeprefix(QKV)
    pieces = []
    for group in range(rows.start // group_rows, -(-rows.stop // group_rows)):
        for letter, start, count in parts:
            begin = group * group_rows + start
            first, last = max(rows.start, begin), min(rows.stop, begin + count)
            if first < last:
                offset = group * count - begin
                name = f"{prefix}self_attn.{letter}_proj.{ending}"
                pieces.append(read(name, (slice(first + offset, last + offset), *columns)))
    return torch.cat(pieces)


def _read_fc1(rows: slice, preset: Preset, read: Callable[[slice], torch.Tensor]) -> torch.Tensor:
    """Rows of [gate; up] from rows that interleave them."""
    width = preset.moe_ffn_hidden_size
    pieces = []
    for half in (0, 1):  # gate in even rows, up in odd rows
        first, last = max(rows.start - half * width, 0), min(rows.stop - half * width, width)
        if first < last:
            pieces.append(read(slice(2 * first, 2 * last))[half::2])
    if len(pieces) == 1:
        return pieces[0]
    out = pieces[0].new_empty(rows.stop - rows.start, *pieces[0].shape[1:])
    for part, piece in zip(out.split([len(p) for p in pieces]), pieces):
        copy_matrix(part, piece)
    return out


# Columns per panel. bf16 expert matrix on one core: 0.4 GB/s in one copy, 1.3 GB/s in panels.
_PANEL = 256


def copy_matrix(out: torch.Tensor, value: torch.Tensor) -> None:
    """`out.copy_(value)`, for a transposed matrix in panels that fit the cache."""
    if value.dim() == 2 and value.stride(0) < value.stride(1) and out.device.type == "cpu":
        for to, part in zip(out.split(_PANEL, dim=1), value.split(_PANEL, dim=1)):
            to.copy_(part)
    else:
        out.copy_(value)


def as_contiguous(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`value` if it is contiguous and of the dtype, else a copy that is."""
    if value.is_contiguous() and value.dtype == dtype:
        return value
    out = torch.empty(value.shape, dtype=dtype)
    copy_matrix(out, value)
    return out


def is_expert_matrix(name: str) -> bool:
    """Whether a Hugging Face tensor has the matrices of all experts, which MXFP4 quantizes."""
    return name.endswith((".mlp.experts.gate_up_proj", ".mlp.experts.down_proj"))


class MegatronSource(Protocol):
    """Provides the Megatron tensors of `megatron_to_hf`."""

    def global_tensor(self, key: str, rows: slice = slice(None)) -> torch.Tensor:
        """A tensor outside the layers, or a range of its rows."""

    def layer(self, keys: tuple[str, ...], layer: int, expert: int | None = None) -> torch.Tensor:
        """One layer (and expert) of a tensor, under the first of `keys` that exists."""


def hf_names(preset: Preset) -> list[str]:
    """Names of the tensors of a Hugging Face gpt-oss model (BF16), in model order."""
    layer_endings = (
        "input_layernorm.weight",
        *(f"self_attn.{p}_proj.{e}" for p in "qkvo" for e in ("weight", "bias")),
        "self_attn.sinks",
        "post_attention_layernorm.weight",
        "mlp.router.weight",
        "mlp.router.bias",
        *(f"mlp.experts.{p}_proj{e}" for p in ("gate_up", "down") for e in ("", "_bias")),
    )
    layers = (f"model.layers.{i}.{e}" for i in range(preset.num_layers) for e in layer_endings)
    return ["model.embed_tokens.weight", *layers, "model.norm.weight", "lm_head.weight"]


def hf_shape(name: str, preset: Preset) -> tuple[int, ...]:
    """Shape of a Hugging Face tensor (BF16 layout)."""
    hidden, width, experts = preset.hidden_size, preset.moe_ffn_hidden_size, preset.num_experts
    query = preset.num_attention_heads * preset.head_dim
    key = preset.num_query_groups * preset.head_dim
    shapes = {
        "embed_tokens.weight": (preset.vocab_size, hidden),
        "lm_head.weight": (preset.vocab_size, hidden),
        "q_proj.weight": (query, hidden),
        "q_proj.bias": (query,),
        "k_proj.weight": (key, hidden),
        "k_proj.bias": (key,),
        "v_proj.weight": (key, hidden),
        "v_proj.bias": (key,),
        "o_proj.weight": (hidden, query),
        "o_proj.bias": (hidden,),
        "sinks": (preset.num_attention_heads,),
        "router.weight": (experts, hidden),
        "router.bias": (experts,),
        "gate_up_proj": (experts, hidden, 2 * width),
        "gate_up_proj_bias": (experts, 2 * width),
        "down_proj": (experts, width, hidden),
        "down_proj_bias": (experts, hidden),
    }
    for ending, shape in shapes.items():
        if name.endswith("." + ending) or name == ending:
            return shape
    return (hidden,)  # a norm


def is_vocabulary_matrix(name: str) -> bool:
    """Whether a Hugging Face tensor is the embedding or the output layer."""
    return name in ("model.embed_tokens.weight", "lm_head.weight")


def megatron_to_hf(
    name: str,
    preset: Preset,
    source: MegatronSource,
    expert: int | None = None,
    rows: slice | None = None,
) -> torch.Tensor:
    """Build one Hugging Face tensor (BF16 layout) from Megatron's.

    Args:
        name: one of `hf_names`.
        preset: the model's sizes; padding rows of the vocabulary are omitted.
        source: provides Megatron tensors.
        expert: return only this expert of an expert tensor.
        rows: return only these rows of a vocabulary matrix.
    Returns:
        The tensor; it may be a transposed view.
    """
    for key, hf_name in GLOBAL_NAMES.items():
        if name == hf_name:
            if not is_vocabulary_matrix(name):
                return source.global_tensor(key)
            start, stop, _ = (rows or slice(None)).indices(preset.vocab_size)
            return source.global_tensor(key, slice(start, stop))
    _, _, number, ending = name.split(".", 3)
    layer = int(number)
    keys = tuple(key for key, hf_ending in LAYER_NAMES.items() if hf_ending == ending)
    if keys:
        return source.layer(keys, layer)
    match = re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", ending)
    if match:
        return _split_qkv(source.layer((QKV + match[2],), layer), match[1], preset)
    match = re.fullmatch(r"mlp\.experts\.(gate_up|down)_proj(_bias)?", ending)
    if match is None:
        raise CheckpointError(_no_counterpart(name))
    key = (FC1 if match[1] == "gate_up" else FC2) + ("bias" if match[2] else "weight")
    tensor = source.layer((key,), layer, expert)
    if match[1] == "gate_up":
        tensor = interleave_gate_up(tensor, dim=0 if expert is not None else 1)
    return tensor if match[2] else tensor.transpose(-1, -2)


def expert_matrix(name: str, source: MegatronSource, expert: int) -> torch.Tensor:
    """The matrix of one expert, [out, in] as in Megatron and in MXFP4 files.

    Rows of gate precede rows of up; `interleave_gate_up` converts to the order of Hugging Face.
    """
    _, _, layer, ending = name.split(".", 3)
    key = (FC1 if ending.endswith("gate_up_proj") else FC2) + "weight"
    return source.layer((key,), int(layer), expert)


def interleave_gate_up(gate_then_up: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Convert [gate; up] to gate 0, up 0, gate 1, up 1, ..."""
    gate, up = gate_then_up.chunk(2, dim=dim)
    return torch.stack((gate, up), dim=dim + 1).flatten(dim, dim + 1)


def _split_qkv(qkv: torch.Tensor, letter: str, preset: Preset) -> torch.Tensor:
    """The rows of q, k or v of a qkv tensor [groups x (q.., k, v), ...]."""
    heads = preset.num_attention_heads // preset.num_query_groups
    groups = qkv.reshape(preset.num_query_groups, heads + 2, preset.head_dim, *qkv.shape[1:])
    part = {"q": slice(0, heads), "k": slice(heads, heads + 1), "v": slice(heads + 1, None)}[letter]
    return groups[:, part].reshape(-1, *qkv.shape[1:]).contiguous()


def _no_counterpart(name: str) -> str:
    return (
        f"Tensor '{name}' has no counterpart in a gpt-oss checkpoint. Is the model built with the "
        "preset's flags?"
    )
