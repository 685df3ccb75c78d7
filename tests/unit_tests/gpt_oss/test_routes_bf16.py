# Copyright (c) 2026, the megatron-core gptoss authors.

"""The local and TransformerEngine's route in bf16 against transformers, with the very same weights.

    python -m pytest -q -m gpu tests/unit_tests/gpt_oss/test_routes_bf16.py

The truth is transformers' model in float64, and its own bf16 says what rounding costs: logits and
the gradient of every kind of tensor, of a loss on all tokens, may be 1.5 times as far off. Sinks of
up to 10, biases of the experts and the router of 0.5, sequences beyond the window. On GPUs two
layers of 20b's shape with a small vocabulary, on the CPU a tiny one, local route alone. `all-8`
sends every token to each of 8 experts; with a choice, rounding can change it, in either bf16.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from megatron.core.utils import unwrap_model
from megatron.gpt_oss.arguments.te_requirements import installed_versions
from megatron.gpt_oss.checkpoint.hf.config import hf_config_from_preset
from megatron.gpt_oss.checkpoint.load_hf import sharded_tensors
from megatron.gpt_oss.checkpoint.mapping import (
    copy_matrix,
    hf_names,
    hf_shape,
    hf_to_megatron,
    is_expert_matrix,
    locate,
    megatron_to_hf,
)
from megatron.gpt_oss.checkpoint.model_source import ModelSource
from megatron.gpt_oss.presets import get_preset

BATCH = 2
ALL_8 = dict(num_experts=8, num_experts_per_tok=8)
TWO_LAYERS = dataclasses.replace(get_preset("20b", 2), vocab_size=1024)
TINY = dataclasses.replace(get_preset("tiny", 2), sliding_window=32)
# preset, sequence length
LARGE = {
    "top4-of-32": (TWO_LAYERS, 512),
    "all-8": (dataclasses.replace(TWO_LAYERS, **ALL_8), 512),
}
SMALL = {
    "top-4": (TINY, 96),
    "all-8": (dataclasses.replace(TINY, **ALL_8), 96),
}
TE = dict(transformer_impl="transformer_engine")
ROUTES = {
    "local": {},
    "te": TE,
    "te-attention": dict(TE, sink_attention="te"),
}
ALLOWED = 1.5  # times the error of transformers' bf16
NEGLIGIBLE = 1e-4  # relative: far below a rounding to bf16


@pytest.fixture(scope="module")
def group():
    from benchmarks.lib.harness import start_alone

    start_alone()
    yield
    torch.distributed.destroy_process_group()


def random_weights(preset, device) -> dict[str, torch.Tensor]:
    """bf16 tensors by their Hugging Face names, such that each of them matters."""
    generator, weights = torch.Generator(device).manual_seed(3), {}
    for name in hf_names(preset):
        shape = hf_shape(name, preset)
        noise = torch.randn(shape, generator=generator, device=device)
        if name.endswith("sinks"):
            value = 10 * torch.tanh(2 * noise)
        elif name.endswith("bias"):
            value = 0.5 * noise
        elif "norm" in name:
            value = 1 + 0.1 * noise
        elif "embed" in name:
            value = noise
        else:
            value = noise * shape[-2 if is_expert_matrix(name) else -1] ** -0.5
        weights[name] = value.bfloat16()
    return weights


def hugging_face(preset, weights, batch, dtype):
    """Logits, and gradients by name, of transformers' model in a dtype."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GptOssConfig.from_dict(hf_config_from_preset(preset))
    config._experts_implementation = "eager"
    with batch["tokens"].device:
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="eager"
        )
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32  # as from_pretrained keeps it
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert parameter.dtype == dtype and parameter.shape == weights[name].shape
            parameter.copy_(weights[name])
    logits = model(batch["tokens"], use_cache=False).logits
    exact = logits if dtype == torch.float64 else logits.float()
    F.cross_entropy(exact.flatten(0, 1), batch["labels"].flatten()).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def megatron(preset, weights, batch, **flags):
    """The same of this project's step: gradients in fp32, as the optimizer gets them."""
    from benchmarks.lib.harness import Trainer

    length = batch["tokens"].shape[1]
    trainer = Trainer(preset, optimizer=False, seq_length=length, micro_batch_size=BATCH, **flags)
    try:
        model = unwrap_model(trainer.model[0])
        fill(model, preset, weights)
        positions = torch.arange(length, device=batch["tokens"].device).expand(BATCH, -1)
        with torch.no_grad():
            logits = trainer.model[0](batch["tokens"], positions, None).clone()
        trainer.zero_gradients()
        trainer.forward_backward(batch)
        for parameter in model.parameters():
            parameter.data = parameter.main_grad
        gradients = ModelSource(model)
        return logits, {
            name: megatron_to_hf(name, preset, gradients).clone() for name in hf_names(preset)
        }
    finally:
        trainer.close()


