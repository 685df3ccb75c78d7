# Copyright (c) 2026, the megatron-core gptoss authors.

"""Write a Hugging Face gpt-oss folder from a Megatron checkpoint, tensor by tensor.

Needs no process group and no model: one process reads a torch_dist checkpoint that any parallel
layout saved, and holds at most one output file in memory. The folder appears when it is whole.
"""

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import torch
from safetensors.torch import save_file

from megatron.gpt_oss.checkpoint.hf_config import (
    CONFIG_NAME,
    hf_config_from_preset,
    preset_from_hf_config,
    read_hf_config,
)
from megatron.gpt_oss.checkpoint.hf_reader import INDEX_NAME, SINGLE_NAME
from megatron.gpt_oss.checkpoint.load import sharded_tensors
from megatron.gpt_oss.checkpoint.mapping import (
    FC1,
    QKV,
    MegatronSource,
    hf_names,
    locate,
    megatron_to_hf,
)
from megatron.gpt_oss.checkpoint.torch_dist_reader import TorchDistReader, find_iteration
from megatron.gpt_oss.errors import CheckpointError, UsageError
from megatron.gpt_oss.presets import Preset

DTYPES = {"bf16": (torch.bfloat16, "bfloat16"), "fp32": (torch.float32, "float32")}
MAX_SHARD_BYTES = 5 * 10**9  # the size of the shards that transformers writes
# What a Hugging Face folder has beside weights and config; copied where the source has it.
COMPANION_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def export_hf(
    checkpoint: str | Path,
    out: str | Path,
    like: str | Path | None = None,
    dtype: str = "bf16",
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write a torch_dist checkpoint as a Hugging Face folder.

    Args:
        checkpoint: a --save folder (its latest iteration is taken) or one iter_* folder.
        out: the folder to write; must not exist, or be empty.
        like: a Hugging Face gpt-oss folder whose config, generation config and tokenizer are
            taken over. Without it the config is read off the tensors' shapes, all else as in the
            published models, and there is no tokenizer.
        dtype: "bf16" or "fp32", of the weights written.
        overwrite: `out` may be a model folder; it is replaced once the new one is whole.
        max_shard_bytes: size of one file, the most that is held in memory.
    Returns:
        The folder.
    Raises:
        UsageError: no or a damaged checkpoint, another model than `like`, or `out` is not empty.
    """
    reader = TorchDistReader(find_iteration(checkpoint))
    preset = preset_from_shapes(reader)
    config = hf_config_from_preset(preset)
    if like is not None:
        config = dict(read_hf_config(Path(like)))
        config.pop("quantization_config", None)  # MXFP4 becomes plain floats
        preset = _checked_against(preset, preset_from_hf_config(config), checkpoint, like)
    with _whole_or_nothing(Path(out), overwrite) as folder:
        write_hf(reader, preset, config, folder, dtype, max_shard_bytes)
        for name in COMPANION_FILES if like is not None else ():
            if (Path(like) / name).is_file():
                shutil.copyfile(Path(like) / name, folder / name)
    return Path(out)


def write_hf(
    source: MegatronSource,
    preset: Preset,
    config: dict,
    folder: Path,
    dtype: str = "bf16",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config and weights of a model into an existing folder.

    Args:
        source: gives Megatron's tensors.
        preset: the model's sizes.
        config: config.json; its dtype field is set.
        folder: where to.
        dtype: "bf16" or "fp32".
        max_shard_bytes: size of one file.
    """
    if dtype not in DTYPES:
        raise UsageError(f"Unknown dtype '{dtype}'. Choose one of {', '.join(DTYPES)}.")
    torch_dtype, hf_dtype = DTYPES[dtype]
    config = {k: v for k, v in config.items() if k != "torch_dtype"} | {"dtype": hf_dtype}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")

    shards: list[list[str]] = []
    total = 0
    for names, tensors in _shards(source, preset, torch_dtype, max_shard_bytes):
        save_file(tensors, folder / f"part-{len(shards)}", metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
        shards.append(names)
    if len(shards) == 1:
        os.replace(folder / "part-0", folder / SINGLE_NAME)
        return
    weight_map = {}
    for number, names in enumerate(shards):  # the count is part of the name, known only now
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(folder / f"part-{number}", folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / INDEX_NAME).write_text(text, encoding="utf-8")


def _shards(
    source: MegatronSource, preset: Preset, dtype: torch.dtype, max_bytes: int
) -> Iterator[tuple[list[str], dict[str, torch.Tensor]]]:
    tensors: dict[str, torch.Tensor] = {}
    size = 0
    for name in hf_names(preset):
        tensor = megatron_to_hf(name, preset, source).to(dtype).contiguous()
        if tensors and size + tensor.nbytes > max_bytes:
            yield list(tensors), tensors
            tensors, size = {}, 0
        tensors[name] = tensor
        size += tensor.nbytes
    yield list(tensors), tensors


class ModelSource:
    """A `MegatronSource` over a live model that one rank holds whole (TP, PP and EP of 1).

    Args:
        model: a GPTModel, unwrapped.
    """

    def __init__(self, model: torch.nn.Module):
        self._whole: dict[str, torch.Tensor] = {}
        self._layers: dict[tuple[str, int], torch.Tensor] = {}
        with torch.no_grad():
            for part in sharded_tensors(model.sharded_state_dict()):
                where = locate(part.key, part.global_offset, part.local_shape)
                prepended = part.prepend_axis_num
                shape = part.global_shape[prepended:]
                index = where.index
                if where.layer is None:
                    target = self._whole.setdefault(where.key, part.data.new_empty(shape))
                else:
                    if where.expert is not None:
                        shape = (part.global_shape[prepended - 1], *shape)
                        index = (where.expert, *index)
                    at = (where.key, where.layer)
                    target = self._layers.setdefault(at, part.data.new_empty(shape))
                target[index] = part.data

    def whole(self, key: str) -> torch.Tensor:
        """See `MegatronSource`."""
        return self._whole[key]

    def layer(self, keys: tuple[str, ...], layer: int) -> torch.Tensor:
        """See `MegatronSource`."""
        return next(self._layers[key, layer] for key in keys if (key, layer) in self._layers)


def preset_from_shapes(reader: TorchDistReader) -> Preset:
    """The sizes that a checkpoint's tensors imply; the rest as all gpt-oss models have it.

    Raises:
        CheckpointError: a tensor of gpt-oss is missing.
    """
    vocab_size, hidden_size = reader.shape("embedding.word_embeddings.weight")
    (num_heads,) = reader.shape("self_attention.core_attention.softmax_offset")
    _, query_rows = reader.shape("self_attention.linear_proj.weight")
    qkv_rows, _ = reader.shape(QKV + "weight")
    num_experts, fc1_rows, _ = reader.shape(FC1 + "weight")
    head_dim = query_rows // num_heads
    return Preset(
        name="checkpoint",
        num_layers=reader.num_layers(),
        hidden_size=hidden_size,
        num_attention_heads=num_heads,
        num_query_groups=(qkv_rows // head_dim - num_heads) // 2,
        head_dim=head_dim,
        num_experts=num_experts,
        moe_ffn_hidden_size=fc1_rows // 2,
        vocab_size=vocab_size,
        seq_length=4096,
    )


def _checked_against(
    found: Preset, wanted: Preset, checkpoint: str | Path, like: str | Path
) -> Preset:
    """The sizes of `like`, if the checkpoint has them (its vocabulary may be padded)."""
    for field in (
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "head_dim",
        "num_experts",
        "moe_ffn_hidden_size",
    ):
        if getattr(found, field) != getattr(wanted, field):
            raise CheckpointError(
                f"{checkpoint} has {field} = {getattr(found, field)}, {like} has "
                f"{getattr(wanted, field)}. Give the Hugging Face folder that training began with."
            )
    if found.vocab_size < wanted.vocab_size:
        raise CheckpointError(
            f"{checkpoint} has {found.vocab_size} rows of vocabulary, {like} has "
            f"{wanted.vocab_size}. Give the Hugging Face folder that training began with."
        )
    return wanted


@contextmanager
def _whole_or_nothing(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside `out` that takes its name at the end; nothing stays if the work fails."""
    replaced = overwrite and (out / CONFIG_NAME).is_file()
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not replaced:
        raise UsageError(
            f"{out} exists and is not empty. Name a new folder, or remove this one"
            + (", which is not a model folder." if overwrite else ", or give --overwrite.")
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        if replaced:
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
            os.replace(out, old)
            os.replace(temporary, out)
            shutil.rmtree(old)
        else:
            os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
