# Copyright (c) 2026, the megatron-core gptoss authors.

"""GroupedExperts in one process, against SequentialMLP, transformers and a float64 reference."""

import inspect
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

from megatron.core import parallel_state
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.grouped_mlp.expert_segments import ExpertSegments
from megatron.core.transformer.moe.grouped_mlp.linear import grouped_linear
from megatron.core.transformer.moe.grouped_mlp.module import GroupedExperts
from tests.harness.compare import relative_error
from tests.harness.experts_reference import (
    EXPERTS,
    HIDDEN,
    by_place,
    copy_weights,
    experts_ref,
    moe_layer,
    randomize,
)
from tests.harness.hf_reference import SIZES, hf_model, moe_to_megatron
from tests.harness.triton_interpreter import run_in_interpreter

COUNTS = {
    "odd": [3, 1, 7, 2],
    "empty-experts": [0, 5, 0, 4],
    "last-two-empty": [6, 1, 0, 0],
    "one-takes-all": [0, 0, 13, 0],
    "no-tokens": [0, 0, 0, 0],
}
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)


def rows_and_probs(counts, dtype, device="cpu"):
    rows = sum(counts)
    x, dout = (torch.randn(rows, HIDDEN, dtype=torch.float64).to(dtype) for _ in range(2))
    probs = torch.rand(rows, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return [tensor.to(device) for tensor in (x, probs, dout)]


def run(experts, x, probs, dout, counts):
    """Run the layer; returns the output and every gradient, by name."""
    experts.zero_grad()
    x, probs = x.clone().requires_grad_(), probs.clone().requires_grad_()
    out, bias = experts(x, torch.tensor(counts, device=x.device), probs)
    assert bias is None and out.dtype == x.dtype
    out.backward(dout)
    grads = {name: parameter.grad for name, parameter in experts.named_parameters()}
    return {"out": out, "dx": x.grad, "dprobs": probs.grad, **grads}


def reference(experts, x, probs, dout, counts):
    """The same in float64 by autograd over a loop."""
    leaves = {name: p.detach().double().cpu() for name, p in experts.named_parameters()}
    leaves.update(dx=x.double().cpu(), dprobs=probs.double().cpu())
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in leaves.items()}
    names = ("dx", "linear_fc1.weight", "linear_fc1.bias", "linear_fc2.weight", "linear_fc2.bias")
    out = experts_ref(*(leaves[name] for name in names), counts, leaves["dprobs"])
    out.backward(dout.double().cpu())
    grads = {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in leaves.items()}
    return {"out": out, **grads}


def assert_close(found, expected, limit):
    errors = {name: relative_error(found[name].cpu(), expected[name]) for name in expected}
    assert found.keys() == expected.keys()
    assert all(error <= limit for error in errors.values()), errors


def test_spec_provider():
    """--moe-grouped-gemm chooses these experts on the local spec, where it changed nothing."""
    choose = LocalSpecProvider().grouped_mlp_modules
    old = len(inspect.signature(choose).parameters) == 2  # until 0.16: legacy grouped GEMM too
    grouped, sequential = (choose(g, False)[0] if old else choose(g) for g in (True, False))
    assert grouped is GroupedExperts
    assert getattr(sequential, "func", sequential) is SequentialMLP
    assert isinstance(moe_layer(True).experts, GroupedExperts)


