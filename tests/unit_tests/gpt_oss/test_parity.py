# Copyright (c) 2026, the megatron-core gptoss authors.

"""GPTModel against transformers in fp32: loaded checkpoint, logits, loss, gradients.

Limits are relative to the largest value of each tensor. fp32 sums in another order differ by about
1e-6 of it; a wrong layout, window, sink, clamp or rotation differs by 1e-2 and more.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from megatron.gpt_oss.checkpoint.load_hf import load_hf
from megatron.gpt_oss.checkpoint.mapping import hf_names, megatron_to_hf
from megatron.gpt_oss.checkpoint.model_source import ModelSource
from tests.harness.models import ODD, TINY, trained_tensors, write_hf

CASES = {
    # preset, sequence length, Megatron arguments
    "tiny-T300": (TINY, 300, {}),
    "tiny-T129-all-fusions": (TINY, 129, {"bias_gelu_fusion": True, "masked_softmax_fusion": True}),
    "odd-T97-past-yarn-length": (ODD, 97, {}),
    "odd-T16-one-window": (ODD, 16, {}),
    "odd-T17-rounded-yarn": (dataclasses.replace(ODD, yarn_truncate=True), 17, {}),
    "tiny-T140-one-group-clamp-2": (
        dataclasses.replace(TINY, num_query_groups=1, swiglu_limit=2.0, num_layers=2),
        140,
        {},
    ),
    "odd-T9-idle-experts": (dataclasses.replace(ODD, num_experts=40), 9, {}),
    "odd-T63-allgather-router-fp64": (
        ODD,
        63,
        {"moe_token_dispatcher_type": "allgather", "moe_router_dtype": "fp64"},
    ),
    "odd-T33-sequential-experts": (ODD, 33, {"moe_grouped_gemm": False}),
    "odd-T33-recompute-activation": (
        ODD,
        33,
        {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]},
    ),
    "odd-T65-recompute": (
        ODD,
        65,
        {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients(make_model, tmp_path, record_property, case):
    preset, length, overrides = CASES[case]
    transformers = pytest.importorskip("transformers")
    folder = write_hf(tmp_path / "hf", preset, trained_tensors(preset))
    reference = transformers.GptOssForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).train()
    model = make_model(preset, seq_length=length, **overrides).train()
    load_hf([model], folder)

    ids = torch.randint(preset.vocab_size, (2, length), generator=torch.Generator().manual_seed(5))
    positions = torch.arange(length).expand(2, -1)
    expected = reference(ids).logits
    expected_loss = F.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    with torch.no_grad():
        logits = model(ids, positions, None)
    error = _close("logits", logits, expected.detach(), 1e-5)
    record_property("parity", ("logits, fp32", case, error, 1e-5))

    loss = model(ids, positions, None, labels=ids.roll(-1, dims=1))[:, :-1].mean()
    error = abs(loss.item() / expected_loss.item() - 1)
    record_property("parity", ("loss, fp32", case, error, 1e-6))
    assert error < 1e-6
    expected_loss.backward()
    loss.backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            idle = "experts" in name  # a short batch may leave an expert without a token
            assert parameter.grad is not None and (idle or parameter.grad.any()), name
            parameter.copy_(parameter.grad)
    gradients = ModelSource(model)
    errors = []
    for name in hf_names(preset):
        gradient = megatron_to_hf(name, preset, gradients)
        errors.append(_close(name, gradient, reference.get_parameter(name).grad, 1e-4))
    record_property("parity", ("gradient of every parameter, fp32", case, max(errors), 1e-4))
    if "idle" in case:
        moved = reference.get_parameter("model.layers.0.mlp.experts.down_proj").grad.flatten(1)
        assert 0 < moved.any(dim=1).sum() < preset.num_experts


def _close(name, value, expected, limit):
    assert value.shape == expected.shape, name
    error = (value - expected).abs().max() / expected.abs().max()
    assert error < limit, f"{name}: {error:.2e} of the largest value, limit {limit}"
    return error.item()


def test_first_loss_is_ln_vocabulary(make_model, tmp_path):
    import math

    from megatron.gpt_oss.diagnostics.random_checkpoint import write_tiny_hf

    model = make_model(TINY)
    load_hf([model], write_tiny_hf(tmp_path, seed=3))
    ids = torch.randint(TINY.vocab_size, (2, 100))
    loss = model(ids, torch.arange(100).expand(2, -1), None, labels=ids.roll(-1, dims=1)).mean()
    assert abs(loss.item() - math.log(TINY.vocab_size)) < 0.1
