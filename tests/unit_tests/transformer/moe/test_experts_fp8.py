# Copyright (c) 2026, the megatron-core gptoss authors.

"""GroupedExperts in FP8, in one process, in plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.grouped_mlp import activation_fp8
from megatron.core.transformer.moe.grouped_mlp.activation import (
    ClampedSwiGLU,
    swiglu_backward_ref,
    swiglu_forward_ref,
)
from megatron.core.transformer.moe.grouped_mlp.expert_segments import ExpertSegments
from tests.harness.compare import relative_error
from tests.harness.experts_reference import EXPERTS, by_place, experts_ref, moe_layer, randomize

HIDDEN, WIDTH = 64, 48
COUNTS = {
    "odd": [3, 1, 70, 2],
    "empty-experts": [0, 5, 0, 40],
    "one-takes-all": [0, 0, 300, 0],
    "no-tokens": [0, 0, 0, 0],
}


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


def build(recipe="rowwise", dtype=torch.bfloat16, **overrides):
    sizes = dict(hidden_size=HIDDEN, moe_ffn_hidden_size=WIDTH, expert_fp8_recipe=recipe)
    layer = moe_layer(True, dtype, **{**sizes, **overrides})
    randomize(layer)
    with torch.no_grad():  # some values past the clamp, not half of them: at its edge masks flip
        layer.experts.linear_fc1.weight.mul_(0.25)
    return layer.experts


def draw_inputs(counts, scale=1.0):
    rows = sum(counts)
    x, dout = (torch.randn(rows, HIDDEN) * scale for _ in range(2))
    return x.bfloat16(), torch.rand(rows), dout.bfloat16()


def run(experts, x, probs, dout, counts):
    """The output and every gradient, by name."""
    experts.zero_grad()
    x, probs = x.clone().requires_grad_(), probs.clone().requires_grad_()
    out, _ = experts(x, torch.tensor(counts), probs)
    out.backward(dout)
    gradients = {name: parameter.grad for name, parameter in experts.named_parameters()}
    return {"out": out.detach(), "dx": x.grad, "dprobs": probs.grad, **gradients}


def reference(experts, x, probs, dout, counts):
    """The same in float64 by autograd over a loop."""
    leaves = {name: p.detach().double() for name, p in experts.named_parameters()}
    leaves.update(dx=x.double(), dprobs=probs.double())
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in leaves.items()}
    names = ("dx", "linear_fc1.weight", "linear_fc1.bias", "linear_fc2.weight", "linear_fc2.bias")
    out = experts_ref(*(leaves[name] for name in names), counts, leaves["dprobs"])
    out.backward(dout.double())
    gradients = {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in leaves.items()}
    return {"out": out.detach(), **gradients}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_reference(counts):
    """Output and every gradient against float64: three bits of each operand, no more is lost."""
    experts, inputs = build(), draw_inputs(counts)
    found, expected = run(experts, *inputs, counts), reference(experts, *inputs, counts)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        # Each operand is rounded by up to 6 %, by 2.6 % in the mean; the clamp's edge moves.
        assert relative_error(found[name], value) < 0.09, name
        if value.norm() > 0:
            cosine = F.cosine_similarity(found[name].double().flatten(), value.flatten(), 0)
            assert cosine > 0.996, name


def test_scales_do_not_matter():
    """Inputs and gradients of any magnitude lose no more than others."""
    counts = COUNTS["odd"]
    experts = build()
    x, probs, dout = draw_inputs(counts)
    small = run(experts, x, probs, dout, counts)
    large = run(experts, x, probs, dout * 2.0**-40, counts)
    for name in ("dx", "dprobs", "linear_fc1.weight", "linear_fc2.weight"):
        assert relative_error(large[name] * 2.0**40, small[name]) < 1e-2, name


def test_deterministic():
    counts = COUNTS["odd"]
    experts, inputs = build(), draw_inputs(counts)
    first, second = run(experts, *inputs, counts), run(experts, *inputs, counts)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_zero_rows():
    """Rows of zeros, as padding has, and a zero gradient: finite, and zero where it must be."""
    counts = COUNTS["odd"]
    experts = build()
    x, probs, dout = draw_inputs(counts)
    x[5:9], dout[:], probs[20:30] = 0, 0, 0
    found = run(experts, x, probs, dout, counts)
    assert found["out"].isfinite().all()
    assert all((found[name] == 0).all() for name in found if name != "out")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_stay_visible(bad):
    """A bad token's own output is NaN, no other's; a bad gradient reaches the gradients."""
    counts = COUNTS["odd"]
    experts = build()
    x, probs, dout = draw_inputs(counts)
    bad_x, bad_dout = x.clone(), dout.clone()
    bad_x[6, 3], bad_dout[6, 3] = bad, bad
    out = run(experts, bad_x, probs, dout, counts)["out"]
    assert out[6].isnan().all() and out[[0, 5, 7]].isfinite().all()
    found = run(experts, x, probs, bad_dout, counts)
    assert not found["dx"][6].isfinite().any() and found["dx"][[0, 5, 7]].isfinite().all()
    assert not found["linear_fc1.weight"].isfinite().all()
    assert not found["linear_fc2.weight"].isfinite().all()


def test_bounds_hold():
    """Neither activation nor gradient saturates, at the extremes of gate and up and router weight."""
    constants = ClampedSwiGLU()
    values = torch.cat([torch.linspace(-12, 12, 97), torch.tensor([7.0, -7.0, 2.4 / 1.702])])
    gate, up = torch.meshgrid(values, values, indexing="ij")
    y = torch.stack([gate.flatten(), up.flatten()], 1)  # [t, 2]: one column each
    rows = y.shape[0]
    segments = ExpertSegments(torch.tensor([rows]), "cpu")
    one = torch.ones(rows)

    def assert_not_saturated(found, expected):
        """A value that saturates is off by more than rounding."""
        limit = (expected.abs() * 2.0**-4).clamp_min(expected.abs().max() * 2.0**-12)
        assert ((found - expected).abs() <= limit).all()

    out = activation_fp8.swiglu_forward(y, None, segments, constants)
    expected = swiglu_forward_ref(y, None, one, segments, constants)
    assert_not_saturated(out.float() * activation_fp8.out_scale(constants), expected)

    probs, dout = torch.rand(rows) * 3, torch.randn(rows, 1)
    scales = activation_fp8.dy_scales(dout.abs().t().contiguous(), probs, segments, constants)
    dy, dy_t, out_t, out_scale, *_ = activation_fp8.swiglu_backward(
        dout, y, None, probs, scales, segments, constants
    )
    expected_dy = swiglu_backward_ref(dout, y, None, probs, segments, constants)[0]
    assert_not_saturated(dy.float() * scales[0][:, None], expected_dy)
    assert_not_saturated((dy_t.float() * scales[1])[:, :rows].t(), expected_dy)
    expected = swiglu_forward_ref(y, None, probs, segments, constants)
    assert_not_saturated((out_t.float() * out_scale)[:, :rows].t(), expected)


def test_weights_are_quantised_once_a_step():
    """Only where a schedule marks the steps: else a change of the weights is never missed."""
    counts = COUNTS["odd"]
    experts, inputs = build(), draw_inputs(counts)

    def output():
        with torch.no_grad():
            return experts(inputs[0], torch.tensor(counts), inputs[1])[0]

    before = output()
    experts.linear_fc2.weight.data.mul_(2)
    assert not torch.equal(output(), before)
    experts.is_first_microbatch = True
    marked = output()
    experts.linear_fc2.weight.data.mul_(2)
    assert torch.equal(output(), marked)  # the same step
    experts.is_first_microbatch = True
    changed = output()
    assert not torch.equal(changed, marked)
    experts.linear_fc2.weight.data.mul_(2)
    experts.eval()  # a sample, after the optimizer step
    assert not torch.equal(output(), changed)


def test_marked_by_the_schedule():
    """Megatron's schedules call this at the first micro-batch."""
    sizes = dict(hidden_size=HIDDEN, moe_ffn_hidden_size=WIDTH, expert_fp8_recipe="rowwise")
    layer = moe_layer(True, torch.bfloat16, **sizes)
    layer.set_is_first_microbatch()
    assert layer.experts.is_first_microbatch is True


