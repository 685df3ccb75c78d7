# Copyright (c) 2026, the megatron-core gptoss authors.

"""Hugging Face configs that differ from the published one, and both readers of each."""

import json
import random

import torch
from safetensors.torch import save_file

from megatron.gpt_oss.checkpoint.hf.config import hf_config_from_preset, read_hf_config
from megatron.gpt_oss.checkpoint.load_hf import load_hf
from tests.harness.models import ODD, build_model

ABSENT = object()
LENGTH = 90  # beyond ODD's window of 16 and YaRN's original length of 64


def varied(change: dict, preset=ODD) -> dict:
    """config.json of a preset with other fields; 'rope.X' is X of rope_scaling."""
    config = hf_config_from_preset(preset)
    for name, value in change.items():
        target = config
        if name.startswith("rope."):
            target, name = config["rope_scaling"], name.removeprefix("rope.")
        target.pop(name, None)
        if value is not ABSENT:
            target[name] = value
    return config


def harsh_weights(model, seed: int) -> dict[str, torch.Tensor]:
    """fp32 weights for every parameter of transformers' model: large biases, sinks and gates."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.227
        if name.endswith("sinks"):
            noise, scale = torch.tanh(noise), 4.0
        elif name.endswith("gate_up_proj_bias"):
            scale = 3.0
        tensors[name] = 1 + 0.3 * noise if "norm" in name else scale * noise
    return tensors


def transformers_logits(
    folder, ids: torch.Tensor, seed: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor | Exception:
    """Logits of transformers' model of the directory's config, whose weights are written to it.

    Or what it raised.
    """
    import transformers

    try:
        config = transformers.GptOssConfig.from_pretrained(folder)
        if config.num_hidden_layers * config.num_local_experts * config.hidden_size > 10_000:
            raise AssertionError("a model of default sizes is too large for a test")
        model = transformers.GptOssForCausalLM._from_config(config, dtype=torch.float32)
        tensors = {n: t.contiguous() for n, t in harsh_weights(model, seed).items()}
        if not config.tie_word_embeddings:
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        model = transformers.GptOssForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="eager",
            experts_implementation="eager",
        )
        model = model.to(dtype).eval()  # some modules stay in fp32 otherwise
        with torch.no_grad():
            return model(ids, use_cache=False).logits
    except AssertionError:
        raise
    except Exception as error:  # whatever it raises is a refusal
        return error


def our_logits(folder, ids: torch.Tensor) -> torch.Tensor:
    """Logits of our model of the same directory, as `gptoss sample` builds it.

    Raises:
        UsageError: the directory is refused.
    """
    from megatron.gpt_oss.checkpoint.hf.config import preset_from_hf_config

    preset = preset_from_hf_config(read_hf_config(folder))
    model = build_model(preset).eval()
    load_hf([model], folder)
    with torch.no_grad():
        return model(ids, torch.arange(ids.shape[1]).expand_as(ids), None)


def write_config(folder, config: dict):
    """config.json alone; `transformers_logits` adds the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def draw(generator: random.Random) -> dict:
    """A change of several fields at once, sizes included, for `varied`."""
    change = {}

    def maybe(name, values, chance=0.35):
        if generator.random() < chance:
            change[name] = generator.choice(values)

    layers = generator.choice([1, 2, 3, 4])
    change["num_hidden_layers"] = layers
    kinds = ["sliding_attention", "full_attention", "attention"]
    change["layer_types"] = generator.choice(
        [ABSENT, None, [generator.choice(kinds) for _ in range(layers)]]
    )
    groups = generator.choice([1, 2, 3])
    change["num_key_value_heads"] = groups
    change["num_attention_heads"] = groups * generator.choice([1, 2, 4])
    maybe("head_dim", [8, 16, 24, 32])
    maybe("num_local_experts", [2, 4, 7])
    maybe("num_experts_per_tok", [2, 3, 4])
    change["experts_per_token"] = ABSENT
    maybe("sliding_window", [1, 2, 7, 64, 1000])
    maybe("rms_norm_eps", [1e-6, 1e-3, 0.0])
    maybe("swiglu_limit", [0.5, 3.5, 100.0])
    maybe("max_position_embeddings", [8, 100, 2048, ABSENT])
    maybe("vocab_size", [97, 128])
    maybe("hidden_size", [48, 64, 96])
    maybe("intermediate_size", [16, 40])
    maybe("rope_theta", [500, 10000.0, 1234.5, ABSENT])
    maybe("initial_context_length", [32, ABSENT])
    maybe("original_max_position_embeddings", [32, 128], 0.1)
    maybe("rope.rope_theta", [777.0, 150000], 0.2)
    maybe("rope.factor", [1.0, 2, 8.5, None, 0.5, 64])
    maybe("rope.original_max_position_embeddings", [16, 33, 64.0, ABSENT])
    maybe("rope.beta_fast", [None, ABSENT, 0, 4.0, 0.5])
    maybe("rope.beta_slow", [None, ABSENT, 0.1, 2, 40])
    maybe("rope.truncate", [ABSENT, None, True, False], 0.5)
    maybe("rope.attention_factor", [None, 0.5, 1, 2.5, 0.0], 0.25)
    maybe("rope.mscale", [None, 0.7, 1.0, 0])
    maybe("rope.mscale_all_dim", [0.4, 1.0, 0, None])
    maybe("rope.rope_type", ["yarn", "default", ABSENT, "linear", "dynamic"], 0.15)
    maybe("rope.type", ["yarn", "default", "linear"], 0.15)
    maybe("rope_scaling", [ABSENT, None, {}], 0.05)
    maybe("rope_parameters", [{}, None, {"rope_theta": 10.0}], 0.1)
    maybe("partial_rotary_factor", [1.0, None, 0.5], 0.1)
    maybe("output_router_logits", [True], 0.1)
    maybe("pad_token_id", [0, 5, -1, None], 0.1)
    if "rope_scaling" in change:  # its fields cannot be changed as well
        change = {name: value for name, value in change.items() if not name.startswith("rope.")}
    return change