@torch.no_grad()
def fill(model, preset, weights) -> None:
    """Copy weights in Hugging Face's layout into a model of one rank."""
    filled = 0
    for part in sharded_tensors(model.sharded_state_dict()):
        where = locate(part.key, part.global_offset, part.local_shape)
        value = hf_to_megatron(where, preset, lambda name, index: weights[name][index])
        copy_matrix(part.data, value)
        filled += part.data.numel()
    assert filled == sum(parameter.numel() for parameter in model.parameters())


def errors(found, truth) -> dict[str, float]:
    """Relative error (norms) of the logits, and of the gradients by kind of tensor."""
    pairs = {"logits": [(found[0], truth[0])]}
    assert set(found[1]) == set(truth[1])
    for name, value in truth[1].items():
        kind = name.split("layers.")[-1].lstrip("0123456789.")
        pairs.setdefault(kind, []).append((found[1][name], value))
    result = {}
    for kind, tensors in pairs.items():
        assert all(a.shape == b.shape for a, b in tensors), kind
        wrong = sum((a.double() - b).square().sum() for a, b in tensors).sqrt()
        right = sum(b.square().sum() for _, b in tensors).sqrt()
        assert right > 0, kind
        result[kind] = (wrong / right).item()
    return result


@pytest.fixture(scope="module")
def reference(group):
    """reference(preset, length, device): weights, batch, truth, errors of transformers' bf16."""
    from benchmarks.lib.harness import make_batch

    last = {}  # of one case: on a GPU the truth alone takes 30 GB

    def make(preset, length, device):
        if last.get("case") != (preset, length):
            last.clear()
            weights = random_weights(preset, device)
            batch = make_batch(preset.vocab_size, length, BATCH)
            truth = hugging_face(preset, weights, batch, torch.float64)
            theirs = errors(hugging_face(preset, weights, batch, torch.bfloat16), truth)
            last.update(case=(preset, length), found=(weights, batch, truth, theirs))
        return last["found"]

    return make


def compare(reference, preset, length, device, record_property, flags=()):
    weights, batch, truth, theirs = reference(preset, length, device)
    ours = errors(megatron(preset, weights, batch, **dict(flags)), truth)
    record_property("errors", {kind: (ours[kind], theirs[kind]) for kind in ours})
    print("\n".join(f"{kind}: {ours[kind]:.2e} transformers {theirs[kind]:.2e}" for kind in ours))
    assert 1e-4 < theirs["logits"] < 0.5  # it is bf16 that is measured
    wrong = {
        kind: (error, theirs[kind])
        for kind, error in ours.items()
        if not error <= ALLOWED * theirs[kind] + NEGLIGIBLE
    }
    assert not wrong, wrong


@pytest.mark.skipif(torch.cuda.is_available(), reason="the large one runs on the GPU")
@pytest.mark.parametrize("case", SMALL)
def test_local_on_cpu(reference, record_property, case):
    compare(reference, *SMALL[case], "cpu", record_property)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("case", LARGE)  # the outer loop: one truth at a time
def test_on_gpu(reference, record_property, case, route):
    if route != "local" and installed_versions().te is None:
        pytest.skip("needs TransformerEngine")
    compare(reference, *LARGE[case], "cuda", record_property, ROUTES[route])


@pytest.mark.skipif(torch.cuda.is_available(), reason="on the CPU")
@pytest.mark.parametrize(
    "changed", ["self_attn.sinks", "mlp.router.bias", "mlp.experts.gate_up_proj_bias"]
)
def test_a_wrong_tensor_is_seen(reference, record_property, changed):
    """Rounding does not hide a bias or a sink that is lost."""
    preset, length = SMALL["all-8"]
    weights, batch, truth, theirs = reference(preset, length, "cpu")
    lost = {
        name: torch.zeros_like(value) if name.endswith(changed) else value
        for name, value in weights.items()
    }
    found = errors(megatron(preset, lost, batch), truth)
    assert found["logits"] > 3 * theirs["logits"]
