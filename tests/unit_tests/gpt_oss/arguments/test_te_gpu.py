# Copyright (c) 2026, the megatron-core gptoss authors.

"""The TransformerEngine route on GPUs against the local one, the reference being local in fp32.

    python -m pytest -q -m gpu tests/unit_tests/gpt_oss/arguments/test_te_gpu.py

Two layers of 20b's shape with a small vocabulary. Errors are relative norms; those of
TransformerEngine in bf16 are compared with those that the local route makes in bf16. `all-8` sends
every token to each of 8 experts, so that rounding cannot change the choice.
"""

import dataclasses
import functools
import os
from datetime import timedelta

import pytest
import torch

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.gpt_oss.arguments.te_requirements import installed_versions
from megatron.gpt_oss.checkpoint.load_hf import sharded_tensors
from megatron.gpt_oss.presets import get_preset
from tests.harness.compare import relative_error

pytestmark = [
    pytest.mark.ranks(2, threads=4),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(installed_versions().te is None, reason="needs TransformerEngine"),
]

LENGTH = 512
SHAPE = dataclasses.replace(get_preset("20b", 2), vocab_size=1024)
PRESETS = {
    "top4-of-32": SHAPE,
    "all-8": dataclasses.replace(SHAPE, num_experts=8, num_experts_per_tok=8),
}
# Times the local route's own error. Where choices can change, a changed one is an error by itself.
ALLOWED = 1.5
TE = dict(transformer_impl="transformer_engine")
# e4m3 rounds by 2.6 % (root mean square), e5m2 by 5 %, in several successive GEMMs.
FP8_LOGITS, FP8_GRADIENTS = 0.15, 0.35


@pytest.fixture(scope="module")
def group():
    from benchmarks.lib.harness import start_alone

    torch.cuda.set_device(0)
    start_alone()
    yield
    torch.distributed.destroy_process_group()


def pieces(model) -> dict:
    """A view of each parameter, by its name and offset in a checkpoint."""
    state = model.sharded_state_dict(metadata={"dp_cp_group": torch.distributed.group.WORLD})
    return {(x.key, x.global_offset): x.data for x in sharded_tensors(state)}


def make(preset, **overrides):
    from benchmarks.lib.harness import Trainer

    options = dict(optimizer=False, seq_length=LENGTH, max_position_embeddings=LENGTH)
    return Trainer(preset, **options, **overrides)


@torch.no_grad()
def fill(model, weights: dict) -> None:
    found = pieces(model)
    assert set(found) == set(weights)
    for name, data in found.items():
        data.copy_(weights[name])


def measure(trainer, preset) -> tuple[torch.Tensor, dict]:
    """Logits, and the gradient of every parameter by its name in a checkpoint."""
    from benchmarks.lib.harness import make_batch

    batch = make_batch(preset.vocab_size, LENGTH)
    positions = torch.arange(LENGTH, device="cuda")[None]
    with torch.no_grad():
        logits = trainer.model[0](batch["tokens"], positions, None).float().clone()
    trainer.zero_gradients()
    trainer.forward_backward(batch)
    model = trainer.model[0].module
    with torch.no_grad():
        held = {}
        for parameter in model.parameters():
            held[parameter] = parameter.data
            parameter.data = parameter.main_grad.clone()
        found = {name: data.clone() for name, data in pieces(model).items()}
        for parameter, data in held.items():
            parameter.data = data
    return logits, found


def run(preset, weights, **overrides):
    trainer = make(preset, **overrides)
    try:
        fill(getattr(trainer.model[0].module, "module", trainer.model[0].module), weights)
        return measure(trainer, preset)
    finally:
        trainer.close()


@functools.cache
def reference(name: str):
    """Weights, logits and gradients of the local route in fp32, on plain PyTorch's attention."""
    preset = PRESETS[name]
    trainer = make(preset, bf16=False, sink_attention_backend="math")
    model = trainer.model[0].module
    generator = torch.Generator("cuda").manual_seed(3)
    with torch.no_grad():
        for where, parameter in model.named_parameters():
            if where.endswith(("bias", "softmax_offset")):  # zero at the start of a training
                parameter.normal_(std=0.5, generator=generator)
            parameter.copy_(parameter.bfloat16())
    weights = {key: data.clone() for key, data in pieces(model).items()}
    logits, gradients = measure(trainer, preset)
    trainer.close()
    return weights, logits, gradients


def errors(found, expected) -> dict[str, float]:
    """Relative error of the logits and, by kind of parameter, of the gradients."""
    kinds = {"logits": [(found[0], expected[0])]}
    assert set(found[1]) == set(expected[1])
    for name, value in expected[1].items():
        kinds.setdefault(name[0].replace("decoder.layers.", ""), []).append((found[1][name], value))
    result = {}
    for kind, pairs in kinds.items():
        wrong = sum((a.double() - b.double()).square().sum() for a, b in pairs).sqrt()
        right = sum(b.double().square().sum() for _, b in pairs).sqrt()
        assert right > 0, kind
        result[kind] = (wrong / right).item()
    return result


@functools.cache
def local_errors(name: str) -> dict[str, float]:
    weights, *expected = reference(name)
    return errors(run(PRESETS[name], weights), expected)