def test_checkpoint_is_the_same():
    """The entries and their values are those of bf16 experts."""
    layers = []
    for recipe in (None, "rowwise"):
        sizes = dict(hidden_size=HIDDEN, moe_ffn_hidden_size=WIDTH, expert_fp8_recipe=recipe)
        layer = moe_layer(True, torch.bfloat16, **sizes)
        randomize(layer)
        counts = torch.tensor([1] * EXPERTS)
        layer.experts(torch.randn(EXPERTS, HIDDEN).bfloat16(), counts, torch.rand(EXPERTS))
        layers.append(by_place(layer))
    assert layers[0].keys() == layers[1].keys()
    assert all(torch.equal(layers[0][place], layers[1][place]) for place in layers[0])


def test_saved_tensors():
    """x in e4m3 and y in bf16 are kept for the backward, not the activation's output."""
    counts = [128, 128, 128, 128]
    saved = []
    experts, (x, probs, _) = build(), draw_inputs(counts)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        experts(x.requires_grad_(), torch.tensor(counts), probs.requires_grad_())
    sizes = {(tensor.dtype, tuple(tensor.shape)) for tensor in saved}
    assert (torch.float8_e4m3fn, (HIDDEN, 6 * 256)) in sizes
    assert (torch.bfloat16, (512, 2 * WIDTH)) in sizes
    assert not any(shape == (512, WIDTH) for _, shape in sizes)


@pytest.mark.parametrize(
    "message, overrides",
    [
        ("bf16 weights, not torch.float32", dict(dtype=torch.float32)),
        ("multiples of 16, not 40 and 48", dict(hidden_size=40)),
        ("multiples of 16, not 64 and 24", dict(moe_ffn_hidden_size=24)),
        ("gate and clamp", dict(activation_func_clamp_value=None)),
        ("one of the recipes rowwise, not tensorwise", dict(recipe="tensorwise")),
    ],
)
def test_refused(message, overrides):
    with pytest.raises(ValueError, match=f"FP8 experts need .*{message}.*Drop --fp8-format"):
        build(**overrides)
