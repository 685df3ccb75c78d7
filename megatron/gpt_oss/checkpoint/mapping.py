# Copyright (c) 2026, the megatron-core gptoss authors.

"""Which Hugging Face tensor is which Megatron tensor: names and layouts, no files, no processes.

Megatron tensors are named by their key in a sharded state dict, where the tensors of all layers
are one global tensor with the layer as axis 0 (and the expert as axis 1):

    decoder.layers.self_attention.linear_qkv.weight       [layers, groups x (q.., k, v), h]
    decoder.layers.mlp.experts.experts.linear_fc1.weight  [layers, experts, gate then up, h]

Hugging Face (BF16 files) keeps q, k and v apart, interleaves gate and up (gate 0, up 0, gate 1,
...) and stores the experts' matrices [experts, in, out], transposed against Megatron's [out, in].
`down_proj` is square in the published sizes: a wrong transpose fits, and only a forward shows it.
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
# The same layout on both sides. A norm has several keys: TransformerEngine's fused layers and
# upstream's local spec name it after the linear layer that follows.
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
    """A rank's part of one layer's tensor: the key without its layer, and where the part lies."""

    key: str
    layer: int | None
    expert: int | None
    index: tuple[slice, ...]


def locate(key: str, global_offset: tuple[int, ...], local_shape: tuple[int, ...]) -> Location:
    """Take layer and expert out of a sharded tensor's key and offsets.

    Args:
        key: of a ShardedTensor, with the layers stacked on axis 0 or with the layer in the key.
        global_offset: of the part, prepended axes included.
        local_shape: of the part, without prepended axes.
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
    """Read a rank's part of a Megatron tensor from a Hugging Face checkpoint.

    Args:
        where: which part, from `locate`.
        preset: the model's sizes.
        read: read(name, index) gives a part of a Hugging Face tensor; index is an int or a
            contiguous slice for each leading dimension.
    Returns:
        The part, of the shape that `where.index` says, perhaps a transposed view (`copy_matrix`
        copies it fast). Rows that only pad the vocabulary are 0.
    Raises:
        CheckpointError: the key has no counterpart.
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
    """Gather rows of q, k and v, which Megatron keeps group by group, from their own tensors."""
    heads = preset.num_attention_heads // preset.num_query_groups
    # Within one group: where each projection starts, and its rows a group.
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
    """Rows of [gate; up] from a first dimension that interleaves them."""
    width = preset.moe_ffn_hidden_size
    pieces = []
    for half in (0, 1):  # gate at even positions, up at odd ones
        first, last = max(rows.start - half * width, 0), min(rows.stop - half * width, width)
        if first < last:
            pieces.append(read(slice(2 * first, 2 * last))[half::2])
    if len(pieces) == 1:
        return pieces[0]
    out = pieces[0].new_empty(rows.stop - rows.start, *pieces[0].shape[1:])
    for part, piece in zip(out.split([len(p) for p in pieces]), pieces):
        copy_matrix(part, piece)
    return out


# bf16 matrices of an expert on one core: 0.4 GB/s as one copy, 1.3 GB/s in panels of this many
# columns.
_PANEL = 256


def copy_matrix(out: torch.Tensor, value: torch.Tensor) -> None:
    """`out.copy_(value)`; a transposed matrix in panels that stay in the cache."""
    if value.dim() == 2 and value.stride(0) < value.stride(1) and out.device.type == "cpu":
        for to, part in zip(out.split(_PANEL, dim=1), value.split(_PANEL, dim=1)):
            to.copy_(part)
    else:
        out.copy_(value)


def as_contiguous(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor itself where it is as wanted already, else a copy."""
    if value.is_contiguous() and value.dtype == dtype:
        return value
    out = torch.empty(value.shape, dtype=dtype)
    copy_matrix(out, value)
    return out


def is_expert_matrix(name: str) -> bool:
    """Whether a Hugging Face tensor holds matrices of all experts (what MXFP4 quantises)."""
    return name.endswith((".mlp.experts.gate_up_proj", ".mlp.experts.down_proj"))


class MegatronSource(Protocol):
    """Where `megatron_to_hf` takes whole Megatron tensors from."""

    def whole(self, key: str, rows: slice = slice(None)) -> torch.Tensor:
        """A global tensor without layers, or a range of its rows."""

    def layer(self, keys: tuple[str, ...], layer: int, expert: int | None = None) -> torch.Tensor:
        """One layer of a tensor (of one expert), under the first of the keys that exists."""


def hf_names(preset: Preset) -> list[str]:
    """Every tensor of a Hugging Face gpt-oss checkpoint (BF16), in the order of the forward."""
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
    """Whether a Hugging Face tensor has a row for each token: embedding and head."""
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
        preset: the model's sizes; rows that only pad the vocabulary are left out.
        source: gives Megatron tensors, one layer at a time.
        expert: give only this expert's part of a tensor of the experts.
        rows: give only these rows of a matrix of the vocabulary.
    Returns:
        The tensor, perhaps a transposed view.
    """
    for key, hf_name in GLOBAL_NAMES.items():
        if name == hf_name:
            if not is_vocabulary_matrix(name):
                return source.whole(key)
            start, stop, _ = (rows or slice(None)).indices(preset.vocab_size)
            return source.whole(key, slice(start, stop))
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
    """One expert's matrix of a Hugging Face tensor, [out, in] as Megatron and MXFP4 files have it.

    Gate and up lie one behind the other; `interleave_gate_up` of whatever has their rows brings
    them into the order of Hugging Face.
    """
    _, _, layer, ending = name.split(".", 3)
    key = (FC1 if ending.endswith("gate_up_proj") else FC2) + "weight"
    return source.layer((key,), int(layer), expert)


def interleave_gate_up(gate_then_up: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Gate first and then up, to gate 0, up 0, gate 1, ..."""
    gate, up = gate_then_up.chunk(2, dim=dim)
    return torch.stack((gate, up), dim=dim + 1).flatten(dim, dim + 1)


def _split_qkv(qkv: torch.Tensor, letter: str, preset: Preset) -> torch.Tensor:
    """The rows of q, k or v out of [(q x heads/group, k, v) x groups, ...]."""
    heads = preset.num_attention_heads // preset.num_query_groups
    groups = qkv.reshape(preset.num_query_groups, heads + 2, preset.head_dim, *qkv.shape[1:])
    part = {"q": slice(0, heads), "k": slice(heads, heads + 1), "v": slice(heads + 1, None)}[letter]
    return groups[:, part].reshape(-1, *qkv.shape[1:]).contiguous()


def _no_counterpart(name: str) -> str:
    return (
        f"Tensor '{name}' has no counterpart in a gpt-oss checkpoint. Is the model built with the "
        "preset's flags?"
    )