@pytest.mark.parametrize("on_cpu", [True, False], ids=["cpu-init", "device-init"])
def test_initial_weights(on_cpu):
    """Bit for bit those of SequentialMLP, which share the generator's state."""
    layers = []
    for grouped in (False, True):
        torch.manual_seed(5)
        model_parallel_cuda_manual_seed(7, force_reset_rng=True)
        layers.append(by_place(moe_layer(grouped, use_cpu_initialization=on_cpu)))
    assert layers[0].keys() == layers[1].keys()
    for place, tensor in layers[0].items():
        assert torch.equal(tensor, layers[1][place]), place
        assert tensor.dim() == 1 or tensor.std() > 0, place


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_reference(counts):
    """Output and every gradient in float64, values past the clamp on both sides."""
    experts = moe_layer(True).experts
    randomize(experts)
    x, probs, dout = rows_and_probs(counts, torch.float64)
    pre = torch.cat(
        [r @ w + b for r, w, b in zip(x.split(counts), *experts.linear_fc1.parameters())]
    )
    if sum(counts):
        assert (pre > 7).any() and (pre < -7).any()
    expected = reference(experts, x, probs, dout, counts)
    assert_close(run(experts, x, probs, dout, counts), expected, 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("counts", [COUNTS["odd"], COUNTS["empty-experts"]], ids=["odd", "empty"])
def test_precision(counts, dtype):
    """Against float64 no further off than SequentialMLP, which rounds after each operation."""
    sequential, grouped = moe_layer(False, dtype), moe_layer(True, dtype)
    randomize(sequential)
    copy_weights(sequential, grouped)
    case = rows_and_probs(counts, dtype)
    expected = reference(grouped.experts, *case, counts)
    found = run(grouped.experts, *case, counts)
    theirs = run(sequential.experts, *case, counts)
    for name in ("out", "dx", "dprobs"):
        mine = relative_error(found[name], expected[name])
        # A few ulps apart in fp32, where both are at the rounding of the result.
        assert mine <= 1.2 * relative_error(theirs[name], expected[name]) + 1e-7, name
    assert_close(found, expected, 1e-6 if dtype == torch.float32 else 2**-6)


CONFIGS = {
    "gpt-oss": {},
    "gpt-oss-fused": dict(bias_activation_fusion=True),
    "swiglu": dict(activation_func=F.silu, glu_linear_offset=0.0, activation_func_clamp_value=None),
    "swiglu-clamped": dict(activation_func=F.silu, glu_linear_offset=0.5),
    "no-bias": dict(add_bias_linear=False),
    "geglu": dict(activation_func=F.gelu),
    "relu": dict(
        activation_func=squared_relu,
        gated_linear_unit=False,
        glu_linear_offset=0.0,
        activation_func_clamp_value=None,
    ),
    "probs-on-input": dict(
        moe_apply_probs_on_input=True, moe_router_topk=1, moe_router_pre_softmax=True
    ),
    "recompute": dict(recompute_granularity="selective", recompute_modules=["moe_act"]),
    "capacity": dict(moe_expert_capacity_factor=1.0, moe_pad_expert_input_to_capacity=True),
    "allgather": dict(moe_token_dispatcher_type="allgather"),
}


@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS)
def test_sequential_mlp(overrides):
    """An MoE layer with SequentialMLP and with GroupedExperts, for all supported options."""
    theirs = {k: v for k, v in overrides.items() if not k.startswith("recompute")}
    layers = moe_layer(False, **theirs), moe_layer(True, **overrides)
    randomize(layers[0])
    copy_weights(*layers)
    x, dout = (torch.randn(9, 2, HIDDEN, dtype=torch.float64) for _ in range(2))
    results = []
    with torch.compiler.set_stance("force_eager"):  # the test is about the maths, not the compiler
        for layer in layers:
            leaf = x.clone().requires_grad_()
            out, bias = layer(leaf)
            out.backward(dout)
            assert bias is None
            results.append({"out": out, "dx": leaf.grad, **by_place(layer, gradients=True)})
    assert_close(results[1], results[0], 1e-13)


def test_transformers():
    """GptOssMLP in float64; one expert is given no token."""
    theirs = hf_model().model.layers[0].mlp
    with torch.no_grad():
        theirs.router.bias[1] = -100.0
    layers = []
    for grouped in (False, True):
        layers.append(
            moe_layer(
                grouped,
                hidden_size=SIZES["hidden_size"],
                moe_ffn_hidden_size=SIZES["intermediate_size"],
                num_moe_experts=SIZES["num_local_experts"],
                moe_router_topk=SIZES["num_experts_per_tok"],
            )
        )
    parameters = dict(theirs.named_parameters())
    x = torch.randn(13, 2, SIZES["hidden_size"], dtype=torch.float64)
    x_ref, x_mg = (x.clone().requires_grad_() for _ in range(2))
    out_ref, _ = theirs(x_ref)
    out_ref.backward(torch.ones_like(x))
    # The map to SequentialMLP's names is written down in gpt_oss_reference.
    carrier, layer = layers
    for values, target in (
        (parameters, "data"),
        ({n: p.grad for n, p in parameters.items()}, "grad"),
    ):
        mapped = moe_to_megatron(values, "", "")
        for name, parameter in carrier.named_parameters():
            setattr(parameter, target, mapped[name].detach().clone().contiguous())
    copy_weights(carrier, layer)
    out, _ = layer(x_mg)
    out.backward(torch.ones_like(x))
    # The router's softmax is float32.
    assert relative_error(out, out_ref) < 5e-7
    assert relative_error(x_mg.grad, x_ref.grad) < 5e-7
    assert_close(by_place(layer, gradients=True), by_place(carrier, gradients=True), 5e-7)