@pytest.mark.parametrize("sink_attention", ["megatron", "te"])
@pytest.mark.parametrize("name", list(PRESETS))
def test_bf16(group, name, sink_attention, record_property):
    """Logits and every gradient: rounding of bf16, no more than the local route's."""
    weights, *expected = reference(name)
    own = local_errors(name)
    found = errors(run(PRESETS[name], weights, sink_attention=sink_attention, **TE), expected)
    record_property("errors", {kind: (found[kind], own[kind]) for kind in found})
    print("\n".join(f"{kind}: {found[kind]:.2e} local {own[kind]:.2e}" for kind in found))
    for kind, error in found.items():
        assert error <= ALLOWED * own[kind] + 1e-4, (kind, error, own[kind])


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
@pytest.mark.parametrize("fp8", ["hybrid", "e4m3"])
def test_fp8(group, fp8, recipe, record_property):
    """Current scaling and blocks: finite, within FP8's rounding, and not bf16 in disguise."""
    weights, *expected = reference("all-8")
    flags = dict(fp8=fp8, fp8_recipe=recipe, **TE)
    found = errors(run(PRESETS["all-8"], weights, **flags), expected)
    record_property("errors", found)
    print("\n".join(f"{kind}: {error:.2e}" for kind, error in found.items()))
    assert local_errors("all-8")["logits"] < found.pop("logits") < FP8_LOGITS
    for kind, error in found.items():
        assert error < FP8_GRADIENTS, (kind, error)


def test_fp8_router_padding(group):
    """Rows padded by the router or by the experts: the same numbers."""
    weights, *expected = reference("top4-of-32")
    flags = dict(fp8="hybrid", fp8_recipe="tensorwise", **TE)
    logits, _ = run(PRESETS["top4-of-32"], weights, **flags)
    padded, _ = run(
        PRESETS["top4-of-32"], weights, moe_router_padding_for_quantization=True, **flags
    )
    error = relative_error(padded, logits)
    assert error < 0.05, error


@pytest.mark.parametrize("sink_attention", ["megatron", "te"])
def test_names_in_a_checkpoint(group, sink_attention):
    """Tensors, their shapes and places, and objects: a load fails if one is missing."""
    preset, names = PRESETS["all-8"], []
    for flags in ({}, dict(sink_attention=sink_attention, **TE)):
        trainer = make(preset, **flags)
        model = trainer.model[0].module.module
        state = model.sharded_state_dict(metadata={"dp_cp_group": torch.distributed.group.WORLD})
        tensors = {
            (x.key, x.global_offset, x.global_shape, tuple(x.data.shape))
            for x in sharded_tensors(state)
        }
        objects = {
            (x.key, x.global_offset) for x in nested_values(state) if isinstance(x, ShardedObject)
        }
        names.append((tensors, objects))
        trainer.close()
    assert names[0][0] == names[1][0]
    assert names[0][1] ^ names[1][1] == set()


@pytest.mark.parametrize("sink_attention", ["megatron", "te"])
@pytest.mark.parametrize("to", ["local", "transformer_engine"])
def test_checkpoint(group, tmp_path, to, sink_attention):
    """Saved by one implementation, loaded by the other with Megatron's own functions."""
    from megatron.core import dist_checkpointing

    preset = dataclasses.replace(get_preset("tiny", 2))
    te = dict(sink_attention=sink_attention, **TE)
    flags = [{}, te] if to == "transformer_engine" else [te, {}]
    metadata = {"dp_cp_group": torch.distributed.group.WORLD}
    saver = make(preset, **flags[0])
    model = saver.model[0].module.module
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    saved = {name: data.clone() for name, data in pieces(model).items()}
    dist_checkpointing.save(model.sharded_state_dict(metadata=metadata), str(tmp_path))
    saver.close()
    loader = make(preset, **flags[1])
    model = loader.model[0].module.module
    loaded = dist_checkpointing.load(model.sharded_state_dict(metadata=metadata), str(tmp_path))
    model.load_state_dict(loaded, strict=True)
    for name, data in pieces(model).items():
        assert torch.equal(data, saved[name]), name
    loader.close()


def sink_gradients(cp: int, per_token: bool) -> dict:
    """This layout's reduced gradients of the sinks and of one other parameter, same batch."""
    from benchmarks.lib.harness import Trainer, make_batch

    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl", timeout=timedelta(seconds=60))
    preset = dataclasses.replace(get_preset("tiny", 2), num_experts_per_tok=8)
    trainer = Trainer(
        preset,
        cp=cp,
        optimizer=False,
        seq_length=LENGTH,
        sink_attention="te",
        cp_comm_type=["a2a"],
        calculate_per_token_loss=per_token,
        **TE,
    )
    model = trainer.model[0].module.module
    generator = torch.Generator("cuda").manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() == 1:
                parameter.normal_(std=0.5, generator=generator)
    trainer.zero_gradients()
    trainer.forward_backward(make_batch(preset.vocab_size, LENGTH))
    found = {
        name: parameter.main_grad.double().cpu().numpy().copy()
        for name, parameter in model.named_parameters()
        if name.endswith(("softmax_offset", "linear_proj.weight"))
    }
    trainer.close()
    torch.distributed.destroy_process_group()
    return found


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("per_token", [False, True])
def test_cp2_sink_gradient(ranks, per_token):
    """Regression: the sum over ranks was twice too large, as with a2a each has the full gradient."""
    environment = dict(init_process_group=False, world_size=2, timeout=150)
    one = ranks.run(sink_gradients, 1, per_token, **environment)[0]
    two = ranks.run(sink_gradients, 2, per_token, **environment)[0]
    ratios = {name: float((two[name] * one[name]).sum() / (one[name] ** 2).sum()) for name in one}
    print(ratios)
    common = [ratio for name, ratio in ratios.items() if name.endswith("linear_proj.weight")]
    for name, ratio in ratios.items():
        assert ratio / common[0] == pytest.approx(1, abs=0.04), ratios
