# Copyright (c) 2026, the megatron-core gptoss authors.

"""Models and checkpoints with irregular sizes for the tests of gpt_oss."""

import dataclasses
import json

import torch
from safetensors.torch import save_file

from megatron.gpt_oss.checkpoint.hf.config import hf_config_from_preset
from megatron.gpt_oss.checkpoint.hf.reader import HFReader
from megatron.gpt_oss.checkpoint.hf.writer import QUANTIZATION_CONFIG
from megatron.gpt_oss.checkpoint.mapping import is_expert_matrix
from megatron.gpt_oss.data.byte_tokenizer import write_byte_tokenizer
from megatron.gpt_oss.diagnostics.random_checkpoint import random_hf_tensors
from megatron.gpt_oss.layer_specs import model_config
from megatron.gpt_oss.presets import get_preset

TINY = get_preset("tiny")
# No two sizes alike, 3 groups, an odd depth, a window and a YaRN length that short tests cross.
ODD = dataclasses.replace(
    TINY,
    name="odd",
    num_layers=3,
    hidden_size=80,
    num_attention_heads=6,
    num_query_groups=3,
    head_dim=16,
    num_experts=5,
    moe_ffn_hidden_size=56,
    vocab_size=101,
    sliding_window=16,
    yarn_original_max_position_embeddings=64,
)


def build_model(preset, **overrides):
    """A GPTModel of this rank (the first virtual stage), fp32 unless overrides say else."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(1)
    config = model_config(preset, **overrides)
    config.finalize()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    stages = config.transformer.virtual_pipeline_model_parallel_size
    builder = config.get_builder_cls()(config)
    if stages is None:
        return builder.build_model(groups)
    return [builder.build_model(groups, vp_stage=stage) for stage in range(stages)]


def trained_tensors(preset, seed=0):
    """Weights like those of a trained model: sinks of +-10, biases, values beyond the clamp."""
    generator = torch.Generator().manual_seed(seed + 1)
    tensors = random_hf_tensors(preset, seed)
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("sinks"):
            tensor.copy_(10 * torch.tanh(2 * noise))
        elif "norm" in name:
            tensor.add_(0.3 * noise)
        elif name.endswith("gate_up_proj"):
            tensor.mul_(15)
        elif name.endswith("gate_up_proj_bias"):
            tensor.copy_(3 * noise)
        elif name.endswith("bias"):
            tensor.copy_(0.3 * noise)
        else:
            tensor.mul_(5)
    return tensors


def write_hf(folder, preset, tensors, dtype=torch.bfloat16, config=None):
    """Write tensors as one Hugging Face file, with config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config or hf_config_from_preset(preset)))
    return folder


def mxfp4_tensors(tensors, seed=0):
    """The same with the experts' matrices as random blocks and scales, as published files are."""
    generator = torch.Generator().manual_seed(seed + 7)
    stored = {}
    for name, tensor in tensors.items():
        if not is_expert_matrix(name):
            stored[name] = tensor.to(torch.bfloat16)
            continue
        experts, fan_in, fan_out = tensor.shape
        shape = (experts, fan_out, fan_in // 32)
        stored[name + "_blocks"] = torch.randint(
            0, 256, (*shape, 16), dtype=torch.uint8, generator=generator
        )
        stored[name + "_scales"] = torch.randint(
            117, 124, shape, dtype=torch.uint8, generator=generator
        )
    return stored


def write_mxfp4(folder, preset, tensors):
    """Write an MXFP4 directory in two files, with config, index and tokenizer as published."""
    folder.mkdir(parents=True, exist_ok=True)
    write_byte_tokenizer(folder)
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        file = f"model-0000{number}-of-00002.safetensors"  # numbered from 0, as openai's files
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = hf_config_from_preset(preset, quantization_config=QUANTIZATION_CONFIG)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def count_differing(one, other):
    """Number of values in which two Hugging Face directories differ, dtypes and names included."""
    one, other = HFReader(one), HFReader(other)
    assert one.names() == other.names()
    count = 0
    for name in one.names():
        first, second = one.read(name), other.read(name)
        assert first.dtype == second.dtype and first.shape == second.shape, name
        count += (
            first.contiguous().view(torch.uint8) != second.contiguous().view(torch.uint8)
        ).sum()
    return int(count)