@pytest.mark.parametrize("activation", [quick_gelu, F.gelu], ids=["fused", "unfused"])
def test_recompute_keeps_no_activation(activation, monkeypatch):
    """moe_act recompute: the input of fc2 is not kept between forward and backward."""
    activate, made = GroupedExperts._activate, []

    def recorded(*args, **kwargs):
        out = activate(*args, **kwargs)
        made.append(StorageWeakRef(out.untyped_storage()))
        return out

    monkeypatch.setattr(GroupedExperts, "_activate", recorded)
    recompute = dict(recompute_granularity="selective", recompute_modules=["moe_act"])
    kept, grads = [], []
    for overrides in ({}, recompute):
        experts = moe_layer(True, activation_func=activation, **overrides).experts
        randomize(experts)
        torch.manual_seed(3)
        x, probs, dout = rows_and_probs(COUNTS["odd"], torch.float64)
        out, _ = experts(x.requires_grad_(), torch.tensor(COUNTS["odd"]), probs)
        kept.append(not made.pop().expired())
        out.backward(dout)
        grads.append(experts.linear_fc2.weight.grad)
    assert kept == [True, False]
    assert torch.equal(*grads)


def test_no_weight_decay_of_biases():
    """[experts, width] is no vector: the biases' names have to say what they are."""
    from megatron.core.optimizer import get_standard_config_overrides  # since 0.16

    overrides = get_standard_config_overrides(OptimizerConfig())
    decayed = [
        name
        for name, parameter in moe_layer(True).experts.named_parameters("experts")
        if not any(key.matches(parameter, name) for key in overrides)
    ]
    assert decayed == ["experts.linear_fc1.weight", "experts.linear_fc2.weight"]


def test_bias_needs_scale():
    with pytest.raises(ValueError, match="bias without scale"):
        grouped_linear(torch.ones(1, 2), torch.ones(1, 2, 3), None, bias=torch.ones(1, 3))


@pytest.mark.parametrize("setting", [("moe_mlp_glu_interleave_size", 8), ("fp8", "e4m3")])
def test_refused(setting):
    """Unsupported options are named, not ignored."""
    config = moe_layer(True).config
    setattr(config, *setting)
    with pytest.raises(
        ValueError, match=f"GroupedExperts does not support {setting[0]} = {setting[1]}"
    ):
        GroupedExperts(EXPERTS, config)


def test_dispatcher_does_not_wait():
    """One rank: the counts stay on the device and the tokens, sorted already, where they are."""
    points = []
    for grouped in (False, True):
        layer = moe_layer(grouped)
        dispatcher = layer.token_dispatcher
        x = torch.randn(6, 1, HIDDEN, dtype=torch.float64)
        probs, routing_map = layer.route(x)
        rows, probs = dispatcher.dispatch_preprocess(x, routing_map, probs)
        rows, probs = dispatcher.token_dispatch(rows, probs)
        sorted_rows, counts, sorted_probs = dispatcher.dispatch_postprocess(rows, probs)
        assert sorted_rows is rows and sorted_probs is probs
        assert torch.equal(counts, routing_map.sum(0))
        assert dispatcher.combine_preprocess(rows) is rows
        points.append(dispatcher.cuda_sync_point)
    assert points == ["before_finish", "no_sync"]


@pytest.mark.parametrize("name", ["test_grouped_experts_triton.py", "test_grouped_gemm_triton.py"])
def test_triton_kernels_in_interpreter(name):
    run_in_interpreter(Path(__file__).with_name(name))


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cuda(counts, dtype):
    """Triton kernels and, in bf16 on Hopper, grouped_mm: no further off than SequentialMLP."""
    layers = [moe_layer(g, dtype, use_cpu_initialization=False) for g in (False, True)]
    randomize(layers[0])
    copy_weights(*layers)
    case = rows_and_probs(counts, dtype, "cuda")
    expected = reference(layers[1].experts, *case, counts)
    found = run(layers[1].experts, *case, counts)
    assert_close(found, expected, 1e-6 if dtype == torch.float32 else 2**-6)
    if sum(counts):
        theirs = run(layers[0].experts, *case, counts)
        for name in ("out", "dx", "dprobs"):
            mine = relative_error(found[name].cpu(), expected[name])
            limit = 1.2 * relative_error(theirs[name].cpu(), expected[name]) + 1e-6
            assert mine <= limit, name


@pytest.mark.gpu
@ON_GPU
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] not in (9, 10),
    reason="grouped_mm needs Hopper or Blackwell",
)
def test_cuda_does_not_wait():
    """Forward and backward of a layer without synchronisation."""
    layer = moe_layer(True, torch.bfloat16, use_cpu_initialization=False)
    randomize(layer)
    x = torch.randn(33, 2, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer(x)[0].sum().backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_row_groups():
    """Owners and sums with empty experts at the start, in the middle and at the end."""
    groups = ExpertSegments(torch.tensor([0, 2, 0, 3, 0]), "cpu")
    assert groups.slices == [(1, 0, 2), (3, 2, 5)]
    assert groups.owners(5).tolist() == [1, 1, 3, 3, 3]
    rows = torch.arange(10.0).view(5, 2)
    assert groups.sum_rows(rows).tolist() == [[0, 0], [2, 4], [0, 0], [18, 21], [0, 0]]
